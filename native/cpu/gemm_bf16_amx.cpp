// The bf16 matrix product's kernels on AMX tiles: 32 x 32 of C in four tiles, two tiles of A and two of B a
// step, so that each loaded tile serves two multiplications. Inputs are rounded to the nearest bf16, ties to
// even, while packing.

#include "cpu/gemm_kernels.h"

#if defined(__x86_64__) && defined(__AMX_TILE__) && defined(__AMX_BF16__)
#include <immintrin.h>
#include <string.h>

#include "cpu/gemm_bf16.inl"

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
void multiply(const Bf16Tile& t, float* c, int64_t c_stride, bool accumulate) {
  const size_t stride = static_cast<size_t>(c_stride) * sizeof(float);
  float* const lower = c + kBf16Rows * c_stride;
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
    _tile_loadd(7, b + kBf16Tile, 64);
    _tile_dpbf16ps(0, 4, 6);
    if (kTwo) _tile_loadd(5, a1, 64);
    _tile_dpbf16ps(1, 4, 7);
    if (kTwo) _tile_dpbf16ps(2, 5, 6);
    if (kTwo) _tile_dpbf16ps(3, 5, 7);
    a0 += kBf16Tile;
    if (kTwo) a1 += kBf16Tile;
    b += 2 * kBf16Tile;
  }
  _tile_stored(0, c, stride);
  _tile_stored(1, c + 16, stride);
  if (kTwo) _tile_stored(2, lower, stride);
  if (kTwo) _tile_stored(3, lower + 16, stride);
}

void tile(const Bf16Tile& t) {
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

}  // namespace

const Bf16Kernels kGemmBf16Amx = {begin, end, tile, pack_rows, pack_columns};

}  // namespace dn::cpu

#else

namespace dn::cpu {
const Bf16Kernels kGemmBf16Amx = {};
}  // namespace dn::cpu

#endif
