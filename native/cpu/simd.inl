// A thin wrapper over one vector of floats: eight lanes when compiled for AVX2 + FMA, sixteen for AVX-512F,
// chosen by the compiler's target. Vector kernels (*.inl) are written once against it and compiled once per
// instruction set.
//
// Everything lives in an anonymous namespace and only C headers are included: a function with external
// linkage compiled for AVX could be the copy the linker keeps for machines that lack it.
//
// Rounding: all products that are added use fma explicitly, so that two pieces of code that do the same
// operations in the same order give the same bits.
#pragma once

// GCC 12 warns of its own header: _mm512_undefined_ps is, on purpose, not initialised.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif
#include <stddef.h>
#include <stdint.h>

// Before a loop whose count is known: unrolled whole, up to 16 times.
#if defined(__clang__)
#define DN_UNROLL _Pragma("unroll")
#elif defined(__GNUC__)
#define DN_UNROLL _Pragma("GCC unroll 16")
#else
#define DN_UNROLL
#endif

namespace dn::cpu {
namespace {
namespace simd {

constexpr float kInfinity = __builtin_huge_valf();

// The cache line of p, wanted in L2: to be read, or to be written. Inlined by force, as must be what calls
// them: GCC 12 takes a function that only prefetches for one without effects and drops its calls.
__attribute__((always_inline)) inline void prefetch(const float* p) {
  _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T1);
}
__attribute__((always_inline)) inline void prefetch_to_write(const float* p) { __builtin_prefetch(p, 1, 2); }

#if defined(__AVX512F__)

using Vec = __m512;
using Mask = __mmask16;
constexpr int kLanes = 16;

inline Vec zero() { return _mm512_setzero_ps(); }
inline Vec set1(float x) { return _mm512_set1_ps(x); }
inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
inline void stream(float* p, Vec v) { _mm512_stream_ps(p, v); }  // past the caches; p aligned
// The lanes [0, n); n in [0, kLanes].
inline Mask first_lanes(int n) { return static_cast<Mask>((1u << n) - 1u); }
// Lane i is on when bit i is set.
inline Mask lanes_of_bits(uint32_t bits) { return static_cast<Mask>(bits); }
// Lanes that are off read as zero and touch no memory.
inline Vec load(const float* p, Mask m) { return _mm512_maskz_loadu_ps(m, p); }
inline void store(float* p, Vec v, Mask m) { _mm512_mask_storeu_ps(p, m, v); }

inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
inline Vec sqrt(Vec a) { return _mm512_sqrt_ps(a); }
// When one operand is NaN the result is b, as the instruction does.
inline Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }    // a b + c
inline Vec fms(Vec a, Vec b, Vec c) { return _mm512_fmsub_ps(a, b, c); }    // a b - c
inline Vec fnma(Vec a, Vec b, Vec c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a b
inline Mask less(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
inline Mask equal(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
inline uint32_t bits_of_lanes(Mask m) { return m; }
// m ? a : b
inline Vec select(Mask m, Vec a, Vec b) { return _mm512_mask_blend_ps(m, b, a); }
inline Vec abs(Vec a) { return _mm512_abs_ps(a); }
// a 2^n for integral n in [-160, 160], correctly rounded in the subnormal range and infinite above it.
inline Vec scale_by_power(Vec a, Vec n) { return _mm512_scalef_ps(a, n); }
// x = m 2^e with m in [1/2, 1), for positive finite x, subnormals included.
inline Vec split_exponent(Vec x, Vec* e) {
  *e = _mm512_add_ps(_mm512_getexp_ps(x), _mm512_set1_ps(1.0f));
  return _mm512_getmant_ps(x, _MM_MANT_NORM_p5_1, _MM_MANT_SIGN_zero);
}
// 1 / a within 1 ulp for a and 1 / a normal numbers: an estimate of 14 bits and a Newton step, half the time
// of a division.
inline Vec reciprocal(Vec a) {
  const Vec y = _mm512_rcp14_ps(a);
  return _mm512_fmadd_ps(y, _mm512_fnmadd_ps(a, y, _mm512_set1_ps(1.0f)), y);
}
inline float reduce_add(Vec v) { return _mm512_reduce_add_ps(v); }
inline float reduce_max(Vec v) { return _mm512_reduce_max_ps(v); }

// A running sum of squares in double, one partial sum for each lane.
struct SquareSum {
  __m512d low = _mm512_setzero_pd();
  __m512d high = _mm512_setzero_pd();
  void add(Vec v) {
    const __m512d a = _mm512_cvtps_pd(_mm512_castps512_ps256(v));
    const __m512d b = _mm512_cvtps_pd(_mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v), 1)));
    low = _mm512_fmadd_pd(a, a, low);
    high = _mm512_fmadd_pd(b, b, high);
  }
  double total() const { return _mm512_reduce_add_pd(_mm512_add_pd(low, high)); }
};

#else  // AVX2 and FMA

using Vec = __m256;
using Mask = __m256;  // all bits of a lane on, or none
constexpr int kLanes = 8;

inline Vec zero() { return _mm256_setzero_ps(); }
inline Vec set1(float x) { return _mm256_set1_ps(x); }
inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
inline void stream(float* p, Vec v) { _mm256_stream_ps(p, v); }
inline Mask first_lanes(int n) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane));
}
inline Mask lanes_of_bits(uint32_t bits) {
  const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i on = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), bit);
  return _mm256_castsi256_ps(_mm256_cmpeq_epi32(on, bit));
}
inline Vec load(const float* p, Mask m) { return _mm256_maskload_ps(p, _mm256_castps_si256(m)); }
inline void store(float* p, Vec v, Mask m) { _mm256_maskstore_ps(p, _mm256_castps_si256(m), v); }

