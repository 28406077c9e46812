// The kernels of the matrix product on AMX tiles of bf16: 32 x 32 of C in four tiles, two tiles of A and two
// of B at a time. With numbers of one part each loaded tile serves two multiplications; with three parts the
// six products of a step follow each other so that only one of the two operands changes: 14 loads for 24
// multiplications. Between them a piece of the next panel is packed: tiles multiply on a unit of their own,
// and the vector units would be idle.

#include "cpu/gemm_kernels.h"

#if defined(__x86_64__) && defined(__AMX_TILE__) && defined(__AMX_BF16__)
#include <immintrin.h>
#include <string.h>

#include "cpu/gemm_bf16.inl"
#include "cpu/gemm_prefetch.inl"

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

// Tiles flush denormal numbers; what the vector units do beside them (packing, SplitRows) has to.
constexpr unsigned kFlush = 0x8040;  // MXCSR: results, inputs
thread_local unsigned control_before;

void begin() {
  control_before = _mm_getcsr();
  _mm_setcsr(control_before | kFlush);
  _tile_loadconfig(&kConfig);
}

void end() {
  _tile_release();
  _mm_setcsr(control_before);
}

// Pieces of the next panel that are packed while tiles multiply: `pairs` of them, spread evenly over
// `places`. In bunches they would hold up the tiles, whose loads wait behind them.
template <int kParts, bool kTurned>
class Packing {
 public:
  Packing(PanelPack* next, int64_t pairs, int64_t places) : next_(next), pairs_(pairs), places_(places) {}

  __attribute__((always_inline)) void some() {
    for (due_ += pairs_; due_ >= places_; due_ -= places_) pack_pair<kParts, kTurned>(next_);
  }

 private:
  PanelPack* next_;
  int64_t pairs_, places_;
  int64_t due_ = 0;
};

template <bool kTwo>
__attribute__((always_inline)) inline void load_a(const uint16_t* a0, const uint16_t* a1, int64_t part) {
  _tile_loadd(4, a0 + part * kBf16Tile, 64);
  if (kTwo) _tile_loadd(5, a1 + part * kBf16Tile, 64);
}

__attribute__((always_inline)) inline void load_b(const uint16_t* b, int64_t part) {
  _tile_loadd(6, b + part * 2 * kBf16Tile, 64);
  _tile_loadd(7, b + part * 2 * kBf16Tile + kBf16Tile, 64);
}

constexpr int64_t kPlaces = 2;  // for packing in products()

template <bool kTwo, typename Packing>
__attribute__((always_inline)) inline void products(Packing& packing) {
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  packing.some();
  if (kTwo) _tile_dpbf16ps(2, 5, 6);
  if (kTwo) _tile_dpbf16ps(3, 5, 7);
  packing.some();
}

template <int kParts, bool kTwo, typename Packing>
__attribute__((always_inline)) inline void multiply_step(const uint16_t* a0, const uint16_t* a1,
                                                         const uint16_t* b, Packing& packing) {
  if (kParts == 1) {
    load_b(b, 0);
    load_a<kTwo>(a0, a1, 0);
    products<kTwo>(packing);
    return;
  }
  // From the smallest products to the largest, and only one operand changes: 14 loads, not 24.
  load_b(b, 0);
  load_a<kTwo>(a0, a1, 2);
  products<kTwo>(packing);
  load_a<kTwo>(a0, a1, 1);
  products<kTwo>(packing);
  load_b(b, 1);
  products<kTwo>(packing);
  load_a<kTwo>(a0, a1, 0);
  products<kTwo>(packing);
  load_b(b, 2);
  products<kTwo>(packing);
  load_b(b, 0);
  products<kTwo>(packing);
}

// Whole tiles only; `from` (when accumulating) and `to` have room for 32 columns and 16 rows, 32 when kTwo.
template <int kParts, bool kTwo, bool kTurned>
void multiply(const Bf16Tile& t, const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  const size_t bytes = static_cast<size_t>(from_stride) * sizeof(float);
  asm volatile("" ::: "memory");  // the compiler does not know that tile loads read memory
  if (t.accumulate) {
    _tile_loadd(0, from, bytes);
    _tile_loadd(1, from + 16, bytes);
    if (kTwo) _tile_loadd(2, from + kBf16Rows * from_stride, bytes);
    if (kTwo) _tile_loadd(3, from + kBf16Rows * from_stride + 16, bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    if (kTwo) _tile_zero(2);
    if (kTwo) _tile_zero(3);
  }
  Packing<kParts, kTurned> packing(t.next, t.pack_pairs, t.steps * kPlaces * (kParts == 1 ? 1 : 6));
  const uint16_t *a0 = t.a0, *a1 = t.a1, *b = t.b;
  for (int64_t step = 0; step < t.steps; ++step) {
    multiply_step<kParts, kTwo>(a0, a1, b, packing);
    a0 += kParts * kBf16Tile;
    if (kTwo) a1 += kParts * kBf16Tile;
    b += kParts * 2 * kBf16Tile;
  }
  const size_t to_bytes = static_cast<size_t>(to_stride) * sizeof(float);
  _tile_stored(0, to, to_bytes);
  _tile_stored(1, to + 16, to_bytes);
  if (kTwo) _tile_stored(2, to + kBf16Rows * to_stride, to_bytes);
  if (kTwo) _tile_stored(3, to + kBf16Rows * to_stride + 16, to_bytes);
}

template <int kParts>
void tile(const Bf16Tile& t) {
  const bool two = t.a1 != nullptr;
  const bool whole = t.cols == kGemmPanel && t.rows == (two ? 32 : 16);
  for (int64_t r = 0; r < t.rows; ++r) prefetch_row(t.c + r * t.c_stride);
  prefetch_finish(t.finish);
  // Edges of C, and what is finished before it is stored: whole tiles beside it.
  alignas(64) float cells[32 * kGemmPanel];
  if (t.accumulate && !whole) {
    memset(cells, 0, sizeof cells);
    copy_cells(cells, kGemmPanel, t.c, t.c_stride, t.rows, t.cols);
  }
  const float* const from = whole ? t.c : cells;
  const int64_t from_stride = whole ? t.c_stride : kGemmPanel;
  const bool beside = !whole || t.finish;
  float* const to = beside ? cells : t.c;
  const int64_t to_stride = beside ? kGemmPanel : t.c_stride;
  const auto run = t.next->turned ? (two ? multiply<kParts, true, true> : multiply<kParts, false, true>)
                                  : (two ? multiply<kParts, true, false> : multiply<kParts, false, false>);
  run(t, from, from_stride, to, to_stride);
  if (t.finish) {
    finish_from(cells, kGemmPanel, *t.finish);
  } else if (beside) {
    copy_cells(t.c, t.c_stride, cells, kGemmPanel, t.rows, t.cols);
  }
}

}  // namespace

const Bf16Kernels kGemmBf16Amx = {1, begin, end, tile<1>, pack_rows<1>, pack_columns<1>};
const Bf16Kernels kGemmFp32Amx = {3, begin, end, tile<3>, pack_rows<3>, pack_columns<3>};

}  // namespace dn::cpu

#else

namespace dn::cpu {
const Bf16Kernels kGemmBf16Amx = {};
const Bf16Kernels kGemmFp32Amx = {};
}  // namespace dn::cpu

#endif
