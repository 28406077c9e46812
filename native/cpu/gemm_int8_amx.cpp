// The int8 product's kernels on AMX tiles: 32 x 32 of C in four tiles of int32, two tiles of inputs and two
// of weights a step of 64 inputs. Tiles are read as they lie: rows of quantised inputs, and the groups of a
// panel.

#include "cpu/gemm_int8_kernels.h"

#if defined(__x86_64__) && defined(__AMX_TILE__) && defined(__AMX_INT8__)
#include "cpu/gemm_int8_avx512.inl"
#include "cpu/gemm_prefetch.inl"

namespace dn::cpu {
namespace {

constexpr int64_t kMaxRows = 32;
constexpr int64_t kTileRows = 16;
constexpr int64_t kGroupBytes = kGemmPanel * kInt8Group;  // from one row of a weight tile to the next

// Tiles 0-3: C (rows 0-15 left, right; rows 16-31 left, right); 4, 5: inputs; 6, 7: weights.
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

// sums (kTwo ? 32 : 16, kGemmPanel) of int32.
template <bool kTwo>
void multiply(const Int8Tile& t, int32_t* sums) {
  asm volatile("" ::: "memory");  // the compiler does not know that tile loads read memory
  const size_t a_stride = static_cast<size_t>(t.a_stride);
  // With a stride of zero every row of a tile is the correction.
  _tile_loadd(0, t.panel->correction, 0);
  _tile_loadd(1, t.panel->correction + 16, 0);
  if (kTwo) _tile_loadd(2, t.panel->correction, 0);
  if (kTwo) _tile_loadd(3, t.panel->correction + 16, 0);
  const uint8_t *a0 = t.a, *a1 = t.a + kTileRows * t.a_stride;
  const char* w = reinterpret_cast<const char*>(t.panel + 1);
  const int64_t share = (t.prefetch_lines * kInt8Step + t.depth - 1) / t.depth;  // lines a step
  const char* wanted = t.prefetch;
  for (int64_t k = 0; k < t.depth; k += kInt8Step, w += kInt8Step * kGemmPanel) {
    for (int64_t i = 0; i < share; ++i, wanted += 64) _mm_prefetch(wanted, _MM_HINT_T1);
    // Loads first: where two threads share a core every change between loads and products costs time.
    _tile_loadd(6, w, kGroupBytes);
    _tile_loadd(7, w + 64, kGroupBytes);
    _tile_loadd(4, a0 + k, a_stride);
    if (kTwo) _tile_loadd(5, a1 + k, a_stride);
    _tile_dpbusd(0, 4, 6);
    _tile_dpbusd(1, 4, 7);
    if (kTwo) _tile_dpbusd(2, 5, 6);
    if (kTwo) _tile_dpbusd(3, 5, 7);
  }
  constexpr size_t kStride = kGemmPanel * sizeof(int32_t);
  _tile_stored(0, sums, kStride);
  _tile_stored(1, sums + 16, kStride);
  if (kTwo) _tile_stored(2, sums + kTileRows * kGemmPanel, kStride);
  if (kTwo) _tile_stored(3, sums + kTileRows * kGemmPanel + 16, kStride);
}

void tile(const Int8Tile& t) {
  alignas(64) int32_t sums[kMaxRows * kGemmPanel];
  for (int64_t r = 0; r < t.rows; ++r) {
    prefetch_row(t.c + r * t.c_stride);
  }
  prefetch_finish(t.finish);
  t.rows > kTileRows ? multiply<true>(t, sums) : multiply<false>(t, sums);
  const __m512 scales[2] = {_mm512_loadu_ps(t.panel->scales), _mm512_loadu_ps(t.panel->scales + 16)};
  const auto value = [&](int64_t r, int v) {
    const __m512 sum = _mm512_cvtepi32_ps(_mm512_load_si512(sums + r * kGemmPanel + 16 * v));
    return _mm512_mul_ps(_mm512_mul_ps(sum, _mm512_set1_ps(t.a_scales[r])), scales[v]);
  };
  if (t.finish && t.finish->gelu) {
    alignas(64) float cells[kMaxRows * kGemmPanel];
    for (int64_t r = 0; r < t.rows; ++r) {
      _mm512_store_ps(cells + r * kGemmPanel, value(r, 0));
      _mm512_store_ps(cells + r * kGemmPanel + 16, value(r, 1));
    }
    return finish_from<true>(cells, kGemmPanel, *t.finish, TableGelu());
  }
  const RowWriter writer = row_writer(t.c, t.c_stride, t.cols, t.finish);
  for (int64_t r = 0; r < t.rows; ++r) writer.write(r, value(r, 0), value(r, 1));
}

}  // namespace

const Int8Kernels kInt8Amx = {"amx-int8", kMaxRows, begin, end, tile, quantise_row};

}  // namespace dn::cpu

#else

namespace dn::cpu {
const Int8Kernels kInt8Amx = {};
}  // namespace dn::cpu

#endif
