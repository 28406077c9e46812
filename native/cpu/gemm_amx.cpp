// The bf16 matrix product's kernels on AMX tiles: 32 x 32 of C in four tiles, two tiles of A and two of B a
// step, so that each loaded tile serves two multiplications. Inputs are rounded to the nearest bf16, ties to
// even, while packing.

#include "cpu/gemm_kernels.h"

#if defined(__x86_64__) && defined(__AMX_TILE__) && defined(__AMX_BF16__)
#include <immintrin.h>
#include <string.h>

#include "cpu/gemm_avx512.inl"

namespace dn::cpu {
namespace {

// Tiles 0-3: C (rows 0-15 left, right; rows 16-31 left, right); 4, 5: A; 6, 7: B.
struct alignas(64) TileConfig {
  uint8_t palette;
  uint8_t start_row;
  uint8_t reserved[14];
  uint16_t bytes_per_row[16];
  uint8_t rows[16];
};
// In memory for good: GCC's _tile_loadconfig does not tell the compiler that it reads all of it.
const TileConfig kConfig = {1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

void begin() { _tile_loadconfig(&kConfig); }

void end() { _tile_release(); }

// Whole tiles only; c has room for 32 columns and 16 rows, 32 when kTwo.
template <bool kTwo>
void multiply(const AmxTile& t, float* c, int64_t c_stride, bool accumulate) {
  const size_t stride = static_cast<size_t>(c_stride) * sizeof(float);
  float* const lower = c + kAmxRows * c_stride;
  asm volatile("" ::: "memory");  // the compiler does not know that tile loads read memory
  if (accumulate) {
    _tile_loadd(0, c, stride);
    _tile_loadd(1, c + 16, stride);
    if (kTwo) _tile_loadd(2, lower, stride);
    if (kTwo) _tile_loadd(3, lower + 16, stride);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    if (kTwo) _tile_zero(2);
    if (kTwo) _tile_zero(3);
  }
  const uint16_t *a0 = t.a0, *a1 = t.a1, *b = t.b;
  for (int64_t step = 0; step < t.steps; ++step) {
    _tile_loadd(6, b, 64);
    _tile_loadd(4, a0, 64);
    _tile_loadd(7, b + kAmxTile, 64);
    _tile_dpbf16ps(0, 4, 6);
    if (kTwo) _tile_loadd(5, a1, 64);
    _tile_dpbf16ps(1, 4, 7);
    if (kTwo) _tile_dpbf16ps(2, 5, 6);
    if (kTwo) _tile_dpbf16ps(3, 5, 7);
    a0 += kAmxTile;
    if (kTwo) a1 += kAmxTile;
    b += 2 * kAmxTile;
  }
  _tile_stored(0, c, stride);
  _tile_stored(1, c + 16, stride);
  if (kTwo) _tile_stored(2, lower, stride);
  if (kTwo) _tile_stored(3, lower + 16, stride);
}

void copy_cells(float* dst, int64_t dst_stride, const float* src, int64_t src_stride, int64_t rows,
                int64_t cols) {
  const __mmask16 m0 = lanes(cols), m1 = lanes(cols - 16);
  for (int64_t r = 0; r < rows; ++r) {
    _mm512_mask_storeu_ps(dst + r * dst_stride, m0, _mm512_maskz_loadu_ps(m0, src + r * src_stride));
    _mm512_mask_storeu_ps(dst + r * dst_stride + 16, m1,
                          _mm512_maskz_loadu_ps(m1, src + r * src_stride + 16));
  }
}

void tile(const AmxTile& t) {
  const bool two = t.a1 != nullptr;
  if (!t.finish && t.cols == kGemmPanel && t.rows == (two ? 32 : 16)) {
    two ? multiply<true>(t, t.c, t.c_stride, t.accumulate)
        : multiply<false>(t, t.c, t.c_stride, t.accumulate);
    return;
  }
  // Edges of C, and what is finished before it is stored: whole tiles beside it.
  alignas(64) float cells[32 * kGemmPanel];
  if (t.accumulate) {
    if (t.rows < 32 || t.cols < kGemmPanel) memset(cells, 0, sizeof cells);
    copy_cells(cells, kGemmPanel, t.c, t.c_stride, t.rows, t.cols);
  }
  two ? multiply<true>(t, cells, kGemmPanel, t.accumulate)
      : multiply<false>(t, cells, kGemmPanel, t.accumulate);
  if (t.finish) {
    finish_from(cells, kGemmPanel, *t.finish);
  } else {
    copy_cells(t.c, t.c_stride, cells, kGemmPanel, t.rows, t.cols);
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
  for (int64_t k = 0; k < depth; k += kAmxStep, dst += dst_step) {
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
  for (int64_t k = 0; k < depth; k += kAmxStep, dst += dst_step) {
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

const AmxKernels kGemmAmx = {begin, end, tile, pack_rows, pack_columns};

}  // namespace dn::cpu

#else

namespace dn::cpu {
const AmxKernels kGemmAmx = {};
}  // namespace dn::cpu

#endif
