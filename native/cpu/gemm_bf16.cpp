// The bf16 matrix product on AMX: the plan of gemm.cpp with operands rounded to bf16 as they are packed. An
// element is one chain over the reduction, blocks continuing where the last one stored; rows past the end are
// zero rows of a tile, so a row's numbers never depend on its neighbours.

#include <algorithm>

#include "cpu/gemm.h"
#include "cpu/thread_pool.h"

namespace dn::cpu {
namespace {

constexpr int64_t kRowBlock = 256;                    // rows against one panel block: 256 KB of packed A
constexpr int64_t kPackedNumbers = int64_t{8} << 20;  // packed A kept at a time: 16 MB, or kRowBlock rows
constexpr int64_t kGroup = 8;                         // B is packed 8 panels ...
constexpr int64_t kSegment = 3;                       // ... by 3 blocks at a time: 768 KB
constexpr int64_t kPanelBlock = kAmxDepth * kGemmPanel;
constexpr int64_t kStripBlock = kAmxDepth * kAmxRows;
constexpr int64_t kPackAlone = 32768;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rows [m_begin, m_begin + rows) of a product and their packed A: [block of kAmxDepth][strip of 16
// rows][step] tiles.
struct Chunk {
  const GemmProduct& p;
  int64_t m_begin;
  int64_t rows;
  uint16_t* packed_a;

  uint16_t* strip(int64_t block, int64_t index) const {
    return packed_a + (block * ceil_div(rows, kAmxRows) + index) * kStripBlock;
  }
};

void pack_strip(const Chunk& chunk, int64_t block, int64_t index) {
  const GemmProduct& p = chunk.p;
  const int64_t k = block * kAmxDepth, depth = std::min(kAmxDepth, p.K - k);
  const int64_t m = chunk.m_begin + index * kAmxRows,
                count = std::min(kAmxRows, chunk.rows - index * kAmxRows);
  uint16_t* const dst = chunk.strip(block, index);
  if (p.a_layout == GemmLayout::kTransposed) {
    kGemmAmx.pack_columns(dst, kAmxTile, p.a + k * p.a_stride + m, p.a_stride, count, depth, true);
    return;
  }
  const float* rows[kAmxRows] = {};
  for (int64_t r = 0; r < count; ++r) rows[r] = (p.a_rows ? p.a_rows[m + r] : p.a + (m + r) * p.a_stride) + k;
  kGemmAmx.pack_rows(dst, kAmxTile, rows, count, depth, false);
}

// Packs the block of panels [panel_begin, panel_end), kPanelBlock numbers apart. Step by step where the rows
// of B run across panels, so that whole runs of memory are read.
void pack_panels(const GemmProduct& p, int64_t panel_begin, int64_t panel_end, int64_t k, int64_t depth,
                 uint16_t* buffer) {
  const bool transposed = p.b_layout == GemmLayout::kTransposed;
  const int64_t strip = transposed ? depth : kAmxStep;
  for (int64_t d = 0; d < depth; d += strip) {
    const int64_t strip_depth = std::min(strip, depth - d);
    for (int64_t half = 2 * panel_begin; half < 2 * panel_end; ++half) {
      const int64_t panel = half / 2, n = half * 16, count = std::clamp<int64_t>(p.N - n, 0, 16);
      uint16_t* const dst =
          buffer + (panel - panel_begin) * kPanelBlock + (d / kAmxStep * 2 + half % 2) * kAmxTile;
      if (transposed) {
        const float* rows[16] = {};
        for (int64_t i = 0; i < count; ++i) rows[i] = p.b + (n + i) * p.b_stride + k;
        kGemmAmx.pack_rows(dst, 2 * kAmxTile, rows, count, depth, true);
      } else if (p.b_layout == GemmLayout::kPanels) {
        const float* const src = p.b + (panel * p.K + k + d) * kGemmPanel + half % 2 * 16;
        kGemmAmx.pack_columns(dst, 2 * kAmxTile, src, kGemmPanel, 16, strip_depth, false);
      } else {
        kGemmAmx.pack_columns(dst, 2 * kAmxTile, p.b + (k + d) * p.b_stride + n, p.b_stride, count,
                              strip_depth, false);
      }
    }
  }
}

// One block of the reduction for strips [strip_begin, strip_end) of the chunk and panels [panel_begin,
// panel_end).
void multiply_block(const Chunk& chunk, int64_t block, int64_t strip_begin, int64_t strip_end,
                    int64_t panel_begin, int64_t panel_end, const uint16_t* buffer) {
  const GemmProduct& p = chunk.p;
  const int64_t k = block * kAmxDepth, depth = std::min(kAmxDepth, p.K - k);
  const bool finish = depth == p.K - k && (p.bias || p.gelu || p.residual);
  for (int64_t panel = panel_begin; panel < panel_end; ++panel, buffer += kPanelBlock) {
    const int64_t n = panel * kGemmPanel, cols = std::min(kGemmPanel, p.N - n);
    for (int64_t s = strip_begin; s < strip_end; s += 2) {
      const int64_t m = chunk.m_begin + s * kAmxRows;
      const int64_t rows =
          std::min(std::min<int64_t>(2, strip_end - s) * kAmxRows, chunk.rows - s * kAmxRows);
      float* const c = p.c + m * p.c_stride + n;
      kGemmAmx.tile({c, p.c_stride, rows, cols, chunk.strip(block, s),
                     s + 1 < strip_end ? chunk.strip(block, s + 1) : nullptr, buffer,
                     ceil_div(depth, kAmxStep), p.accumulate || block > 0});
      if (finish) {
        const int64_t extra = m * p.extra_stride + n;
        kGemmAmx.finish({c, p.c_stride, rows, cols, p.bias ? p.bias + n : nullptr, p.gelu,
                         p.pre ? p.pre + extra : nullptr, p.residual ? p.residual + extra : nullptr,
                         p.extra_stride});
      }
    }
  }
}

// C of strips [strip_begin, strip_end) of the chunk and panels [panel_begin, panel_end), in the order of
// gemm.cpp.
void multiply_group(const Chunk& chunk, int64_t strip_begin, int64_t strip_end, int64_t panel_begin,
                    int64_t panel_end, uint16_t* buffer) {
  const GemmProduct& p = chunk.p;
  const int64_t blocks = ceil_div(p.K, kAmxDepth), block_numbers = (panel_end - panel_begin) * kPanelBlock;
  for (int64_t first = 0; first < blocks; first += kSegment) {
    const int64_t last = std::min(blocks, first + kSegment);
    for (int64_t block = first; block < last; ++block) {
      const int64_t k = block * kAmxDepth;
      pack_panels(p, panel_begin, panel_end, k, std::min(kAmxDepth, p.K - k),
                  buffer + (block - first) * block_numbers);
    }
    for (int64_t s = strip_begin; s < strip_end; s += kRowBlock / kAmxRows) {
      for (int64_t block = first; block < last; ++block) {
        multiply_block(chunk, block, s, std::min(strip_end, s + kRowBlock / kAmxRows), panel_begin, panel_end,
                       buffer + (block - first) * block_numbers);
      }
    }
  }
}

void multiply_chunk(const Cpu& cpu, const Chunk& chunk, uint16_t* buffers) {
  const GemmProduct& p = chunk.p;
  const int64_t blocks = ceil_div(p.K, kAmxDepth), strips = ceil_div(chunk.rows, kAmxRows);
  const int pack_threads = chunk.rows * p.K <= kPackAlone ? 1 : cpu.threads;
  parallel(pack_threads, blocks * strips,
           [&](int64_t task, int) { pack_strip(chunk, task / strips, task % strips); });

  const int64_t panels = ceil_div(p.N, kGemmPanel), wanted = int64_t{2} * cpu.threads;
  // Fewer and larger tasks than in fp32: packing B and reading A again weigh more here.
  const int64_t group = std::clamp<int64_t>(ceil_div(panels, wanted), 1, kGroup);
  const int64_t groups = ceil_div(panels, group);
  int64_t row_parts = 1;
  if (cpu.threads > 1 && groups < wanted)
    row_parts = std::clamp<int64_t>(wanted / groups, 1, ceil_div(strips, 4));
  parallel(cpu.threads, groups * row_parts, [&](int64_t task, int worker) {
    const int64_t part = task % row_parts, panel = task / row_parts * group;
    kGemmAmx.begin();
    multiply_group(chunk, strips * part / row_parts, strips * (part + 1) / row_parts, panel,
                   std::min(panels, panel + group), buffers + worker * kGroup * kSegment * kPanelBlock);
    kGemmAmx.end();
  });
}

}  // namespace

void gemm_bf16(const Cpu& cpu, const GemmProduct& p) {
  const int64_t padded_k = ceil_div(p.K, kAmxDepth) * kAmxDepth;
  const int64_t most_rows = std::max(kRowBlock, kPackedNumbers / padded_k / kRowBlock * kRowBlock);
  const int64_t padded_rows = ceil_div(std::min(p.M, most_rows), kAmxRows) * kAmxRows;
  const int64_t buffer_numbers = int64_t{cpu.threads} * kGroup * kSegment * kPanelBlock;
  uint16_t* const scratch =
      reinterpret_cast<uint16_t*>(gemm_scratch((padded_rows * padded_k + buffer_numbers) / 2));
  for (int64_t m = 0; m < p.M; m += most_rows) {
    multiply_chunk(cpu, {p, m, std::min(most_rows, p.M - m), scratch + buffer_numbers}, scratch);
  }
}

}  // namespace dn::cpu
