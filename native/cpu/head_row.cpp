// One row of logits in memory: statistics of its distribution and a draw from the tempered and filtered one.
// No sorting, one pass per question; the vector passes are HeadKernels. head.cpp brings the rows here, tests
// bring their own.

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

#include "core/backend.h"
#include "core/rng.h"
#include "cpu/head_kernels.h"

namespace dn::cpu {
namespace {

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

double sum_of(const double* x, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += x[i];
  return sum;
}

}  // namespace

float select_threshold(const Candidates& candidates, double budget, float* values, float* masses,
                       const HeadKernels& kernels) {
  const float infinity = std::numeric_limits<float>::infinity();
  double above = 0;  // mass of everything greater than the candidates

  // Many candidates: vector passes. The answer is >= a cut whose mass exceeds the budget and < a cut whose
  // mass does not; between two such cuts some value has mass, so the answer lies among those.
  constexpr int64_t kFew = 2048;
  constexpr int kPasses = 6;
  Candidates left = candidates;
  bool is_collected = false;
  const auto keep = [&](float low, float high) {
    double before = 0;
    left.n = kernels.collect(values, masses, &before, left.x, left.mass, left.tile_max, low, high, left.n);
    above += before;
    left.x = values;
    left.mass = masses;
    left.tile_max = nullptr;
    left.low = low;
    left.high = std::min(left.high, high);
    is_collected = true;
  };
  for (int pass = 0; pass < kPasses && left.n > kFew && left.low < left.high; ++pass) {
    const double low = left.low, step = (static_cast<double>(left.high) - low) / (kCuts + 1);
    float cuts[kCuts];
    for (int c = 0; c < kCuts; ++c) cuts[c] = static_cast<float>(low + (kCuts - c) * step);
    double sums[kCuts];
    kernels.mass_above(sums, cuts, left.x, left.mass, left.tile_max, left.n);
    const int64_t over =
        std::find_if(sums, sums + kCuts, [&](double sum) { return above + sum > budget; }) - sums;
    if (over == kCuts) break;  // below the last cut there may be nothing
    keep(cuts[over], over > 0 ? cuts[over - 1] : infinity);
  }
  if (!is_collected) keep(left.low, infinity);
  int64_t n = left.n;

  // Few: a histogram over the range of the values finds the bucket that holds the answer; repeat inside it.
  // The greatest and the smallest value never share a bucket, so every round leaves fewer candidates; two or
  // three rounds are usual.
  constexpr int kBuckets = 256;
  for (;;) {
    float low, high;
    kernels.bounds(&low, &high, values, n);
    if (low == high) return high;
    const double top = high;
    const double per_unit = kBuckets / (top - static_cast<double>(low));
    const auto bucket_of = [&](float value) {
      return std::min(kBuckets - 1, static_cast<int>((top - static_cast<double>(value)) * per_unit));
    };
    double mass[kBuckets] = {};
    int32_t count[kBuckets] = {};
    for (int64_t i = 0; i < n; ++i) {
      const int b = bucket_of(values[i]);
      mass[b] += static_cast<double>(masses[i]);
      ++count[b];
    }
    // The last non-empty bucket whose greatest value still qualifies: mass above it <= budget.
    int chosen = 0;
    double before = above, running = above;
    for (int b = 0; b < kBuckets && running <= budget; ++b) {
      if (count[b] != 0) {
        chosen = b;
        before = running;
      }
      running += mass[b];
    }
    above = before;
    int64_t kept = 0;
    for (int64_t i = 0; i < n; ++i) {
      if (bucket_of(values[i]) != chosen) continue;
      values[kept] = values[i];
      masses[kept] = masses[i];
      ++kept;
    }
    n = kept;
  }
}

// Why an inverse CDF and not arg max of logits + Gumbel noise: in fp32 -ln(-ln u) has few distinct values in
// its upper tail (u is never above 1 - 2^-24), so that rare tokens are drawn too seldom or never and the
// effective temperature falls below the one asked for. One 53-bit uniform against sums in double has no such
// cut, and costs one number per row instead of V.
int32_t draw_from(const float* mass, const double* tile_mass, int64_t V, double u) {
  const int64_t tiles = head_tiles(V);
  const double target = u * sum_of(tile_mass, tiles);
  // `below` is the mass before the tile. The comparison is strict, so a tile or id of mass zero is never
  // chosen; when rounding leaves the target past the end, the last one with mass is.
  double below = 0;
  int64_t tile = -1;
  double below_tile = 0;
  for (int64_t t = 0; t < tiles; ++t) {
    if (tile_mass[t] > 0) {
      tile = t;
      below_tile = below;
    }
    below += tile_mass[t];
    if (tile == t && target < below) break;
  }
  int32_t drawn = -1;
  double sum = below_tile;
  for (int64_t i = tile * kTileIds; i < std::min(V, (tile + 1) * kTileIds); ++i) {
    if (!(mass[i] > 0)) continue;
    drawn = static_cast<int32_t>(i);
    sum += static_cast<double>(mass[i]);
    if (target < sum) break;
  }
  return drawn;
}

int64_t denoise_workspace_floats(int64_t V) {
  const int64_t tiles = round_up(head_tiles(V), 16);
  return 2 * 2 * tiles + tiles + 3 * (round_up(V, 16) + 16);
}

namespace {

// The logit below which filters drop ids, -inf: none. Both filters keep a prefix of the ids in order of
// falling logit, and equal logits stand and fall together, so a filter is one number and no id need be
// sorted. Nucleus first, then top-k, on the tempered distribution: mass (V) relative to the best, with sums
// tile_mass.
float filter_threshold(const DenoiseRow& row, const float* logits, int64_t V, float max,
                       const float* tile_max, const float* mass, const double* tile_mass, float* values,
                       float* masses, float* tile_order, const HeadKernels& kernels) {
  const int64_t tiles = head_tiles(V);
  const double temperature = static_cast<double>(row.temperature);
  // Nothing lower has mass, so nothing lower can be drawn. Rounded down twice: cutoffs may only err by
  // keeping more.
  const auto logit_at = [&](double exponent) {
    constexpr float kLowest = -std::numeric_limits<float>::max();
    const double logit = static_cast<double>(max) + temperature * (exponent - 1e-3);
    const float rounded = static_cast<float>(std::max(static_cast<double>(kLowest), logit));
    return std::nextafterf(std::nextafterf(rounded, kLowest), kLowest);
  };
  const float lowest_with_mass = logit_at(static_cast<double>(kMinExponent));
  const float infinity = std::numeric_limits<float>::infinity();
  float threshold = -infinity;

  if (row.top_p < 1) {
    const double total = sum_of(tile_mass, tiles);
    const double budget = static_cast<double>(row.top_p) * total;
    if (budget < 1) {
      threshold = max;  // the best alone (mass 1) exceeds it
    } else {
      // Ids of less mass than (1 - p) total / V weigh less than 1 - p all together: they lie behind the
      // nucleus.
      const double least = (1 - static_cast<double>(row.top_p)) * total / static_cast<double>(V);
      const float cutoff = std::max(lowest_with_mass, logit_at(std::log(least)));
      threshold = select_threshold({logits, mass, tile_max, V, cutoff, max}, budget, values, masses, kernels);
    }
  }
  if (row.top_k > 0 && row.top_k < V) {
    // k tiles hold an id at least as good as the k-th best maximum of a tile: nothing below that is among the
    // k best.
    float cutoff = std::max(lowest_with_mass, threshold);
    if (row.top_k <= tiles) {
      std::copy(tile_max, tile_max + tiles, tile_order);
      std::nth_element(tile_order, tile_order + row.top_k - 1, tile_order + tiles, std::greater<float>());
      cutoff = std::max(cutoff, tile_order[row.top_k - 1]);
    }
    double unused = 0;
    const int64_t n = kernels.collect(values, masses, &unused, logits, mass, tile_max, cutoff, infinity, V);
    if (n >= row.top_k) {
      std::fill(masses, masses + n, 1.0f);
      threshold =
          std::max(threshold, select_threshold({values, masses, nullptr, n, cutoff, max},
                                               static_cast<double>(row.top_k - 1), values, masses, kernels));
    }
  }
  return threshold;
}

}  // namespace

int64_t denoise_row(DenoiseStats* stats, float* watched, float* logits, const float* guide, int64_t V,
                    const DenoiseRow& row, const int32_t* watch, int64_t watch_count, float* workspace,
                    const HeadKernels& kernels) {
  const int64_t tiles = head_tiles(V), tile_floats = round_up(tiles, 16), row_floats = round_up(V, 16) + 16;
  double* tile_mass = reinterpret_cast<double*>(workspace);
  double* tile_moment = tile_mass + tile_floats;
  float* tile_max = workspace + 4 * tile_floats;
  float* mass = tile_max + tile_floats;
  float* values = mass + row_floats;
  float* masses = values + row_floats;

  const float minus_infinity = -std::numeric_limits<float>::infinity();
  if (!kernels.scan(tile_max, logits, guide, row.guidance + 1, V)) {
    int64_t id = 0;
    while (id < V - 1 && std::isfinite(logits[id])) ++id;
    return id;
  }
  // Banned ids go before the softmax: the others share their probability.
  const auto tile_begin = [](int64_t t) { return t * kTileIds; };
  const auto tile_end = [V](int64_t t) { return std::min(V, (t + 1) * kTileIds); };
  for (const int32_t banned : {row.banned, row.banned_end}) {
    if (banned < 0) continue;
    logits[banned] = minus_infinity;
    const int64_t t = banned / kTileIds;
    tile_max[t] = *std::max_element(logits + tile_begin(t), logits + tile_end(t));
  }

  const int64_t best_tile =
      std::max_element(tile_max, tile_max + tiles) - tile_max;  // the first among equals
  const float max = tile_max[best_tile];
  const int64_t best = std::find(logits + tile_begin(best_tile), logits + tile_end(best_tile), max) - logits;
  float runner_up = minus_infinity;
  for (int64_t t = 0; t < tiles; ++t) {
    if (t != best_tile) runner_up = std::max(runner_up, tile_max[t]);
  }
  for (int64_t i = tile_begin(best_tile); i < tile_end(best_tile); ++i) {
    if (i != best) runner_up = std::max(runner_up, logits[i]);
  }

  kernels.exponentiate(mass, tile_mass, tile_moment, logits, max, 1.0f, V);
  const double total = sum_of(tile_mass, tiles), log_total = std::log(total);
  const auto exponent = [&](float logit) { return static_cast<double>(logit) - static_cast<double>(max); };
  stats->best = static_cast<int32_t>(best);
  stats->probability = static_cast<float>(1 / total);
  stats->margin = static_cast<float>(-std::expm1(exponent(runner_up)) / total);
  stats->entropy = static_cast<float>(std::max(0.0, log_total - sum_of(tile_moment, tiles) / total));
  stats->divergence = 0;
  if (row.keep != nullptr) {
    const double sum =
        kernels.diverge(row.keep, row.before, logits, mass, max, static_cast<float>(log_total), V);
    // Rounding may leave a tiny negative sum.
    stats->divergence =
        row.before != nullptr ? static_cast<float>(std::max(0.0, sum / total)) : -minus_infinity;
  }
  for (int64_t w = 0; w < watch_count; ++w) {
    watched[w] = static_cast<float>(std::exp(exponent(logits[watch[w]])) / total);
  }

  int64_t drawn = best;
  if (row.temperature > 0) {
    if (row.temperature != 1) {
      // 1 / temperature is capped so that it stays finite: the best keeps the exponent 0 and never 0 * inf.
      const float scale = std::min(1 / row.temperature, std::numeric_limits<float>::max());
      kernels.exponentiate(mass, tile_mass, nullptr, logits, max, scale, V);
    }
    const float threshold = filter_threshold(row, logits, V, max, tile_max, mass, tile_mass, values, masses,
                                             reinterpret_cast<float*>(tile_moment), kernels);
    if (threshold > minus_infinity) kernels.keep_above(mass, tile_mass, logits, tile_max, threshold, V);
    drawn = draw_from(mass, tile_mass, V, uniform(row.seed, Stream::kDraw, row.step, row.position));
  }
  stats->drawn = static_cast<int32_t>(drawn);
  stats->drawn_log_prob = static_cast<float>(exponent(logits[drawn]) - log_total);
  return -1;
}

}  // namespace dn::cpu