inline Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
inline Vec sqrt(Vec a) { return _mm256_sqrt_ps(a); }
inline Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
inline Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline Vec fms(Vec a, Vec b, Vec c) { return _mm256_fmsub_ps(a, b, c); }
inline Vec fnma(Vec a, Vec b, Vec c) { return _mm256_fnmadd_ps(a, b, c); }
inline Mask less(Vec a, Vec b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
inline Mask equal(Vec a, Vec b) { return _mm256_cmp_ps(a, b, _CMP_EQ_OQ); }
inline uint32_t bits_of_lanes(Mask m) { return static_cast<uint32_t>(_mm256_movemask_ps(m)); }
inline Vec select(Mask m, Vec a, Vec b) { return _mm256_blendv_ps(b, a, m); }
inline Vec abs(Vec a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
inline Vec scale_by_power(Vec a, Vec n) {
  // In two halves: 2^n itself may be out of range. Only the second product can round.
  const __m256i whole = _mm256_cvtps_epi32(n);
  const __m256i half = _mm256_srai_epi32(whole, 1);
  const __m256i rest = _mm256_sub_epi32(whole, half);
  const __m256i bias = _mm256_set1_epi32(127);
  const Vec p = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23));
  const Vec q = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23));
  return mul(mul(a, p), q);
}
inline Vec split_exponent(Vec x, Vec* e) {
  // Subnormals are first scaled by 2^24.
  const Mask tiny = less(x, set1(1.17549435e-38f));
  const __m256i bits = _mm256_castps_si256(select(tiny, mul(x, set1(16777216.0f)), x));
  const Vec exponent =
      _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_srli_epi32(bits, 23), _mm256_set1_epi32(126)));
  *e = sub(exponent, select(tiny, set1(24.0f), zero()));
  const __m256i mantissa = _mm256_and_si256(bits, _mm256_set1_epi32(0x007FFFFF));
  return _mm256_castsi256_ps(_mm256_or_si256(mantissa, _mm256_set1_epi32(0x3F000000)));
}
inline Vec reciprocal(Vec a) { return _mm256_div_ps(_mm256_set1_ps(1.0f), a); }
inline float reduce_add(Vec v) {
  __m128 a = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  a = _mm_add_ps(a, _mm_movehl_ps(a, a));
  return _mm_cvtss_f32(_mm_add_ss(a, _mm_movehdup_ps(a)));
}
inline float reduce_max(Vec v) {
  __m128 a = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  a = _mm_max_ps(a, _mm_movehl_ps(a, a));
  return _mm_cvtss_f32(_mm_max_ss(a, _mm_movehdup_ps(a)));
}

