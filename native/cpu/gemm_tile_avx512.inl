// How the tiles of fp32 products on AVX-512 begin and end: what they ask the caches for, and how their sums
// go to C. Included after immintrin.h; everything has internal linkage.

#include "cpu/gemm_avx512.inl"
#include "cpu/gemm_prefetch.inl"

namespace dn::cpu {
namespace {

// Asks for what a tile writes at its end, and reads besides.
template <int kRows>
__attribute__((always_inline)) inline void ask_for_tile(const GemmTile& t) {
#pragma GCC unroll 14
  for (int r = 0; r < kRows; ++r) {
    if (!t.stream) prefetch_row(t.c + r * t.c_stride);
  }
  prefetch_finish(t.finish);
}

// C = or += sum, then what t.finish says.
template <int kRows>
__attribute__((always_inline)) inline void write_tile(const GemmTile& t, __m512 (*sum)[2]) {
  if (t.stream) {
#pragma GCC unroll 14
    for (int r = 0; r < kRows; ++r) {
      _mm512_stream_ps(t.c + r * t.c_stride, sum[r][0]);
      _mm512_stream_ps(t.c + r * t.c_stride + 16, sum[r][1]);
    }
    return;
  }
  const __mmask16 masks[2] = {lanes(t.cols), lanes(t.cols - 16)};
  if (t.accumulate) {
#pragma GCC unroll 14
    for (int r = 0; r < kRows; ++r) {
      const float* const c = t.c + r * t.c_stride;
      sum[r][0] = _mm512_add_ps(_mm512_maskz_loadu_ps(masks[0], c), sum[r][0]);
      sum[r][1] = _mm512_add_ps(_mm512_maskz_loadu_ps(masks[1], c + 16), sum[r][1]);
    }
  }
  finish_rows<kRows>(
      t.c, t.c_stride, t.cols,
      t.finish, [&](int r, int v) __attribute__((always_inline)) { return sum[r][v]; });
}

}  // namespace
}  // namespace dn::cpu
