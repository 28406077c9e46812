// The fp32 matrix product. Rows of A are packed tile by tile, columns of B are panels; a thread keeps a block
// of the reduction of some panels in L2 and meets it with tiles of A, while lines of what comes next are
// asked for between the multiply-adds. A product is cut into parts of its rows and groups of its panels, all
// rows packed first, or, with many rows and a small B, by rows alone, all of B packed first. Neither changes
// a bit.

#include "cpu/gemm.h"

#include <algorithm>
#include <atomic>

#include "cpu/gemm_chunk.h"
#include "cpu/scratch.h"
#include "cpu/thread_pool.h"

namespace dn::cpu {
namespace {

// So few rows are bound by reading the weight, and all of their packed A fits in L2.
constexpr int64_t kFewRows = 32;
// Packed A kept at a time when cut by columns: 16 MB, or the rows of a block when they are longer.
constexpr int64_t kPackedFloats = int64_t{4} << 20;
// A longer reduction, of head_cross_entropy over the vocabulary, is cut: every task reads all of packed A,
// which then comes from L3.
constexpr int64_t kMostDepth = 6144;
// Cut by rows: from so many rows on, and for B of at most so many numbers (1 MB, in L2).
constexpr int64_t kManyRows = 2048;
constexpr int64_t kSmallB = int64_t{256} << 10;
constexpr int64_t kSmallDepth = 1024;
// So many of B (32 KB) stay in L1 while a tile of A passes by.
constexpr int64_t kNearestFloats = int64_t{8} << 10;
// Below this many elements A is packed by the caller alone: a parallel region would cost more.
constexpr int64_t kPackAlone = 32768;
// Rows a thread needs to have all of a packed B pass by for them alone: it comes from memory at 7 GB/s then.
constexpr int64_t kOwnRows = 64;
// So many of C (2 MB) do not stay in a core's caches until somebody reads them.
constexpr int64_t kStreamedFloats = int64_t{512} << 10;
// Numbers of a transposed B that every thread packs for itself (4 MB).
constexpr int64_t kOwnB = int64_t{1} << 20;

// After the last tile of a task: orders streamed stores before what other threads do next.
void end_streams(const GemmProduct& p) {
  if (p.stream) std::atomic_thread_fence(std::memory_order_seq_cst);
}

// What a thread needs for B: a block that becomes packed, and a block of a panel that is scaled for pairs.
int64_t worker_floats(const GemmProduct& p, const GemmKernels& kernels) {
  return (p.b_layout == GemmLayout::kPanels ? 0 : kBlockFloats) +
         (kernels.pairs ? kernels.depth * kGemmPanel : 0);
}

// Tiles [tile_begin, tile_end) of the chunk, at most a row block, against packed panels [panel_begin,
// panel_end). next_tiles: where those begin that follow in time. after: the panel that follows, or null.
// scaled: kernels.depth * kGemmPanel, for pairs.
void multiply_packed(const GemmChunk& chunk, int64_t tile_begin, int64_t tile_end, int64_t next_tiles,
                     int64_t panel_begin, int64_t panel_end, const float* after, float* scaled) {
  const GemmProduct& p = chunk.p;
  const int64_t blocks = chunk.blocks(), tiles = tile_end - tile_begin;
  const bool is_alone = chunk.tiles == 1;  // panels then follow each other as they lie
  const auto b_of = [&](int64_t block, int64_t panel) {
    return p.b + (panel * p.K + chunk.k_begin(block)) * kGemmPanel;
  };
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t next_block = block + 1 < blocks ? block + 1 : 0, uses = tiles * (panel_end - panel_begin);
    const int64_t first = next_block > 0 ? tile_begin : next_tiles;
    const int64_t last = std::min(chunk.tiles, first + tiles);
    Ahead ahead_a = ahead_of_tiles(chunk, next_block, first, last, uses);
    for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
      const float* next = panel + 1 < panel_end ? b_of(block, panel + 1)
                          : next_block > 0      ? b_of(next_block, panel_begin)
                                                : after;
      const int64_t next_depth = chunk.depth(panel + 1 < panel_end ? block : next_block);
      Ahead ahead_b;
      if (next != nullptr && !is_alone) ahead_b = ahead_of(next, 1, next_depth * kGemmPanel, 0, tiles);
      PanelBlock of_panel = {b_of(block, panel)};
      of_panel.fetch = is_alone;
      of_panel.scaled = scaled;
      multiply_panel(chunk, block, tile_begin, tile_end, panel, of_panel, ahead_a, ahead_b);
    }
  }
}

