// The head's row kernels in plain C++: the readable reference, and the fallback on machines without AVX2.

#include <cmath>
#include <cstdint>

#include "cpu/head_kernels.h"

namespace dn::cpu {
namespace {

bool scan(float* tile_max, float* x, const float* guide, float guide_scale, int64_t n) {
  bool finite = true;
  for (int64_t begin = 0; begin < n; begin += kTileIds) {
    const int64_t end = begin + kTileIds < n ? begin + kTileIds : n;
    float max = -INFINITY;
    for (int64_t i = begin; i < end; ++i) {
      if (guide != nullptr) x[i] = guide[i] + guide_scale * (x[i] - guide[i]);
      finite = finite && std::isfinite(x[i]);
      max = x[i] > max ? x[i] : max;
    }
    tile_max[begin / kTileIds] = max;
  }
  return finite;
}

void exponentiate(float* mass, double* tile_mass, double* tile_moment, const float* x, float max, float scale,
                  int64_t n) {
  for (int64_t begin = 0; begin < n; begin += kTileIds) {
    const int64_t end = begin + kTileIds < n ? begin + kTileIds : n;
    double sum = 0, moment = 0;
    for (int64_t i = begin; i < end; ++i) {
      const float z = (x[i] - max) * scale;
      mass[i] = 0;
      if (z < kMinExponent) continue;
      mass[i] = std::exp(z);
      sum += static_cast<double>(mass[i]);
      moment += static_cast<double>(mass[i] * z);
    }
    tile_mass[begin / kTileIds] = sum;
    if (tile_moment != nullptr) tile_moment[begin / kTileIds] = moment;
  }
}

void keep_above(float* mass, double* tile_mass, const float* x, const float*, float threshold, int64_t n) {
  for (int64_t begin = 0; begin < n; begin += kTileIds) {
    const int64_t end = begin + kTileIds < n ? begin + kTileIds : n;
    double sum = 0;
    for (int64_t i = begin; i < end; ++i) {
      if (x[i] < threshold) mass[i] = 0;
      sum += static_cast<double>(mass[i]);
    }
    tile_mass[begin / kTileIds] = sum;
  }
}

int64_t collect(float* values, float* masses, double* above, const float* x, const float* mass, const float*,
                float low, float high, int64_t n) {
  int64_t count = 0;
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (x[i] >= high) sum += static_cast<double>(mass[i]);
    if (x[i] < low || x[i] >= high) continue;
    values[count] = x[i];
    masses[count] = mass[i];
    ++count;
  }
  *above = sum;
  return count;
}

void bounds(float* least, float* greatest, const float* x, int64_t n) {
  *least = *greatest = x[0];
  for (int64_t i = 1; i < n; ++i) {
    *least = x[i] < *least ? x[i] : *least;
    *greatest = x[i] > *greatest ? x[i] : *greatest;
  }
}

void mass_above(double* sums, const float* cuts, const float* x, const float* mass, const float*, int64_t n) {
  for (int c = 0; c < kCuts; ++c) {
    sums[c] = 0;
    for (int64_t i = 0; i < n; ++i) sums[c] += x[i] >= cuts[c] ? static_cast<double>(mass[i]) : 0.0;
  }
}

double diverge(float* keep, const float* before, const float* x, const float* mass, float max,
               float log_total, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    keep[i] = (x[i] - max) - log_total;
    if (before != nullptr && mass[i] > 0) sum += static_cast<double>(mass[i] * (keep[i] - before[i]));
  }
  return sum;
}

}  // namespace

const HeadKernels kHeadPortable = {scan, exponentiate, keep_above, collect, bounds, mass_above, diverge};

}  // namespace dn::cpu
