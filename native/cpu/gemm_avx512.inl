// What the AVX-512 and AMX sources of the matrix product share: masks, a 16 x 16 transpose, and the finish of
// a tile (bias, GELU, residual). Included after immintrin.h; everything has internal linkage.

#include "cpu/gemm_kernels.h"

// GCC 12 takes the deliberately undefined operands inside its own intrinsics for mistakes.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

namespace dn::cpu {
namespace {

// The first n of 16 lanes; none when n <= 0, all when n >= 16.
__mmask16 lanes(int64_t n) {
  return n >= 16  ? static_cast<__mmask16>(0xffff)
         : n <= 0 ? static_cast<__mmask16>(0)
                  : static_cast<__mmask16>((1u << n) - 1);
}

// Transposes 16 x 16 elements of 32 bits in place.
__attribute__((always_inline)) inline void transpose_16x16(__m512i* x) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {  // pairs of rows
    t[2 * i] = _mm512_unpacklo_epi32(x[2 * i], x[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(x[2 * i], x[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4;
       ++i) {  // fours: x[4i + j] holds column 4l + j of rows 4i .. 4i + 3 in 128-bit lane l
    x[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    x[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    x[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    x[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {  // a 4 x 4 transpose of the lanes of x[j], x[4 + j], x[8 + j], x[12 + j]
    const __m512i a = _mm512_shuffle_i32x4(x[j], x[4 + j], 0x44),
                  b = _mm512_shuffle_i32x4(x[j], x[4 + j], 0xee);
    const __m512i c = _mm512_shuffle_i32x4(x[8 + j], x[12 + j], 0x44);
    const __m512i d = _mm512_shuffle_i32x4(x[8 + j], x[12 + j], 0xee);
    t[j] = _mm512_shuffle_i32x4(a, c, 0x88);
    t[4 + j] = _mm512_shuffle_i32x4(a, c, 0xdd);
    t[8 + j] = _mm512_shuffle_i32x4(b, d, 0x88);
    t[12 + j] = _mm512_shuffle_i32x4(b, d, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) x[i] = t[i];
}

// exp(x) within 2 ulp for x in [-87, 88], infinity above 89, no less than exp(-87); NaN stays.
// exp(x) = 2^n exp(r), n = round(x / ln 2), |r| <= ln 2 / 2, exp(r) by its Taylor polynomial of degree 7.
__m512 exp_lanes(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-87.0f),
                    _mm512_min_ps(_mm512_set1_ps(100.0f), x));  // NaN: the second operand
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);  // ln 2 in two parts
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.0f / 5040);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 720));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 120));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 24));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 6));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.5f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, n);
}

// tanh form: 0.5 u (1 + tanh z) = u / (1 + exp(-2z)), z = sqrt(2/pi) (u + 0.044715 u^3).
__m512 gelu_lanes(__m512 u) {
  const __m512 cubic = _mm512_fmadd_ps(_mm512_mul_ps(u, u), _mm512_set1_ps(0.044715f), _mm512_set1_ps(1.0f));
  const __m512 x = _mm512_mul_ps(_mm512_mul_ps(u, cubic), _mm512_set1_ps(-1.5957691216f));
  const __m512 below = _mm512_add_ps(_mm512_set1_ps(1.0f), exp_lanes(x));
  // A reciprocal from 14 bits and a Newton step, half the time of a division; it wants a normal result, and
  // beyond 87 the quotient is nothing. NaN stays.
  const __m512 rough = _mm512_rcp14_ps(below);
  const __m512 inverse = _mm512_fmadd_ps(rough, _mm512_fnmadd_ps(below, rough, _mm512_set1_ps(1.0f)), rough);
  return _mm512_maskz_mul_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(87.0f), _CMP_NGT_UQ), u, inverse);
}

// The tile that `src` holds, finished and written to f.c.
__attribute__((always_inline)) inline void finish_from(const float* src, int64_t src_stride,
                                                       const GemmFinish& f) {
  const __mmask16 masks[2] = {lanes(f.cols), lanes(f.cols - 16)};
  const int vectors = f.cols > 16 ? 2 : 1;
  __m512 bias[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  for (int v = 0; f.bias && v < vectors; ++v) bias[v] = _mm512_maskz_loadu_ps(masks[v], f.bias + v * 16);
  for (int64_t r = 0; r < f.rows; ++r) {
    for (int v = 0; v < vectors; ++v) {
      const __mmask16 m = masks[v];
      const int64_t extra = r * f.extra_stride + v * 16;
      __m512 value = _mm512_maskz_loadu_ps(m, src + r * src_stride + v * 16);
      if (f.bias) value = _mm512_add_ps(value, bias[v]);
      if (f.pre) _mm512_mask_storeu_ps(f.pre + extra, m, value);
      if (f.gelu) value = gelu_lanes(value);
      if (f.residual) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(m, f.residual + extra));
      _mm512_mask_storeu_ps(f.c + r * f.c_stride + v * 16, m, value);
    }
  }
}

}  // namespace
}  // namespace dn::cpu