// C of tiles [tile_begin, tile_end) of the chunk and panels [panel_begin, panel_end) of a B that becomes
// packed fp32 here. buffer: worker_floats. next_panel: where the next task of this thread may begin.
void multiply_plain(const GemmChunk& chunk, int64_t tile_begin, int64_t tile_end, int64_t panel_begin,
                    int64_t panel_end, int64_t next_panel, float* buffer) {
  const GemmProduct& p = chunk.p;
  const int64_t panel_floats = chunk.kernels.depth * kGemmPanel, blocks = chunk.blocks();
  const int64_t tiles = tile_end - tile_begin, parts = chunk.row_blocks(tiles);
  const int64_t next_end = std::min(ceil_div(p.N, kGemmPanel), next_panel + panel_end - panel_begin);
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t k = chunk.k_begin(block), depth = chunk.depth(block);
    const int64_t first = p.b_layout == GemmLayout::kTransposed ? panel_begin
                          : packs_on_the_way(p, panel_end - 1)  ? panel_end
                                                                : panel_end - 1;
    pack_panels(p, chunk.kernels, first, panel_end, k, depth, buffer + (first - panel_begin) * panel_floats,
                panel_floats);
    Ahead ahead_b;
    const int64_t width = panel_end - panel_begin;
    if (block + 1 < blocks) {
      ahead_b = ahead_of_panels(p, panel_begin, panel_end, k + depth, chunk.depth(block + 1), tiles * width);
    } else if (next_panel < next_end) {
      ahead_b = ahead_of_panels(p, next_panel, next_end, 0, chunk.depth(0), tiles * width);
    }
    const auto part_begin = [&](int64_t part) { return tile_begin + tiles * part / parts; };
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t begin = part_begin(part), end = part_begin(part + 1);
      const int64_t next_part = (part + 1) % parts, next_block = (block + (next_part == 0)) % blocks;
      Ahead ahead_a = ahead_of_tiles(chunk, next_block, part_begin(next_part), part_begin(next_part + 1),
                                     (end - begin) * width);
      for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
        float* const packed = buffer + (panel - panel_begin) * panel_floats;
        const bool lies = part == 0 && packs_on_the_way(p, panel);
        const bool is_read_once = tiles == 1 && p.b_layout == GemmLayout::kBf16Panels;
        PanelBlock of_panel =
            lies ? lying_block(p, panel, k, is_read_once ? nullptr : packed) : PanelBlock{packed};
        of_panel.scaled = buffer + kBlockFloats;
        multiply_panel(chunk, block, begin, end, panel, of_panel, ahead_a, ahead_b);
      }
    }
  }
}

// C of tiles [tile_begin, tile_end) of the chunk and panels [panel_begin, panel_end).
void multiply_group(const GemmChunk& chunk, int64_t tile_begin, int64_t tile_end, int64_t panel_begin,
                    int64_t panel_end, int64_t next_panel, float* buffer) {
  const GemmProduct& p = chunk.p;
  if (p.b_layout == GemmLayout::kBf16Panels && chunk.rows <= kFewRows) {
    for (int64_t panel = panel_begin; panel < panel_end; ++panel) {  // in the order it lies, as below
      multiply_plain(chunk, tile_begin, tile_end, panel, panel + 1,
                     panel + 1 < panel_end ? panel + 1 : next_panel, buffer);
    }
    return;
  }
  if (p.b_layout != GemmLayout::kPanels)
    return multiply_plain(chunk, tile_begin, tile_end, panel_begin, panel_end, next_panel, buffer);
  const int64_t tiles = tile_end - tile_begin;
  const int64_t panel_floats = p.K * kGemmPanel;
  const float* const after = next_panel * kGemmPanel < p.N ? p.b + next_panel * panel_floats : nullptr;
  if (chunk.rows <= kFewRows) {  // the weight is read once, in the order it lies in memory
    for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
      multiply_packed(chunk, tile_begin, tile_end, tile_begin, panel, panel + 1,
                      panel + 1 < panel_end ? p.b + (panel + 1) * panel_floats : after, buffer);
    }
    return;
  }
  const int64_t parts = chunk.row_blocks(tiles);
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t begin = tile_begin + tiles * part / parts, end = tile_begin + tiles * (part + 1) / parts;
    multiply_packed(chunk, begin, end, part + 1 < parts ? end : tile_begin, panel_begin, panel_end,
                    part + 1 < parts ? p.b + panel_begin * panel_floats : after, buffer);
  }
}

