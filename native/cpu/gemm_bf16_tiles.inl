// Products of AMX tiles of bf16: 32 x 32 of C in four tiles, two tiles of A and two of B at a time. With
// numbers of one part each loaded tile serves two multiplications; with three parts the six products of a
// step follow each other so that only one of the two operands changes: 14 loads for 24 multiplications. Tiles
// multiply on a unit of their own: between the products there is room for work of the vector units, which
// would be idle. Included after immintrin.h and string.h; everything has internal linkage.

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

// C has 32 columns and 16 rows, 32 when kTwo; stride in floats.
template <bool kTwo>
__attribute__((always_inline)) inline void zero_c() {
  _tile_zero(0);
  _tile_zero(1);
  if (kTwo) _tile_zero(2);
  if (kTwo) _tile_zero(3);
}

template <bool kTwo>
__attribute__((always_inline)) inline void load_c(const float* c, int64_t stride) {
  const size_t bytes = static_cast<size_t>(stride) * sizeof(float);
  _tile_loadd(0, c, bytes);
  _tile_loadd(1, c + 16, bytes);
  if (kTwo) _tile_loadd(2, c + kBf16Rows * stride, bytes);
  if (kTwo) _tile_loadd(3, c + kBf16Rows * stride + 16, bytes);
}

template <bool kTwo>
__attribute__((always_inline)) inline void store_c(float* c, int64_t stride) {
  const size_t bytes = static_cast<size_t>(stride) * sizeof(float);
  _tile_stored(0, c, bytes);
  _tile_stored(1, c + 16, bytes);
  if (kTwo) _tile_stored(2, c + kBf16Rows * stride, bytes);
  if (kTwo) _tile_stored(3, c + kBf16Rows * stride + 16, bytes);
}

template <bool kTwo>
__attribute__((always_inline)) inline void load_a(const uint16_t* a0, const uint16_t* a1, int64_t part) {
  _tile_loadd(4, a0 + part * kBf16Tile, 64);
  if (kTwo) _tile_loadd(5, a1 + part * kBf16Tile, 64);
}

// As in a weight packed as bf16.
__attribute__((always_inline)) inline void load_lying_b(const uint16_t* b) {
  _tile_loadd(6, b, 128);
  _tile_loadd(7, b + 32, 128);
}

__attribute__((always_inline)) inline void load_b(const uint16_t* b, int64_t part) {
  _tile_loadd(6, b + part * 2 * kBf16Tile, 64);
  _tile_loadd(7, b + part * 2 * kBf16Tile + kBf16Tile, 64);
}

// Calls of between.some() in a step.
constexpr int64_t places_in_step(int parts) { return parts == 1 ? 2 : 12; }

template <bool kTwo, typename Between>
__attribute__((always_inline)) inline void products(Between& between) {
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  between.some();
  if (kTwo) _tile_dpbf16ps(2, 5, 6);
  if (kTwo) _tile_dpbf16ps(3, 5, 7);
  between.some();
}

// C += A B over one step of the reduction; kTwo: rows 16 .. 31 too. between.some() does a piece of what the
// vector units have to do.
template <int kParts, bool kTwo, bool kLying, typename Between>
__attribute__((always_inline)) inline void multiply_step(const uint16_t* a0, const uint16_t* a1,
                                                         const uint16_t* b, Between& between) {
  if (kParts == 1) {
    kLying ? load_lying_b(b) : load_b(b, 0);
    load_a<kTwo>(a0, a1, 0);
    products<kTwo>(between);
    return;
  }
  // From the smallest products to the largest, and only one operand changes: 14 loads, not 24.
  load_b(b, 0);
  load_a<kTwo>(a0, a1, 2);
  products<kTwo>(between);
  load_a<kTwo>(a0, a1, 1);
  products<kTwo>(between);
  load_b(b, 1);
  products<kTwo>(between);
  load_a<kTwo>(a0, a1, 0);
  products<kTwo>(between);
  load_b(b, 2);
  products<kTwo>(between);
  load_b(b, 0);
  products<kTwo>(between);
}

// C += A B over `steps` steps; b: packed steps, which with a ring of kRing steps begin at the step `first`.
template <int kParts, bool kTwo, int64_t kRing = 0, bool kLying = false, typename Between>
__attribute__((always_inline)) inline void multiply_steps(const uint16_t* a0, const uint16_t* a1,
                                                          const uint16_t* b, int64_t steps, Between& between,
                                                          int64_t first = 0) {
  for (int64_t step = first; step < first + steps; ++step) {
    // What was packed into the ring two steps ago is loaded now; the compiler does not know that.
    if constexpr (kRing > 0) asm volatile("" ::: "memory");
    multiply_step<kParts, kTwo, kLying>(
        a0, a1, b + (kRing > 0 ? step % kRing : step) * (kParts * 2 * kBf16Tile), between);
    a0 += kParts * kBf16Tile;
    if (kTwo) a1 += kParts * kBf16Tile;
  }
}

}  // namespace
}  // namespace dn::cpu
