// The table of inner kernels that every instruction set fills for the int8 product. C headers only: sources
// compiled for AVX2, AVX-512 or AMX include this and nothing from the C++ library.
//
// c = (sum over k of a * w as int32) * a_scale * w_scale. Sums are exact, the conversion to fp32 rounds to
// nearest and the two multiplications follow in this order: every kernel gives the same bits.
//
// Inputs are stored as bytes a + 128, which is what the multiply instructions of x86 want; `correction`, -128
// times the sum of a column's weights, is where the sums begin.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "cpu/gemm_kernels.h"

namespace dn::cpu {

// Inputs (K) are padded with zero weights to a multiple of this: the row of an AMX tile.
constexpr int64_t kInt8Step = 64;
// Inputs of one column that lie together.
constexpr int64_t kInt8Group = 4;
constexpr int64_t kInt8Offset = 128;

// A packed int8 weight is ceil(N / kGemmPanel) panels of columns, each this header and then, for every group
// of the padded inputs, kGemmPanel columns of kInt8Group bytes. Columns past N are zero. One layout for every
// instruction set; a panel is a multiple of 64 bytes.
struct Int8Panel {
  float scales[kGemmPanel];
  int32_t correction[kGemmPanel];
};
static constexpr int64_t int8_depth(int64_t K) { return (K + kInt8Step - 1) / kInt8Step * kInt8Step; }
static constexpr int64_t int8_panel_bytes(int64_t K) {
  return static_cast<int64_t>(sizeof(Int8Panel)) + int8_depth(K) * kGemmPanel;
}

// One tile of C: rows x cols, cols <= kGemmPanel, over the whole reduction; then what `finish` says of the
// same cells.
struct Int8Tile {
  float* c;
  int64_t c_stride;
  int64_t rows;  // 1 .. Int8Kernels::max_rows
  int64_t cols;
  const uint8_t* a;  // rows of `depth` bytes, a + 128; up to max_rows rows can be read
  int64_t a_stride;
  const float* a_scales;  // (rows)
  const Int8Panel* panel;
  int64_t depth;         // padded K
  const char* prefetch;  // wanted in L2 soon: this many cache lines from here on, at most depth / 2
  int64_t prefetch_lines;
  const GemmFinish* finish;  // or null
  bool fetch = false;        // as in GemmTile; then there are no lines
};

struct Int8Kernels {
  const char* name;
  int64_t max_rows;  // of a tile
  // A thread calls begin before and end after any number of tiles; null: nothing to do.
  void (*begin)();
  void (*end)();
  void (*tile)(const Int8Tile& tile);
  // q[k] = 128 + x[k] * (127 / max |x|) rounded to nearest, ties to even; returns the scale max |x| / 127. A
  // row below kInt8Least (core/int8.h) is zero; one with a value that is not finite is zero with scale NaN,
  // so that its outputs are NaN.
  float (*quantise_row)(uint8_t* q, const float* x, int64_t K);
};

extern const Int8Kernels kInt8Portable;
// Where the compiler or the machine type lacks the instructions these have no kernels (tile is null).
extern const Int8Kernels kInt8Avx2;
extern const Int8Kernels kInt8AvxVnni;
extern const Int8Kernels kInt8Avx512;  // with VNNI
extern const Int8Kernels kInt8Amx;

}  // namespace dn::cpu
