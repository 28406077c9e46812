// What the ways of cutting an fp32 product (gemm.cpp) are made of: rows of A packed tile by tile, blocks of
// panels of B, the tiles of one panel, and the memory that tiles ask for ahead. Private to gemm.cpp and
// gemm_chunk.cpp.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/gemm.h"

namespace dn::cpu {

// Packed A that is met with one panel before the next, and packed B of a task, in one block of the reduction:
// 384 KB each. Both and what is asked for ahead fit in an L2 of 1 MB.
constexpr int64_t kBlockFloats = int64_t{96} << 10;
constexpr int64_t kLine = 16;  // floats in a cache line

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rows of A, and panels of B, in a block.
inline int64_t block_rows(const GemmKernels& kernels) { return kBlockFloats / kernels.depth; }
inline int64_t block_panels(const GemmKernels& kernels) {
  return kBlockFloats / (kernels.depth * kGemmPanel);
}

// One row chunk [m_begin, m_begin + rows) of a product, cut into tiles of nearly equal height, and its packed
// A: blocks of kernels.depth of the reduction, in each the tiles one after the other (packed_depth).
struct GemmChunk {
  GemmChunk(const GemmProduct& product, const GemmKernels& table, int64_t m, int64_t count, float* a,
            int64_t row_parts = 1)
      : p(product),
        kernels(table),
        m_begin(m),
        rows(count),
        packed_a(a),
        parts(row_parts),
        tiles(ceil_div(count, table.max_rows * row_parts) * row_parts) {}

  const GemmProduct& p;
  const GemmKernels& kernels;
  const int64_t m_begin;
  const int64_t rows;
  float* const packed_a;
  const int64_t parts;  // row parts with equally many tiles each
  const int64_t tiles;

  int64_t k_begin(int64_t block) const { return block * kernels.depth; }
  int64_t blocks() const { return ceil_div(p.K, kernels.depth); }
  int64_t depth(int64_t block) const { return std::min(kernels.depth, p.K - k_begin(block)); }
  int64_t tile_begin(int64_t tile) const { return rows * tile / tiles; }
  int64_t packed_depth_of(int64_t block) const { return packed_depth(kernels, depth(block)); }
  float* tile_a(int64_t block, int64_t tile) const {
    return packed_a + block * packed_depth(kernels, kernels.depth) * rows +
           tile_begin(tile) * packed_depth_of(block);
  }
  // Row blocks of nearly equal size that so many tiles make: what is handled against one panel before the
  // next.
  int64_t row_blocks(int64_t of_tiles) const {
    return ceil_div(of_tiles, ceil_div(block_rows(kernels), kernels.max_rows));
  }
};

// Memory wanted soon and the tiles that may still ask for it, each for an equal share.
struct Ahead {
  GemmPrefetch memory;
  int64_t tiles = 1;

  int64_t share() const {
    return memory.lines == 0 ? 0 : ceil_div(memory.lines, std::max<int64_t>(1, tiles));
  }
};

// `rows` runs of `floats`, `stride` floats apart.
Ahead ahead_of(const float* at, int64_t rows, int64_t floats, int64_t stride, int64_t tiles);
// Packed A of some tiles, unless all of it is near anyway.
Ahead ahead_of_tiles(const GemmChunk& chunk, int64_t block, int64_t tile_begin, int64_t tile_end,
                     int64_t tiles);
// What will be read of a plain B: [k, k + depth) of panels [panel_begin, panel_end). Tiles ask for a
// weight of bf16 by themselves.
Ahead ahead_of_panels(const GemmProduct& p, int64_t panel_begin, int64_t panel_end, int64_t k, int64_t depth,
                      int64_t tiles);

// Numbers that a row of packed A has in all blocks of a reduction of K.
inline int64_t packed_row(const GemmKernels& kernels, int64_t K) {
  return K / kernels.depth * packed_depth(kernels, kernels.depth) + packed_depth(kernels, K % kernels.depth);
}

// Packs all blocks of a tile.
void pack_a(const GemmChunk& chunk, int64_t tile);
// Of kernels of pairs: packs [k, k + depth), a block of the reduction, of rows [m, m + rows) of A.
void pack_pairs(const GemmChunk& chunk, float* dst, int64_t m, int64_t rows, int64_t k, int64_t depth);
// The scales of rows or columns for products in pairs, and the exponents that undo them: powers of two that
// bring root mean squares nearest to 1; NaN for what is not finite.
struct PairScales {
  alignas(64) float scales[kGemmPanel];
  float exponents[kGemmPanel];

  // Row or column i, `depth` numbers `stride` apart, from the sum of their squares.
  void set(int64_t i, float squares, const float* numbers, int64_t stride, int64_t depth);
};
// Packs [k, k + depth) of panels [panel_begin, panel_end) of a B that is not packed fp32 into dst,
// panel_floats apart.
void pack_panels(const GemmProduct& p, const GemmKernels& kernels, int64_t panel_begin, int64_t panel_end,
                 int64_t k, int64_t depth, float* dst, int64_t panel_floats);
// Whether the first tile that meets a panel of B packs it on the way: whole panels whose rows lie as tiles
// read them.
inline bool packs_on_the_way(const GemmProduct& p, int64_t panel) {
  return p.b_layout == GemmLayout::kBf16Panels ||
         (p.b_layout == GemmLayout::kPlain && (panel + 1) * kGemmPanel <= p.N);
}

// A block of the reduction of one panel of B.
struct PanelBlock {
  const float* b;           // packed, or as it lies in p.b
  float* packed = nullptr;  // given: where a b that is not packed becomes so
  bool is_bf16 = false;     // b lies in kBf16Panels
  bool fetch = false;       // of the only tile, see GemmTile
  float* scaled = nullptr;  // for kernels of pairs, see GemmTile
};

// The block of a panel as it lies in p.b, which is to be packed on the way into `packed`, or read only once.
inline PanelBlock lying_block(const GemmProduct& p, int64_t panel, int64_t k, float* packed) {
  if (p.b_layout == GemmLayout::kBf16Panels)
    return {p.b + panel * bf16_panel_words(p.K) + bf16_words(k), packed, true};
  return {p.b + k * p.b_stride + panel * kGemmPanel, packed};
}

// One block of the reduction for some tiles of the chunk and one panel. Tiles take turns in asking for what
// comes of A and of B.
void multiply_panel(const GemmChunk& chunk, int64_t block, int64_t tile_begin, int64_t tile_end,
                    int64_t panel, PanelBlock of_panel, Ahead& ahead_a, Ahead& ahead_b);

}  // namespace dn::cpu