// How a chunk is cut into tasks: parts of its rows, a task for every group of panels in each.
struct Cut {
  int64_t parts;
  PanelGroups groups;
};

// With enough rows every thread has some of its own, packs them and meets them with all panels: what it packs
// and writes stays in its own caches. Else columns are cut, and rows only where those give too few tasks. A
// plain B is packed once for every part: on the way, or where it lies transposed by a pass of its own, which
// only a small one is worth.
Cut cut_chunk(const Cpu& cpu, const GemmProduct& p, const GemmKernels& kernels, int64_t rows) {
  const int64_t most = block_panels(kernels), wanted = kTasksPerThread * cpu.threads;
  const bool may_own = p.b_layout != GemmLayout::kTransposed || p.K * p.N <= kOwnB;
  const int64_t owners = may_own ? std::min<int64_t>(cpu.threads, rows / kOwnRows) : 1;
  const PanelGroups groups(p, most, cpu.threads, wanted);
  if (owners > 1 && groups.parts == 1)
    return {owners, PanelGroups(p, most, cpu.threads, ceil_div(wanted, owners))};
  const int64_t spare = cpu.threads > 1 && groups.count < wanted ? wanted / groups.count : 1;
  return {std::clamp<int64_t>(spare, 1, ceil_div(ceil_div(rows, kernels.max_rows), 4)), groups};
}

void multiply_chunk(const Cpu& cpu, const GemmChunk& chunk, const PanelGroups& groups, float* buffers) {
  const GemmProduct& p = chunk.p;
  const int64_t tiles = chunk.tiles;
  parallel_near(chunk.rows * p.K <= kPackAlone ? 1 : cpu.threads, tiles,
                [&](int64_t tile, int) { pack_a(chunk, tile); });
  parallel_near(cpu.threads, chunk.parts * groups.count, [&](int64_t task, int worker) {
    const int64_t part = task / groups.count, group = task % groups.count;
    multiply_group(chunk, tiles * part / chunk.parts, tiles * (part + 1) / chunk.parts, groups.begin(group),
                   groups.end(group), groups.begin((group + 1) % groups.count),
                   buffers + worker * worker_floats(p, chunk.kernels));
    end_streams(p);
  });
}

void multiply_by_columns(const Cpu& cpu, const GemmProduct& p, const GemmKernels& kernels) {
  const int64_t row_block = block_rows(kernels);
  const int64_t most_rows = std::min(p.M, std::max(row_block, kPackedFloats / p.K / row_block * row_block));
  const int64_t buffer_floats = cpu.threads * worker_floats(p, kernels);
  float* const scratch = gemm_scratch(most_rows * packed_row(kernels, p.K) + buffer_floats);
  for (int64_t m = 0; m < p.M; m += most_rows) {
    const int64_t rows = std::min(most_rows, p.M - m);
    const Cut cut = cut_chunk(cpu, p, kernels, rows);
    multiply_chunk(cpu, GemmChunk(p, kernels, m, rows, scratch + buffer_floats, cut.parts), cut.groups,
                   scratch);
  }
}

// The steps [k, k + depth) of the reduction, with what happens to a finished element only at their end.
GemmProduct part_of(const GemmProduct& whole, int64_t k, int64_t depth) {
  GemmProduct p = whole;
  p.a += p.a_layout == GemmLayout::kTransposed ? k * p.a_stride : k;
  p.b += p.b_layout == GemmLayout::kTransposed ? k : k * p.b_stride;
  p.K = depth;
  p.accumulate = whole.accumulate || k > 0;
  if (k + depth < whole.K) {
    p.bias = p.residual = nullptr;
    p.pre = nullptr;
    p.gelu = false;
  }
  return p;
}

void multiply_by_parts(const Cpu& cpu, const GemmProduct& p, const GemmKernels& kernels) {
  const int64_t step = kMostDepth / kernels.depth * kernels.depth;
  for (int64_t k = 0; k < p.K; k += step)
    multiply_by_columns(cpu, part_of(p, k, std::min(step, p.K - k)), kernels);
}

