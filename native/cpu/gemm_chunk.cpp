// Packing, asking ahead and the tiles of one panel: what gemm_chunk.h declares.

#include "cpu/gemm_chunk.h"

#include <cstring>
#include <optional>

namespace dn::cpu {
namespace {

// So many numbers of packed A (1 MB) stay in L2 by themselves.
constexpr int64_t kNearFloats = int64_t{256} << 10;
constexpr int64_t kMostTileRows = 16;

}  // namespace

Ahead ahead_of(const float* at, int64_t rows, int64_t floats, int64_t stride, int64_t tiles) {
  Ahead ahead;
  if (floats == stride) {
    floats *= rows;
    rows = 1;
  }
  ahead.memory.at = at;
  ahead.memory.run = ahead.memory.left = std::max<int64_t>(1, ceil_div(floats, kLine));
  ahead.memory.jump = stride - ahead.memory.run * kLine;
  ahead.memory.lines = rows * ahead.memory.run;
  ahead.tiles = tiles;
  return ahead;
}

Ahead ahead_of_tiles(const GemmChunk& chunk, int64_t block, int64_t tile_begin, int64_t tile_end,
                     int64_t tiles) {
  if (chunk.rows * chunk.p.K <= kNearFloats) return {};
  const int64_t rows = chunk.tile_begin(tile_end) - chunk.tile_begin(tile_begin);
  return ahead_of(chunk.tile_a(block, tile_begin), 1, rows * chunk.packed_depth_of(block), 0, tiles);
}

Ahead ahead_of_panels(const GemmProduct& p, int64_t panel_begin, int64_t panel_end, int64_t k, int64_t depth,
                      int64_t tiles) {
  const int64_t n = panel_begin * kGemmPanel, cols = std::min(p.N, panel_end * kGemmPanel) - n;
  if (p.b_layout == GemmLayout::kBf16Panels) return {};
  if (p.b_layout == GemmLayout::kTransposed)
    return ahead_of(p.b + n * p.b_stride + k, cols, depth, p.b_stride, tiles);
  return ahead_of(p.b + k * p.b_stride + n, depth, cols, p.b_stride, tiles);
}

void pack_a(const GemmChunk& chunk, int64_t tile) {
  const GemmProduct& p = chunk.p;
  const int64_t m = chunk.m_begin + chunk.tile_begin(tile);
  const int64_t rows = chunk.tile_begin(tile + 1) - chunk.tile_begin(tile);
  for (int64_t block = 0; block < chunk.blocks(); ++block) {
    const int64_t k = chunk.k_begin(block), depth = chunk.depth(block);
    float* const dst = chunk.tile_a(block, tile);
    if (chunk.kernels.pairs) {
      pack_pairs(chunk, dst, m, rows, k, depth);
      continue;
    }
    if (p.a_layout == GemmLayout::kTransposed) {
      chunk.kernels.copy(dst, rows, p.a + k * p.a_stride + m, p.a_stride, depth, rows);
      continue;
    }
    const float* src[kMostTileRows] = {};
    for (int64_t r = 0; r < rows; ++r) src[r] = (p.a_rows ? p.a_rows[m + r] : p.a + (m + r) * p.a_stride) + k;
    chunk.kernels.pack_rows(dst, src, rows, depth);
  }
}

void pack_panels(const GemmProduct& p, const GemmKernels& kernels, int64_t panel_begin, int64_t panel_end,
                 int64_t k, int64_t depth, float* dst, int64_t panel_floats) {
  for (int64_t panel = panel_begin; panel < panel_end; ++panel, dst += panel_floats) {
    if (p.b_layout == GemmLayout::kBf16Panels) {
      unpack_bf16(dst, p.b + panel * bf16_panel_words(p.K) + bf16_words(k), depth);
      continue;
    }
    const int64_t n = panel * kGemmPanel, cols = std::min(kGemmPanel, p.N - n);
    if (cols < kGemmPanel) std::memset(dst, 0, static_cast<size_t>(depth * kGemmPanel) * sizeof(float));
    if (p.b_layout == GemmLayout::kTransposed) {
      kernels.transpose(dst, kGemmPanel, p.b + n * p.b_stride + k, p.b_stride, cols, depth);
    } else {
      kernels.copy(dst, kGemmPanel, p.b + k * p.b_stride + n, p.b_stride, depth, cols);
    }
  }
}

namespace {

// What the tiles of a block need to know of its B for products in pairs.
struct PairColumns : PairScales {
  float sums[kMostPairSums * kGemmPanel];
  bool is_scaled = false;  // b is

