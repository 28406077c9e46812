// The bf16 matrix product on AMX or AVX512_BF16: operands are rounded to bf16 as they are packed into tiles.
// A segment of the reduction at a time, B is packed once for all rows and A in chunks of rows that stay in L2
// while they meet every column. An element is one chain over the reduction, a segment continuing where the
// last one stored; rows past the end are zero rows of a tile, so a row's numbers never depend on its
// neighbours.

#include <algorithm>

#include "cpu/gemm.h"
#include "cpu/isa.h"
#include "cpu/thread_pool.h"

namespace dn::cpu {
namespace {

constexpr int64_t kWholeDepth = 4096;                  // reductions up to here are one segment
constexpr int64_t kSegment = 1024;                     // of longer ones
constexpr int64_t kPackedB = int64_t{8} << 20;         // numbers of B packed at a time: 16 MB
constexpr int64_t kPackedA = int64_t{512} << 10;       // numbers of A packed at a time for each thread: 1 MB
constexpr int64_t kGroupNumbers = int64_t{256} << 10;  // of B that a task meets rows with: 512 KB, in L2
constexpr int64_t kPackAlone =
    32768;  // fewer numbers are packed by the caller: a parallel region would cost more
constexpr int64_t kTasksPerThread = 4;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rows [m, m + rows) times columns [n, n + cols) over [k, k + depth) of the reduction. Packed A: [strip of 16
// rows] [step] tiles; packed B: [panel][step][half] tiles.
struct Block {
  const GemmProduct& p;
  const Bf16Kernels& kernels;
  int64_t k, depth;
  int64_t n, cols;
  int64_t m, rows;
  uint16_t* a;
  uint16_t* b;

  int64_t steps() const { return ceil_div(depth, kBf16Step); }
  int64_t strips() const { return ceil_div(rows, kBf16Rows); }
  int64_t panels() const { return ceil_div(cols, kGemmPanel); }
  uint16_t* strip(int64_t index) const { return a + index * steps() * kBf16Tile; }
  uint16_t* panel(int64_t index) const { return b + index * steps() * 2 * kBf16Tile; }
};

// The unit of packing: what lies together in memory. One strip, panel half or, where rows of the operand run
// across the reduction, one step of all strips or halves.
int64_t pack_a_tasks(const Block& x) {
  return x.p.a_layout == GemmLayout::kTransposed ? x.steps() : x.strips();
}

void pack_a(const Block& x, int64_t task) {
  const GemmProduct& p = x.p;
  if (p.a_layout == GemmLayout::kTransposed) {
    const int64_t d = task * kBf16Step, depth = std::min(kBf16Step, x.depth - d);
    const float* const src = p.a + (x.k + d) * p.a_stride + x.m;
    for (int64_t s = 0; s < x.strips(); ++s) {
      const int64_t count = std::min(kBf16Rows, x.rows - s * kBf16Rows);
      x.kernels.pack_columns(x.strip(s) + task * kBf16Tile, kBf16Tile, src + s * kBf16Rows, p.a_stride, count,
                             depth, true);
    }
    return;
  }
  const int64_t m = x.m + task * kBf16Rows, count = std::min(kBf16Rows, x.m + x.rows - m);
  const float* rows[kBf16Rows] = {};
  for (int64_t r = 0; r < count; ++r)
    rows[r] = (p.a_rows ? p.a_rows[m + r] : p.a + (m + r) * p.a_stride) + x.k;
  x.kernels.pack_rows(x.strip(task), kBf16Tile, rows, count, x.depth, false);
}

int64_t pack_b_tasks(const Block& x) {
  return x.p.b_layout == GemmLayout::kPlain ? x.steps() : 2 * x.panels();
}

void pack_b(const Block& x, int64_t task) {
  const GemmProduct& p = x.p;
  const auto columns_of = [&](int64_t half) { return std::clamp<int64_t>(x.cols - half * 16, 0, 16); };
  if (p.b_layout == GemmLayout::kPlain) {
    const int64_t d = task * kBf16Step, depth = std::min(kBf16Step, x.depth - d);
    const float* const src = p.b + (x.k + d) * p.b_stride + x.n;
    for (int64_t half = 0; half < 2 * x.panels(); ++half) {
      uint16_t* const dst = x.panel(half / 2) + (2 * task + half % 2) * kBf16Tile;
      x.kernels.pack_columns(dst, 2 * kBf16Tile, src + half * 16, p.b_stride, columns_of(half), depth, false);
    }
    return;
  }
  uint16_t* const dst = x.panel(task / 2) + task % 2 * kBf16Tile;
  if (p.b_layout == GemmLayout::kPanels) {
    const float* const src = p.b + ((x.n / kGemmPanel + task / 2) * p.K + x.k) * kGemmPanel + task % 2 * 16;
    x.kernels.pack_columns(dst, 2 * kBf16Tile, src, kGemmPanel, 16, x.depth, false);
    return;
  }
  const int64_t count = columns_of(task);
  const float* rows[16] = {};
  for (int64_t i = 0; i < count; ++i) rows[i] = p.b + (x.n + task * 16 + i) * p.b_stride + x.k;
  x.kernels.pack_rows(dst, 2 * kBf16Tile, rows, count, x.depth, true);
}

// Strips [strip_begin, strip_end), two at a time, against panels [panel_begin, panel_end): along the rows of
// C.
void multiply(const Block& x, int64_t strip_begin, int64_t strip_end, int64_t panel_begin,
              int64_t panel_end) {
  const GemmProduct& p = x.p;
  const bool finish = x.k + x.depth == p.K && has_finish(p);
  for (int64_t s = strip_begin; s < strip_end; s += 2) {
    const bool two = s + 1 < strip_end;
    const int64_t m = x.m + s * kBf16Rows;
    const int64_t rows = std::min(two ? 2 * kBf16Rows : kBf16Rows, x.m + x.rows - m);
    for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
      const int64_t n = x.n + panel * kGemmPanel, cols = std::min(kGemmPanel, x.n + x.cols - n);
      const GemmFinish then = finish_of(p, m, n, rows, cols);
      x.kernels.tile({then.c, p.c_stride, rows, cols, x.strip(s), two ? x.strip(s + 1) : nullptr,
                      x.panel(panel), x.steps(), p.accumulate || x.k > 0, finish ? &then : nullptr});
    }
  }
}

void multiply_block(const Cpu& cpu, const Block& x) {
  const int64_t wanted = kTasksPerThread * cpu.threads;
  const int64_t group = std::clamp<int64_t>(kGroupNumbers / (x.steps() * 2 * kBf16Tile), 1, x.panels());
  int64_t groups = ceil_div(x.panels(), group);
  const int64_t pairs = ceil_div(x.strips(), 2);
  const int64_t parts = cpu.threads == 1 ? 1 : std::clamp<int64_t>(ceil_div(wanted, groups), 1, pairs);
  if (cpu.threads > 1 && groups * parts < wanted) groups = std::min(x.panels(), ceil_div(wanted, parts));
  parallel(cpu.threads, groups * parts, [&](int64_t task, int) {
    const int64_t part = task % parts, g = task / parts;
    x.kernels.begin();
    multiply(x, pairs * part / parts * 2, std::min(x.strips(), pairs * (part + 1) / parts * 2),
             x.panels() * g / groups, x.panels() * (g + 1) / groups);
    x.kernels.end();
  });
}

}  // namespace

const Bf16Kernels* bf16_kernels(Isa isa) {
  if (isa >= Isa::kAmx && kGemmBf16Amx.tile) return &kGemmBf16Amx;
  if (isa >= Isa::kAvx512 && has_fast_bf16() && kGemmBf16Avx512.tile) return &kGemmBf16Avx512;
  return nullptr;
}

void gemm_bf16(const Cpu& cpu, const GemmProduct& p) {
  const Bf16Kernels& kernels = *bf16_kernels(cpu.isa);
  const int64_t deepest = p.K <= kWholeDepth ? p.K : kSegment, steps = ceil_div(deepest, kBf16Step);
  const int64_t most_cols =
      std::min(ceil_div(p.N, kGemmPanel), std::max<int64_t>(1, kPackedB / (steps * 2 * kBf16Tile))) *
      kGemmPanel;
  const int64_t most_pairs = std::max<int64_t>(2, kPackedA * cpu.threads / (steps * 2 * kBf16Tile));
  const int64_t most_rows = std::min(ceil_div(p.M, 2 * kBf16Rows), most_pairs) * 2 * kBf16Rows;
  uint16_t* const b = reinterpret_cast<uint16_t*>(
      gemm_scratch((most_cols / kGemmPanel * 2 + most_rows / kBf16Rows) * steps * kBf16Tile / 2));
  uint16_t* const a = b + most_cols / kGemmPanel * 2 * steps * kBf16Tile;

  for (int64_t k = 0; k < p.K; k += deepest) {
    const int64_t depth = std::min(deepest, p.K - k);
    for (int64_t n = 0; n < p.N; n += most_cols) {
      const int64_t cols = std::min(most_cols, p.N - n);
      for (int64_t m = 0; m < p.M; m += most_rows) {
        const Block x = {p, kernels, k, depth, n, cols, m, std::min(most_rows, p.M - m), a, b};
        const int64_t b_tasks = m == 0 ? pack_b_tasks(x) : 0, a_tasks = pack_a_tasks(x);
        const int64_t numbers = (x.rows + (m == 0 ? cols : 0)) * depth;
        parallel(numbers <= kPackAlone ? 1 : cpu.threads, b_tasks + a_tasks,
                 [&](int64_t task, int) { task < b_tasks ? pack_b(x, task) : pack_a(x, task - b_tasks); });
        multiply_block(cpu, x);
      }
    }
  }
}

}  // namespace dn::cpu
