// The head's row kernels in vectors, included once by head_avx2.cpp and once by head_avx512.cpp. Meaning:
// head_kernels.h.
#include "cpu/head_kernels.h"
#include "cpu/simd.inl"

namespace dn::cpu {
namespace {

using simd::kLanes;
using simd::Mask;
using simd::Vec;

// The sum of the vectors of a tile: 16 or 32 additions a lane in fp32, the lanes together in double.
struct TileSum {
  Vec lanes = simd::zero();

  void add(Vec v) { lanes = simd::add(lanes, v); }
#if defined(__AVX512F__)
  double total() const {
    const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(lanes));
    const __m512d high =
        _mm512_cvtps_pd(_mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(lanes), 1)));
    return _mm512_reduce_add_pd(_mm512_add_pd(low, high));
  }
#else
  double total() const {
    const __m256d s = _mm256_add_pd(_mm256_cvtps_pd(_mm256_castps256_ps128(lanes)),
                                    _mm256_cvtps_pd(_mm256_extractf128_ps(lanes, 1)));
    const __m128d a = _mm_add_pd(_mm256_castpd256_pd128(s), _mm256_extractf128_pd(s, 1));
    return _mm_cvtsd_f64(_mm_add_sd(a, _mm_unpackhi_pd(a, a)));
  }
#endif
};

// sum + (v < cut ? 0 : m)
#if defined(__AVX512F__)
inline Vec add_unless_less(Vec sum, Vec v, Vec cut, Vec m) {
  return _mm512_mask_add_ps(sum, _mm512_cmp_ps_mask(v, cut, _CMP_NLT_UQ), sum, m);
}
#else
inline Vec add_unless_less(Vec sum, Vec v, Vec cut, Vec m) {
  return _mm256_add_ps(sum, _mm256_andnot_ps(simd::less(v, cut), m));
}
#endif

// Calls f(offset, lanes) for the vectors of one tile; only the last of a row has fewer than kLanes lanes.
template <typename F>
inline void for_vectors(int64_t begin, int64_t n, F f) {
  const int64_t end = begin + kTileIds < n ? begin + kTileIds : n;
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) f(i, kLanes);
  if (i < end) f(i, static_cast<int>(end - i));
}

// The lambdas below take whole vectors apart from the tail, so that the main loops carry no masks.
inline Vec load_lanes(const float* p, int lanes) {
  return lanes == kLanes ? simd::load(p) : simd::load_n(p, lanes);
}
inline void store_lanes(float* p, Vec v, int lanes) {
  if (lanes == kLanes) {
    simd::store(p, v);
  } else {
    simd::store_n(p, v, lanes);
  }
}

bool scan(float* tile_max, float* x, const float* guide, float guide_scale, int64_t n) {
  const Vec scale = simd::set1(guide_scale), lowest = simd::set1(-simd::kInfinity);
  Vec poison = simd::zero();  // 0 * x is 0 for finite x and NaN otherwise; NaN stays
  for (int64_t begin = 0; begin < n; begin += kTileIds) {
    Vec max = lowest;
    for_vectors(begin, n, [&](int64_t i, int lanes) {
      Vec v = load_lanes(x + i, lanes);
      if (guide != nullptr) {
        const Vec u = load_lanes(guide + i, lanes);
        v = simd::fma(scale, simd::sub(v, u), u);
        store_lanes(x + i, v, lanes);
      }
      poison = simd::fma(v, simd::zero(), poison);
      if (lanes < kLanes) v = simd::select(simd::first_lanes(lanes), v, lowest);
      max = simd::max(max, v);
    });
    tile_max[begin / kTileIds] = simd::reduce_max(max);
  }
  return simd::reduce_add(poison) == 0.0f;
}

void exponentiate(float* mass, double* tile_mass, double* tile_moment, const float* x, float max, float scale,
                  int64_t n) {
  const Vec top = simd::set1(max), factor = simd::set1(scale), least = simd::set1(kMinExponent);
  for (int64_t begin = 0; begin < n; begin += kTileIds) {
    TileSum sum, moment;
    for_vectors(begin, n, [&](int64_t i, int lanes) {
      const Vec z = simd::mul(simd::sub(load_lanes(x + i, lanes), top), factor);
      Vec e = simd::softmax_exp(z);  // 0 below kMinExponent
      if (lanes < kLanes) e = simd::select(simd::first_lanes(lanes), e, simd::zero());
      store_lanes(mass + i, e, lanes);
      sum.add(e);
      // z finite, or 0 * -inf would be NaN.
      if (tile_moment != nullptr) moment.lanes = simd::fma(e, simd::max(z, least), moment.lanes);
    });
    tile_mass[begin / kTileIds] = sum.total();
    if (tile_moment != nullptr) tile_moment[begin / kTileIds] = moment.total();
  }
}

