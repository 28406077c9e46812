// What the AMX and AVX512_BF16 sources of the bf16 matrix product share: packing, which rounds to the nearest
// bf16, ties to even, and cells beside C. Included after immintrin.h and string.h; everything has internal
// linkage.

#include "cpu/gemm_avx512.inl"

namespace dn::cpu {
namespace {

void copy_cells(float* dst, int64_t dst_stride, const float* src, int64_t src_stride, int64_t rows,
                int64_t cols) {
  const __mmask16 m0 = lanes(cols), m1 = lanes(cols - 16);
  for (int64_t r = 0; r < rows; ++r) {
    _mm512_mask_storeu_ps(dst + r * dst_stride, m0, _mm512_maskz_loadu_ps(m0, src + r * src_stride));
    _mm512_mask_storeu_ps(dst + r * dst_stride + 16, m1,
                          _mm512_maskz_loadu_ps(m1, src + r * src_stride + 16));
  }
}

// Thirty-two numbers as bf16, low half first.
__m512i round_32(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }

void store_tile(uint16_t* dst, const __m512i* rows) {
  for (int i = 0; i < 16; ++i) _mm512_store_si512(dst + i * 32, rows[i]);
}

void pack_rows(uint16_t* dst, int64_t dst_step, const float* const* rows, int64_t count, int64_t depth,
               bool transpose) {
  __m512i x[16];
  for (int64_t k = 0; k < depth; k += kBf16Step, dst += dst_step) {
    const __mmask16 low = lanes(depth - k), high = lanes(depth - k - 16);
    for (int i = 0; i < 16; ++i) {
      x[i] = i < count ? round_32(_mm512_maskz_loadu_ps(low, rows[i] + k),
                                  _mm512_maskz_loadu_ps(high, rows[i] + k + 16))
                       : _mm512_setzero_si512();
    }
    if (transpose) transpose_16x16(x);
    store_tile(dst, x);
  }
}

void pack_columns(uint16_t* dst, int64_t dst_step, const float* src, int64_t src_stride, int64_t count,
                  int64_t depth, bool transpose) {
  alignas(64) static const uint16_t kInterleave[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                       21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                       11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i interleave = _mm512_load_si512(kInterleave);
  const __mmask16 wide = lanes(count);
  __m512i x[16];
  for (int64_t k = 0; k < depth; k += kBf16Step, dst += dst_step) {
    const float* from = src + k * src_stride;
    for (int i = 0; i < 16; ++i, from += 2 * src_stride) {
      const int64_t left = depth - k - 2 * i;
      const __m512 even = left > 0 ? _mm512_maskz_loadu_ps(wide, from) : _mm512_setzero_ps();
      const __m512 odd = left > 1 ? _mm512_maskz_loadu_ps(wide, from + src_stride) : _mm512_setzero_ps();
      x[i] = _mm512_permutexvar_epi16(interleave, round_32(even, odd));
    }
    if (transpose) transpose_16x16(x);
    store_tile(dst, x);
  }
}

}  // namespace
}  // namespace dn::cpu