  PairColumns(const GemmChunk& chunk, int64_t block, int64_t panel, const PanelBlock& of_panel) {
    const GemmProduct& p = chunk.p;
    const PairPanel* const known = p.b_pairs ? p.b_pairs + panel * chunk.blocks() + block : nullptr;
    if (known && cpu::is_scaled(*known)) {
      is_scaled = true;
      std::fill_n(scales, kGemmPanel, 1.0f);
      std::copy_n(known->exponents, kGemmPanel, exponents);
      std::copy_n(known->sums, kMostPairSums * kGemmPanel, sums);
      return;
    }
    const int64_t depth = chunk.depth(block), stride = of_panel.packed ? p.b_stride : kGemmPanel;
    float squares[kGemmPanel];
    chunk.kernels.pairs->column_squares(squares, of_panel.b, stride, kGemmPanel, depth);
    for (int64_t n = 0; n < kGemmPanel; ++n) set(n, squares[n], of_panel.b + n, stride, depth);
  }
};

}  // namespace

void multiply_panel(const GemmChunk& chunk, int64_t block, int64_t tile_begin, int64_t tile_end,
                    int64_t panel, PanelBlock of_panel, Ahead& ahead_a, Ahead& ahead_b) {
  const GemmProduct& p = chunk.p;
  const int64_t depth = chunk.depth(block);
  const bool finish = block + 1 == chunk.blocks() && has_finish(p);
  const int64_t n = panel * kGemmPanel, cols = std::min(kGemmPanel, p.N - n);
  const float* const block_a = chunk.tile_a(block, 0);
  const int64_t row_floats = chunk.packed_depth_of(block);
  std::optional<PairColumns> columns;
  if (chunk.kernels.pairs) columns.emplace(chunk, block, panel, of_panel);
  int64_t begin = chunk.tile_begin(tile_begin);
  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    const int64_t end = chunk.tile_begin(tile + 1), rows = end - begin;
    const GemmFinish then = finish_of(p, chunk.m_begin + begin, n, rows, cols);
    const bool both = ahead_a.memory.lines > 0 && ahead_b.memory.lines > 0;
    Ahead& ahead = both ? (tile % 2 == 0 ? ahead_a : ahead_b) : ahead_a.memory.lines > 0 ? ahead_a : ahead_b;
    const int64_t share = std::min(ahead.memory.lines, (both ? 2 : 1) * ahead.share());
    GemmTile t{then.c,
               p.c_stride,
               rows,
               cols,
               block_a + begin * row_floats,
               of_panel.b,
               depth,
               p.accumulate || block > 0,
               &ahead.memory,
               share,
               finish ? &then : nullptr,
               of_panel.packed,
               p.b_stride,
               of_panel.fetch,
               of_panel.is_bf16,
               p.stream && !p.accumulate && chunk.blocks() == 1 && cols == kGemmPanel};
    if (columns) {
      t.is_first = tile == tile_begin && !columns->is_scaled;
      t.b_scales = columns->scales;
      t.b_exponents = columns->exponents;
      t.scaled = of_panel.scaled;
      t.b_sums = columns->sums;
    }
    chunk.kernels.tile(t);
    float* const left = !columns ? of_panel.packed : columns->is_scaled ? nullptr : of_panel.scaled;
    if (left) of_panel = {left};
    --ahead_a.tiles;
    --ahead_b.tiles;
    begin = end;
  }
}

}  // namespace dn::cpu