// Not for kernels of pairs: their B is scaled for every few tiles.
void multiply_by_rows(const Cpu& cpu, const GemmProduct& plain, const GemmKernels& kernels) {
  GemmProduct p = plain;
  const int64_t panels = ceil_div(p.N, kGemmPanel), panel_floats = p.K * kGemmPanel;
  const int64_t b_floats = p.b_layout == GemmLayout::kPanels ? 0 : panels * panel_floats;
  const int64_t task_rows = ceil_div(block_rows(kernels), kernels.max_rows) * kernels.max_rows;
  const int64_t tasks = ceil_div(p.M, task_rows), task_floats = ceil_div(task_rows * p.K, kLine) * kLine;
  float* const scratch = gemm_scratch(b_floats + cpu.threads * task_floats);
  if (b_floats > 0) {
    parallel(cpu.threads, panels, [&](int64_t panel, int) {
      pack_panels(plain, kernels, panel, panel + 1, 0, plain.K, scratch + panel * panel_floats, panel_floats);
    });
    p.b = scratch;
    p.b_layout = GemmLayout::kPanels;
  }
  parallel(cpu.threads, tasks, [&](int64_t task, int worker) {
    const int64_t m = p.M * task / tasks, m_end = p.M * (task + 1) / tasks;
    const GemmChunk chunk(p, kernels, m, m_end - m, scratch + b_floats + worker * task_floats);
    const int64_t tiles = chunk.tiles, blocks = chunk.blocks();
    for (int64_t tile = 0; tile < tiles; ++tile) pack_a(chunk, tile);
    Ahead ahead, none;  // the rows of the next task; all of B is near
    const int64_t next = p.M * (task + cpu.threads) / tasks, uses = tiles * panels * blocks;
    if (task + cpu.threads < tasks && p.a_layout == GemmLayout::kTransposed) {
      ahead = ahead_of(p.a + next, p.K, chunk.rows, p.a_stride, uses);
    } else if (task + cpu.threads < tasks && !p.a_rows) {
      ahead = ahead_of(p.a + next * p.a_stride, chunk.rows, p.K, p.a_stride, uses);
    }
    // Where a panel's block stays in L1 all tiles meet it before the next one; else it comes from L2 anyway,
    // and tiles go one by one, each along its rows of C.
    const int64_t together = kernels.depth * kGemmPanel <= kNearestFloats ? tiles : 1;
    for (int64_t tile = 0; tile < tiles; tile += together) {
      for (int64_t block = 0; block < blocks; ++block) {
        for (int64_t panel = 0; panel < panels; ++panel) {
          multiply_panel(chunk, block, tile, tile + together, panel,
                         {p.b + panel * panel_floats + chunk.k_begin(block) * kGemmPanel}, ahead, none);
        }
      }
    }
    end_streams(p);
  });
}

bool lies_scaled(const GemmProduct& p) {
  if (!p.b_pairs || !pairs_pay(Isa::kAvx512, p.K)) return false;
  const int64_t blocks = ceil_div(p.K, kPairBlock) * ceil_div(p.N, kGemmPanel);
  return std::any_of(p.b_pairs, p.b_pairs + blocks, is_scaled);
}

// With kernels that multiply otherwise, a weight that was packed for pairs: some panels at a time, as they
// were. Only for callers who take another instruction set, or bf16, than the weight was packed for.
void gemm_unscaled(const Cpu& cpu, const GemmProduct& whole, MatmulPrecision precision) {
  constexpr int64_t kColumns = 64 * kGemmPanel;
  static thread_local Scratch scratch;
  const int64_t blocks = ceil_div(whole.K, kPairBlock);
  float* const panels =
      scratch.reserve(std::min(kColumns, ceil_div(whole.N, kGemmPanel) * kGemmPanel) * whole.K);
  for (int64_t n = 0; n < whole.N; n += kColumns) {
    GemmProduct p = whole;
    p.N = std::min(kColumns, whole.N - n);
    p.c += n;
    if (p.bias) p.bias += n;
    if (p.pre) p.pre += n;
    if (p.residual) p.residual += n;
    p.b = panels;
    p.b_pairs = nullptr;
    parallel(cpu.threads, ceil_div(p.N, kGemmPanel), [&](int64_t panel, int) {
      const int64_t floats = whole.K * kGemmPanel;
      std::copy_n(whole.b + n * whole.K + panel * floats, floats, panels + panel * floats);
      for (int64_t block = 0; block < blocks; ++block) {
        const PairPanel& pairs = whole.b_pairs[(n / kGemmPanel + panel) * blocks + block];
        if (!is_scaled(pairs)) continue;
        unscale_rows(pairs, panels + (panel * whole.K + block * kPairBlock) * kGemmPanel,
                     std::min(kPairBlock, whole.K - block * kPairBlock));
      }
    });
    gemm(cpu, p, precision);
  }
}