struct SquareSum {
  __m256d low = _mm256_setzero_pd();
  __m256d high = _mm256_setzero_pd();
  void add(Vec v) {
    const __m256d a = _mm256_cvtps_pd(_mm256_castps256_ps128(v));
    const __m256d b = _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1));
    low = _mm256_fmadd_pd(a, a, low);
    high = _mm256_fmadd_pd(b, b, high);
  }
  double total() const {
    const __m256d s = _mm256_add_pd(low, high);
    const __m128d a = _mm_add_pd(_mm256_castpd256_pd128(s), _mm256_extractf128_pd(s, 1));
    return _mm_cvtsd_f64(_mm_add_sd(a, _mm_unpackhi_pd(a, a)));
  }
};

#endif

// Orders streamed stores before what follows, as other threads see it.
inline void stream_end() { _mm_sfence(); }

// The first n lanes, the others zero.
inline Vec load_n(const float* p, int n) { return load(p, first_lanes(n)); }
inline void store_n(float* p, Vec v, int n) { store(p, v, first_lanes(n)); }

// e^x = 2^n e^r with x = n ln 2 + r; e^r = 1 + r + r^2 P(r) with a minimax P. For |x| < 2^20.
struct ExpParts {
  Vec fraction;  // e^r, or 2^r
  Vec shifted;   // n + kRound: n is also in its low mantissa bits
  Vec n;
};
constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer

#if !defined(__AVX512F__)
// fraction * 2^n where that is normal, by integer addition, which must not touch the bits of NaN.
inline Vec add_exponent(const ExpParts& e) {
  const __m256i ordered = _mm256_castps_si256(_mm256_cmp_ps(e.shifted, e.shifted, _CMP_ORD_Q));
  const __m256i power = _mm256_and_si256(ordered, _mm256_slli_epi32(_mm256_castps_si256(e.shifted), 23));
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(e.fraction), power));
}
#endif

inline ExpParts exp_parts(Vec x) {
  ExpParts e;
  e.shifted = fma(x, set1(1.44269504f), set1(kRound));
  e.n = sub(e.shifted, set1(kRound));
  Vec r = fnma(e.n, set1(0.693359375f), x);  // ln 2 in two parts
  r = fnma(e.n, set1(-2.12194440e-4f), r);
  Vec p = set1(1.38131444e-3f);
  p = fma(p, r, set1(8.36941885e-3f));
  p = fma(p, r, set1(4.16684568e-2f));
  p = fma(p, r, set1(1.66665148e-1f));
  p = fma(p, r, set1(4.99999931e-1f));
  p = fma(p, r, set1(1.0f));
  e.fraction = fma(p, r, set1(1.0f));
  return e;
}

// e^x over the whole range: within about 1 ulp where the result is normal, exactly 1 at 0, 0 below -104 and
// at -inf, inf above 88.8, NaN for NaN.
inline Vec exp(Vec x) {
  const ExpParts e = exp_parts(max(set1(-105.0f), min(set1(90.0f), x)));  // in this order NaN passes through
  return scale_by_power(e.fraction, e.n);
}

// The same for x < 88 or NaN, in fewer instructions. Exactly 0 at -inf; what would be subnormal may be 0.
inline Vec softmax_exp(Vec x) {
#if defined(__AVX512F__)
  // Lanes below -87 are switched off rather than left to underflow, which takes a slow microcode path.
  const Mask on = _mm512_cmp_ps_mask(x, set1(-87.0f), _CMP_NLT_UQ);
  const ExpParts e = exp_parts(x);
  return _mm512_maskz_scalef_ps(on, e.fraction, e.n);
#else
  const ExpParts e = exp_parts(max(set1(-87.0f), x));
  return _mm256_andnot_ps(less(x, set1(-87.0f)), add_exponent(e));
#endif
}

// 2^x = 2^n 2^r with n = round(x), |r| <= 1/2: within 2.1 ulp, exactly 1 at 0. 2^r by a minimax polynomial of
// degree 5.
inline ExpParts exp2_parts(Vec x) {
  ExpParts e;
  e.shifted = add(x, set1(kRound));
  e.n = sub(e.shifted, set1(kRound));
  const Vec r = sub(x, e.n);
  Vec p = set1(1.32647273e-3f);
  p = fma(p, r, set1(9.67151279e-3f));
  p = fma(p, r, set1(5.55073374e-2f));
  p = fma(p, r, set1(2.40222421e-1f));
  p = fma(p, r, set1(6.93146978e-1f));
  e.fraction = fma(p, r, set1(1.0f));
  return e;
}

