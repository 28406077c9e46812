// What the AVX-512 and AMX sources of matrix products share: masks, a 16 x 16 transpose, and the finish of a
// tile (bias, GELU, residual), from registers and from memory. Included after immintrin.h; everything has
// internal linkage.

#pragma once

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
inline __m512 gelu_lanes(__m512 u) {
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

struct FormulaGelu {
  __m512 operator()(__m512 u) const { return gelu_lanes(u); }
};

// The tile whose rows lie at src, finished and written to C: bias, then pre and GELU, then residual. kWhole:
// rows of src are whole vectors, wherever those of C end.
template <bool kWhole, typename Gelu>
__attribute__((always_inline)) inline void finish_from(const float* src, int64_t src_stride,
                                                       const GemmFinish& finish, const Gelu& gelu) {
  const GemmFinish f = finish;  // a copy that no store can change
  const __mmask16 masks[2] = {lanes(f.cols), lanes(f.cols - 16)};
  __m512 bias[2] = {_mm512_set1_ps(-0.0f), _mm512_set1_ps(-0.0f)};  // what changes no number
  if (f.bias) {
    bias[0] = _mm512_maskz_loadu_ps(masks[0], f.bias);
    bias[1] = _mm512_maskz_loadu_ps(masks[1], f.bias + 16);
  }
  for (int64_t r = 0; r < f.rows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      const __mmask16 m = masks[v];
      const float* const from = src + r * src_stride + v * 16;
      const int64_t extra = r * f.extra_stride + v * 16;
      __m512 value = _mm512_add_ps(kWhole ? _mm512_loadu_ps(from) : _mm512_maskz_loadu_ps(m, from), bias[v]);
      if (__builtin_expect(f.pre != nullptr, 0)) _mm512_mask_storeu_ps(f.pre + extra, m, value);
      if (__builtin_expect(f.gelu, 1)) value = gelu(value);
      if (__builtin_expect(f.residual != nullptr, 0))
        value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(m, f.residual + extra));
      _mm512_mask_storeu_ps(f.c + r * f.c_stride + v * 16, m, value);
    }
  }
}

// Rows of C written from registers, with bias and residual.
struct RowWriter {
  float* c;
  int64_t c_stride;
  __mmask16 m0, m1;
  __m512 bias0, bias1;
  bool has_bias;
  const float* residual;  // or null
  int64_t residual_stride;

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
};

__attribute__((always_inline)) inline RowWriter row_writer(float* c, int64_t c_stride, int64_t cols,
                                                           const GemmFinish* f) {
  const __mmask16 m0 = lanes(cols), m1 = lanes(cols - 16);
  const bool has_bias = f && f->bias;
  const __m512 bias0 = has_bias ? _mm512_maskz_loadu_ps(m0, f->bias) : _mm512_setzero_ps();
  const __m512 bias1 = has_bias ? _mm512_maskz_loadu_ps(m1, f->bias + 16) : _mm512_setzero_ps();
  return {c, c_stride, m0, m1, bias0, bias1, has_bias, f ? f->residual : nullptr, f ? f->extra_stride : 0};
}

// What a tile does with its sums, value(row, vector), and what f, or null, says of them. GELU needs the
// registers for itself: the cells wait in memory of the tile's own, since rows of C, often some KB apart,
// fall into the same few sets of L1 and would push each other out. They are stored whole, which a load right
// after finds sooner than what a mask has let through.
template <int kRows, typename Gelu = FormulaGelu, typename Value>
__attribute__((always_inline)) inline void finish_rows(float* c, int64_t c_stride, int64_t cols,
                                                       const GemmFinish* f, const Value& value) {
  if (f && f->gelu) {
    alignas(64) float cells[kRows * kGemmPanel];
#pragma GCC unroll 14
    for (int r = 0; r < kRows; ++r) {
      _mm512_store_ps(cells + r * kGemmPanel, value(r, 0));
      _mm512_store_ps(cells + r * kGemmPanel + 16, value(r, 1));
    }
    return finish_from<true>(cells, kGemmPanel, *f, Gelu());
  }
  const RowWriter writer = row_writer(c, c_stride, cols, f);
#pragma GCC unroll 14
  for (int r = 0; r < kRows; ++r) writer.write(r, value(r, 0), value(r, 1));
}

}  // namespace
}  // namespace dn::cpu
