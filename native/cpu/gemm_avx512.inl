// What the AVX-512 and AMX sources of matrix products share: masks, a 16 x 16 transpose, and the finish of a
// tile (bias, GELU, residual), from registers and from memory. Included after immintrin.h; everything has
// internal linkage.

#include "cpu/gemm_kernels.h"
#include "cpu/simd.inl"

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

// tanh form: 0.5 u (1 + tanh z) = u / (1 + exp(-2z)), z = sqrt(2/pi) (u + 0.044715 u^3). The exponential is
// taken in base 2. NaN stays.
__m512 gelu_lanes(__m512 u) {
  const __m512 slope =
      _mm512_fmadd_ps(_mm512_mul_ps(u, u), _mm512_set1_ps(-0.102943240f), _mm512_set1_ps(-2.30220819f));
  const __m512 x = _mm512_max_ps(_mm512_set1_ps(-126.0f), _mm512_mul_ps(u, slope));  // NaN: the second
  const simd::ExpParts e = simd::exp2_parts(x);
  const __m512 below = _mm512_add_ps(_mm512_set1_ps(1.0f), _mm512_scalef_ps(e.fraction, e.n));
  // A reciprocal from 14 bits and a Newton step, half the time of a division; it wants a normal result, and
  // beyond 126 the quotient is nothing.
  const __m512 rough = _mm512_rcp14_ps(below);
  const __m512 inverse = _mm512_fmadd_ps(rough, _mm512_fnmadd_ps(below, rough, _mm512_set1_ps(1.0f)), rough);
  return _mm512_maskz_mul_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(126.0f), _CMP_NGT_UQ), u, inverse);
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

// What a tile does with its sums while they are in registers: everything but GELU, which needs the registers
// for itself and takes the cells from memory.
struct RowWriter {
  float* c;
  int64_t c_stride;
  __mmask16 m0, m1;
  __m512 bias0, bias1;
  bool has_bias;
  const float* residual;  // or null
  int64_t residual_stride;
  const GemmFinish* from_memory;  // or null

  __attribute__((always_inline)) void write(int64_t r, __m512 v0, __m512 v1) const {
    if (has_bias) {
      v0 = _mm512_add_ps(v0, bias0);
      v1 = _mm512_add_ps(v1, bias1);
    }
    if (residual) {
      v0 = _mm512_add_ps(v0, _mm512_maskz_loadu_ps(m0, residual + r * residual_stride));
      v1 = _mm512_add_ps(v1, _mm512_maskz_loadu_ps(m1, residual + r * residual_stride + 16));
    }
    _mm512_mask_storeu_ps(c + r * c_stride, m0, v0);
    _mm512_mask_storeu_ps(c + r * c_stride + 16, m1, v1);
  }
  // After the last row.
  __attribute__((always_inline)) void end() const {
    if (from_memory) finish_from(c, c_stride, *from_memory);
  }
};

__attribute__((always_inline)) inline RowWriter row_writer(float* c, int64_t c_stride, int64_t cols,
                                                           const GemmFinish* f) {
  RowWriter w = {c,     c_stride, lanes(cols), lanes(cols - 16), _mm512_setzero_ps(), _mm512_setzero_ps(),
                 false, nullptr,  0,           nullptr};
  if (f && f->gelu) {
    w.from_memory = f;
  } else if (f) {
    w.has_bias = f->bias != nullptr;
    if (f->bias) {
      w.bias0 = _mm512_maskz_loadu_ps(w.m0, f->bias);
      w.bias1 = _mm512_maskz_loadu_ps(w.m1, f->bias + 16);
    }
    w.residual = f->residual;
    w.residual_stride = f->extra_stride;
  }
  return w;
}

}  // namespace
}  // namespace dn::cpu