// Whether no id of the tile that begins at `begin` reaches `least`.
inline bool is_below(const float* tile_max, int64_t begin, float least) {
  return tile_max != nullptr && tile_max[begin / kTileIds] < least;
}

void keep_above(float* mass, double* tile_mass, const float* x, const float* tile_max, float threshold,
                int64_t n) {
  const Vec least = simd::set1(threshold);
  for (int64_t begin = 0; begin < n; begin += kTileIds) {
    TileSum sum;
    if (!is_below(tile_max, begin, threshold)) {
      for_vectors(begin, n, [&](int64_t i, int lanes) {
        const Vec below = load_lanes(x + i, lanes);
        const Vec e = simd::select(simd::less(below, least), simd::zero(), load_lanes(mass + i, lanes));
        store_lanes(mass + i, e, lanes);
        sum.add(e);
      });
    }
    tile_mass[begin / kTileIds] = sum.total();
  }
}

int64_t collect(float* values, float* masses, double* above, const float* x, const float* mass,
                const float* tile_max, float low, float high, int64_t n) {
  const Vec least = simd::set1(low), end = simd::set1(high);
  int64_t count = 0;
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += kTileIds) {
    if (is_below(tile_max, begin, low)) continue;
    TileSum sum;
    for_vectors(begin, n, [&](int64_t i, int lanes) {
      const Vec v = load_lanes(x + i, lanes), m = load_lanes(mass + i, lanes);  // masses past the end are 0
      const Mask below_end = simd::less(v, end);
      sum.add(simd::select(below_end, simd::zero(), m));
      uint32_t wanted =
          ~simd::bits_of_lanes(simd::less(v, least)) & simd::bits_of_lanes(below_end) & ((1u << lanes) - 1u);
      if (wanted == 0) return;
#if defined(__AVX512F__)
      const Mask mask = simd::lanes_of_bits(wanted);
      simd::store(values + count, _mm512_maskz_compress_ps(mask, v));
      simd::store(masses + count, _mm512_maskz_compress_ps(mask, m));
      count += __builtin_popcount(wanted);
#else
      for (; wanted != 0; wanted &= wanted - 1) {
        const int64_t k = i + __builtin_ctz(wanted);
        values[count] = x[k];
        masses[count] = mass[k];
        ++count;
      }
#endif
    });
    total += sum.total();
  }
  *above = total;
  return count;
}

void bounds(float* least, float* greatest, const float* x, int64_t n) {
  Vec low = simd::set1(x[0]), high = low;
  for (int64_t i = 0; i < n; i += kLanes) {
    Vec v = load_lanes(x + i, n - i < kLanes ? static_cast<int>(n - i) : kLanes);
    if (n - i < kLanes) v = simd::select(simd::first_lanes(static_cast<int>(n - i)), v, simd::set1(x[0]));
    low = simd::min(low, v);
    high = simd::max(high, v);
  }
  *least = -simd::reduce_max(simd::sub(simd::zero(), low));
  *greatest = simd::reduce_max(high);
}

void mass_above(double* sums, const float* cuts, const float* x, const float* mass, const float* tile_max,
                int64_t n) {
  Vec cut[kCuts];
  for (int c = 0; c < kCuts; ++c) {
    cut[c] = simd::set1(cuts[c]);
    sums[c] = 0;
  }
  for (int64_t begin = 0; begin < n; begin += kTileIds) {
    if (is_below(tile_max, begin, cuts[kCuts - 1])) continue;
    TileSum sum[kCuts];
    for_vectors(begin, n, [&](int64_t i, int lanes) {
      const Vec v = load_lanes(x + i, lanes), m = load_lanes(mass + i, lanes);
#pragma GCC unroll 8
      for (int c = 0; c < kCuts; ++c) sum[c].lanes = add_unless_less(sum[c].lanes, v, cut[c], m);
    });
    for (int c = 0; c < kCuts; ++c) sums[c] += sum[c].total();
  }
}

double diverge(float* keep, const float* before, const float* x, const float* mass, float max,
               float log_total, int64_t n) {
  const Vec top = simd::set1(max), shift = simd::set1(log_total);
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += kTileIds) {
    TileSum sum;
    for_vectors(begin, n, [&](int64_t i, int lanes) {
      const Vec l = simd::sub(simd::sub(load_lanes(x + i, lanes), top), shift);
      store_lanes(keep + i, l, lanes);
      if (before != nullptr) {
        const Vec m = load_lanes(mass + i, lanes);
        const Vec part = simd::mul(m, simd::sub(l, load_lanes(before + i, lanes)));
        sum.add(simd::select(simd::less(simd::zero(), m), part, simd::zero()));  // -inf - -inf is NaN
      }
    });
    total += sum.total();
  }
  return total;
}

}  // namespace
}  // namespace dn::cpu