// 2^x for x < 128 or NaN, for the probabilities of a softmax: 0 where the result would be subnormal.
inline Vec softmax_exp2(Vec x) {
  const Vec least = set1(-126.0f);
#if defined(__AVX512F__)
  const Mask on = _mm512_cmp_ps_mask(x, least, _CMP_NLT_UQ);
  const ExpParts e = exp2_parts(x);
  return _mm512_maskz_scalef_ps(on, e.fraction, e.n);
#else
  const ExpParts e = exp2_parts(max(least, x));  // in this order NaN passes through
  return _mm256_andnot_ps(less(x, least), add_exponent(e));
#endif
}

// Natural logarithm within 1 ulp, subnormals included: -inf at 0, inf at inf, NaN below 0 and for NaN.
// x = m 2^e with m in [sqrt 1/2, sqrt 2), f = m - 1, log(1 + f) = f - f^2 / 2 + f^3 Q(f) with a minimax Q.
inline Vec log(Vec x) {
  Vec e;
  Vec m = split_exponent(x, &e);
  const Mask small = less(m, set1(0.707106781f));
  m = select(small, add(m, m), m);
  e = select(small, sub(e, set1(1.0f)), e);
  const Vec f = sub(m, set1(1.0f));
  Vec q = set1(-7.63449302e-2f);
  q = fma(q, f, set1(1.27615756e-1f));
  q = fma(q, f, set1(-1.31601831e-1f));
  q = fma(q, f, set1(1.42017582e-1f));
  q = fma(q, f, set1(-1.66233573e-1f));
  q = fma(q, f, set1(2.00012269e-1f));
  q = fma(q, f, set1(-2.50008210e-1f));
  q = fma(q, f, set1(3.33333317e-1f));
  const Vec square = mul(f, f);
  // The small terms first: e ln2_low + f^3 Q - f^2 / 2, then f, then e ln2_high.
  Vec y = fma(e, set1(-2.12194440e-4f), mul(mul(square, f), q));
  y = fnma(set1(0.5f), square, y);
  y = fma(e, set1(0.693359375f), add(y, f));
  const Vec infinity = set1(kInfinity);
  y = select(less(x, infinity), y, x);  // inf and NaN
  y = select(less(x, zero()), set1(__builtin_nanf("")), y);
  return select(equal(x, zero()), set1(-kInfinity), y);
}

// The tanh form of GELU as a logistic: u (1 + tanh y) / 2 = u / (1 + e^{-2y}), y = sqrt(2 / pi) (u + 0.044715
// u^3). No cancellation for negative u. gelu_slope is its derivative.
inline Vec gelu_logit(Vec u) {  // 2 y
  const Vec s = fma(mul(u, u), set1(0.0713548163f), set1(1.59576912f));
  return mul(u, s);
}
inline Vec gelu(Vec u) {
  const Vec opposite = sub(zero(), gelu_logit(u));
  const Vec quotient = div(u, add(set1(1.0f), exp(opposite)));
  return select(less(set1(88.0f), opposite), zero(), quotient);  // of -inf, too
}
// s + u s (1 - s) d(2y)/du, where s = 1 / (1 + e) is the logistic of 2y and 1 - s = e s keeps its digits.
inline Vec gelu_slope(Vec u) {
  u = max(set1(-1e4f), min(set1(1e4f), u));  // 0 and 1 beyond, where the square would overflow; NaN passes
  const Vec e = exp(min(set1(87.0f), sub(zero(), gelu_logit(u))));
  const Vec s = reciprocal(add(set1(1.0f), e));
  const Vec d = fma(mul(u, u), set1(0.214064449f), set1(1.59576912f));  // d(2y)/du
  return fma(mul(u, d), mul(s, mul(e, s)), s);
}

}  // namespace simd
}  // namespace
}  // namespace dn::cpu