GemmProduct plain_product(float* c, int64_t c_stride, const float* a, int64_t a_stride, const float* b,
                          int64_t b_stride, int64_t M, int64_t N, int64_t K, bool accumulate) {
  GemmProduct p;
  p.c = c;
  p.c_stride = c_stride;
  p.a = a;
  p.a_stride = a_stride;
  p.b = b;
  p.b_stride = b_stride;
  p.M = M;
  p.N = N;
  p.K = K;
  p.accumulate = accumulate;
  return p;
}

}  // namespace

const GemmKernels& gemm_kernels(Isa isa) {
  switch (isa) {
    case Isa::kPortable: return kGemmPortable;
    case Isa::kAvx2: return kGemmAvx2;
    case Isa::kAvx512:
    case Isa::kAmx: return kGemmAvx512;
  }
  return kGemmPortable;
}

float* gemm_scratch(int64_t floats) {
  thread_local Scratch scratch;
  return scratch.reserve(floats);
}

void gemm_empty(const Cpu& cpu, const GemmProduct& p) {
  for (int64_t m = 0; m < p.M; ++m) {
    float* const c = p.c + m * p.c_stride;
    if (!p.accumulate) std::fill(c, c + p.N, 0.0f);
    gemm_kernels(cpu.isa).finish(finish_of(p, m, 0, 1, p.N));
  }
}

void gemm_fp32(const Cpu& cpu, const GemmProduct& p) { gemm_fp32(cpu, p, gemm_kernels(cpu.isa)); }

void gemm_fp32(const Cpu& cpu, const GemmProduct& p, const GemmKernels& kernels) {
  const int64_t many = std::max<int64_t>(kManyRows, 2 * cpu.threads * block_rows(kernels));
  const bool by_rows = p.M >= many && p.K * p.N <= kSmallB && p.K <= kSmallDepth && !kernels.pairs;
  if (by_rows) return multiply_by_rows(cpu, p, kernels);
  const bool is_weight = p.b_layout == GemmLayout::kPanels || p.b_layout == GemmLayout::kBf16Panels;
  if (p.K > kMostDepth && !is_weight && !p.a_rows) return multiply_by_parts(cpu, p, kernels);
  multiply_by_columns(cpu, p, kernels);
}

void gemm(const Cpu& cpu, const GemmProduct& p, MatmulPrecision precision) {
  if (p.M <= 0 || p.N <= 0) return;
  if (p.K <= 0) return gemm_empty(cpu, p);
  const bool has_bf16 = p.b_layout == GemmLayout::kBf16Panels;
  const Bf16Kernels* tiles =
      has_bf16 || precision == MatmulPrecision::kBF16 ? bf16_kernels(cpu.isa) : nullptr;
  if (!tiles && !has_bf16) tiles = split_kernels(cpu.isa, p.K);
  const bool in_pairs = !tiles && !has_bf16 && pairs_pay(cpu.isa, p.K);
  if (!in_pairs && lies_scaled(p)) return gemm_unscaled(cpu, p, precision);
  if (tiles) return gemm_bf16(cpu, p, *tiles);
  gemm_fp32(cpu, p, in_pairs ? pair_kernels() : gemm_kernels(cpu.isa));
}

void gemm_nn(const Cpu& cpu, float* c, int64_t c_stride, const float* a, int64_t a_stride, const float* b,
             int64_t b_stride, int64_t M, int64_t N, int64_t K, bool accumulate, MatmulPrecision precision) {
  gemm(cpu, plain_product(c, c_stride, a, a_stride, b, b_stride, M, N, K, accumulate), precision);
}

void gemm_nt(const Cpu& cpu, float* c, int64_t c_stride, const float* a, int64_t a_stride, const float* b,
             int64_t b_stride, int64_t M, int64_t N, int64_t K, bool accumulate, MatmulPrecision precision) {
  GemmProduct p = plain_product(c, c_stride, a, a_stride, b, b_stride, M, N, K, accumulate);
  p.b_layout = GemmLayout::kTransposed;
  gemm(cpu, p, precision);
}

void gemm_tn(const Cpu& cpu, float* c, int64_t c_stride, const float* a, int64_t a_stride, const float* b,
             int64_t b_stride, int64_t M, int64_t N, int64_t K, bool accumulate, MatmulPrecision precision) {
  GemmProduct p = plain_product(c, c_stride, a, a_stride, b, b_stride, M, N, K, accumulate);
  p.a_layout = GemmLayout::kTransposed;
  constexpr uintptr_t kLineBytes = kLine * sizeof(float);
  p.stream = !accumulate && M * N >= kStreamedFloats && reinterpret_cast<uintptr_t>(c) % kLineBytes == 0 &&
             c_stride % kLine == 0;
  gemm(cpu, p, precision);
}

}  // namespace dn::cpu
