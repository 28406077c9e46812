// The matrix product on bf16 tiles, in bf16 or, with numbers of three parts, in fp32. A block of the
// reduction of one panel of B is packed into the thread's L2 and met with all rows of a chunk, whose packed A
// stays there too; while it is met the next one is packed. A weight packed as bf16 is met as it lies. An
// element is one chain over the reduction, a block continuing where the last one stored, and rows past the
// end are zero rows of a tile: an element depends on its row of A and its column of B only.

#include <algorithm>

#include "cpu/gemm.h"
#include "cpu/isa.h"
#include "cpu/thread_pool.h"

namespace dn::cpu {
namespace {

constexpr int64_t kBlockBytes = 4608;             // of a row in a block of the reduction
constexpr int64_t kPackedA = 128 * kBlockBytes;   // bytes of packed A that a thread meets a panel with
constexpr int64_t kOwnRows = 64;                  // that a thread wants for itself
constexpr int64_t kStreamRows = 2 * kBf16Rows;    // up to here packing takes longer than multiplying
constexpr int64_t kBuffers = 2;                   // blocks of a panel that a thread holds packed
constexpr int64_t kSplitDepth = 128;              // shorter reductions are faster in fp32
constexpr int64_t kPackAlone = 32768;             // fewer numbers of A are packed by the caller alone
constexpr int64_t kAnyPanels = int64_t{1} << 32;  // of a group

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rows [m, m + rows) over the segment [k, k + depth) of the reduction, which is cut into blocks of
// block_depth. Packed A: [block][strip of 16 rows][step][part] tiles.
struct Chunk {
  const GemmProduct& p;
  const Bf16Kernels& kernels;
  int64_t k, depth, block_depth;
  int64_t m, rows;
  uint16_t* a;

  int64_t blocks() const { return ceil_div(depth, block_depth); }
  int64_t depth_of(int64_t block) const { return std::min(block_depth, depth - block * block_depth); }
  int64_t steps(int64_t block) const { return ceil_div(depth_of(block), kBf16Step); }
  int64_t strips() const { return ceil_div(rows, kBf16Rows); }
  int64_t a_tile() const { return kernels.parts * kBf16Tile; }
  int64_t b_tiles() const { return kernels.parts * 2 * kBf16Tile; }
  uint16_t* strip(int64_t block, int64_t index) const {
    return a + (block * (block_depth / kBf16Step) * strips() + index * steps(block)) * a_tile();
  }
  bool is_last(int64_t block) const { return k + depth == p.K && block + 1 == blocks(); }
};

// The unit of packing A: a strip of a block or, where rows of A run across the reduction, one step of all
// strips.
int64_t pack_a_tasks(const Chunk& x) {
  return x.p.a_layout == GemmLayout::kTransposed ? ceil_div(x.depth, kBf16Step) : x.strips() * x.blocks();
}

void pack_a(const Chunk& x, int64_t task) {
  const GemmProduct& p = x.p;
  if (p.a_layout == GemmLayout::kTransposed) {
    const int64_t d = task * kBf16Step, block = d / x.block_depth;
    const int64_t offset = (d - block * x.block_depth) / kBf16Step * x.a_tile();
    const float* const src = p.a + (x.k + d) * p.a_stride + x.m;
    for (int64_t s = 0; s < x.strips(); ++s) {
      x.kernels.pack_columns(x.strip(block, s) + offset, kBf16Tile, src + s * kBf16Rows, p.a_stride,
                             std::min(kBf16Rows, x.rows - s * kBf16Rows), std::min(kBf16Step, x.depth - d),
                             true);
    }
    return;
  }
  const int64_t strip = task / x.blocks(), block = task % x.blocks();
  const int64_t m = x.m + strip * kBf16Rows, count = std::min(kBf16Rows, x.m + x.rows - m);
  const float* rows[kBf16Rows] = {};
  for (int64_t r = 0; r < count; ++r)
    rows[r] = (p.a_rows ? p.a_rows[m + r] : p.a + (m + r) * p.a_stride) + x.k + block * x.block_depth;
  x.kernels.pack_rows(x.strip(block, strip), kBf16Tile, rows, count, x.depth_of(block), false);
}

void pack_a(const Cpu& cpu, const Chunk& x) {
  parallel_near(x.rows * x.depth <= kPackAlone ? 1 : cpu.threads, pack_a_tasks(x),
                [&](int64_t task, int) { pack_a(x, task); });
}

// [k, k + depth) of panel n / kGemmPanel.
void pack_b(const Chunk& x, int64_t panel, int64_t k, int64_t depth, uint16_t* dst) {
  const GemmProduct& p = x.p;
  for (int64_t half = 0; half < 2; ++half, dst += kBf16Tile) {
    const int64_t n = panel * kGemmPanel + half * 16, count = std::clamp<int64_t>(p.N - n, 0, 16);
    if (p.b_layout == GemmLayout::kTransposed) {
      const float* rows[16] = {};
      for (int64_t i = 0; i < count; ++i) rows[i] = p.b + (n + i) * p.b_stride + k;
      x.kernels.pack_rows(dst, 2 * kBf16Tile, rows, count, depth, true);
    } else if (p.b_layout == GemmLayout::kPlain) {
      x.kernels.pack_columns(dst, 2 * kBf16Tile, p.b + k * p.b_stride + n, p.b_stride, count, depth, false);
    } else {
      x.kernels.pack_columns(dst, 2 * kBf16Tile, p.b + (panel * p.K + k) * kGemmPanel + half * 16, kGemmPanel,
                             16, depth, false);
    }
  }
}

// Strips [strip_begin, strip_end), two at a time, against a block of a panel, packed in b.
void multiply_panel(const Chunk& x, int64_t strip_begin, int64_t strip_end, int64_t panel, int64_t block,
                    const uint16_t* b, PanelPack* next) {
  const GemmProduct& p = x.p;
  const bool finish = x.is_last(block) && has_finish(p), lies = p.b_layout == GemmLayout::kBf16Panels;
  const int64_t n = panel * kGemmPanel, cols = std::min(kGemmPanel, p.N - n);
  const int64_t share = ceil_div(next->pairs, ceil_div(strip_end - strip_begin, 2));
  for (int64_t s = strip_begin; s < strip_end; s += 2) {
    const bool two = s + 1 < strip_end;
    const int64_t m = x.m + s * kBf16Rows;
    const int64_t rows = std::min(two ? 2 * kBf16Rows : kBf16Rows, x.m + x.rows - m);
    const GemmFinish then = finish_of(p, m, n, rows, cols);
    x.kernels.tile({then.c, p.c_stride, rows, cols, x.strip(block, s), two ? x.strip(block, s + 1) : nullptr,
                    b, x.steps(block), p.accumulate || x.k > 0 || block > 0, finish ? &then : nullptr, next,
                    std::min(share, next->pairs - next->done), 0, lies, lies && s == strip_begin});
  }
}

// Where block k of a panel begins in a B of whole steps.
const float* block_of(const GemmProduct& p, int64_t panel, int64_t k) {
  const int64_t n = panel * kGemmPanel;
  if (p.b_layout == GemmLayout::kPanels) return p.b + n * p.K + k * kGemmPanel;
  return p.b_layout == GemmLayout::kPlain ? p.b + k * p.b_stride + n : p.b + n * p.b_stride + k;
}

// Panels [panel_begin, panel_end) of a B of whole steps, a block after the other, while the next one is
// packed. buffers: kBuffers blocks of a panel, which take turns.
void multiply_ahead(const Chunk& x, int64_t strip_begin, int64_t strip_end, int64_t panel_begin,
                    int64_t panel_end, uint16_t* buffers) {
  alignas(64) float turned[PanelPack::kTurned];
  const GemmProduct& p = x.p;
  const int64_t blocks = x.blocks(), pieces = (panel_end - panel_begin) * blocks;
  const int64_t buffer_numbers = x.block_depth / kBf16Step * x.b_tiles();
  const auto src_of = [&](int64_t piece) {
    return block_of(p, panel_begin + piece / blocks, x.k + piece % blocks * x.block_depth);
  };
  const auto pack_of = [&](int64_t piece) {
    PanelPack pack;
    pack.src = src_of(piece);
    pack.src_stride = p.b_layout == GemmLayout::kPanels ? kGemmPanel : p.b_stride;
    pack.dst = buffers + piece % kBuffers * buffer_numbers;
    pack.pairs = x.depth_of(piece % blocks) / 2;
    if (piece + 1 < pieces) pack.after = src_of(piece + 1);
    if (p.b_layout == GemmLayout::kTransposed) pack.turned = turned;
    pack.cols = std::min(kGemmPanel, p.N - (panel_begin + piece / blocks) * kGemmPanel);
    return pack;
  };
  pack_b(x, panel_begin, x.k, x.depth_of(0), buffers);
  for (int64_t piece = 0; piece < pieces; ++piece) {
    PanelPack next = piece + 1 < pieces ? pack_of(piece + 1) : PanelPack();
    multiply_panel(x, strip_begin, strip_end, panel_begin + piece / blocks, piece % blocks,
                   buffers + piece % kBuffers * buffer_numbers, &next);
  }
}

// Panels of any B, kBuffers at a time.
void multiply_plain(const Chunk& x, int64_t strip_begin, int64_t strip_end, int64_t panel_begin,
                    int64_t panel_end, uint16_t* buffers) {
  const int64_t buffer_numbers = x.block_depth / kBf16Step * x.b_tiles();
  PanelPack nothing;
  for (int64_t first = panel_begin; first < panel_end; first += kBuffers) {
    const int64_t last = std::min(panel_end, first + kBuffers);
    for (int64_t block = 0; block < x.blocks(); ++block) {
      for (int64_t panel = first; panel < last; ++panel)
        pack_b(x, panel, x.k + block * x.block_depth, x.depth_of(block),
               buffers + (panel - first) * buffer_numbers);
      for (int64_t panel = first; panel < last; ++panel) {
        multiply_panel(x, strip_begin, strip_end, panel, block, buffers + (panel - first) * buffer_numbers,
                       &nothing);
      }
    }
  }
}

// Panels [panel_begin, panel_end) of a weight packed as bf16.
void multiply_lying(const Chunk& x, int64_t strip_begin, int64_t strip_end, int64_t panel_begin,
                    int64_t panel_end, uint16_t*) {
  PanelPack nothing;
  for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
    const float* const words = x.p.b + panel * bf16_panel_words(x.p.K);
    for (int64_t block = 0; block < x.blocks(); ++block) {
      const float* const b = words + bf16_words(x.k + block * x.block_depth);
      multiply_panel(x, strip_begin, strip_end, panel, block, reinterpret_cast<const uint16_t*>(b), &nothing);
    }
  }
}

// row_owners: parts of the rows that threads meet by themselves, at least, unless they have columns of their
// own.
void multiply_chunk(const Cpu& cpu, const Chunk& x, int64_t row_owners, uint16_t* buffers,
                    int64_t worker_numbers) {
  const GemmProduct& p = x.p;
  pack_a(cpu, x);
  const int64_t wanted = kTasksPerThread * cpu.threads, pairs = ceil_div(x.strips(), 2);
  const PanelGroups shared(p, kAnyPanels, cpu.threads, wanted);
  const int64_t owners = shared.parts > 1 ? 1 : row_owners;
  const PanelGroups groups =
      owners == 1 ? shared : PanelGroups(p, kAnyPanels, cpu.threads, ceil_div(wanted, owners));
  const int64_t least = std::min(owners, pairs);  // the last chunk may be low
  const int64_t parts = cpu.threads > 1 ? std::clamp<int64_t>(ceil_div(wanted, groups.count), least,
                                                              std::max(least, ceil_div(pairs, 2)))
                                        : 1;
  const bool ahead = x.depth % kBf16Step == 0 && (p.b_layout != GemmLayout::kPlain || p.N % kGemmPanel == 0);
  const auto multiply = p.b_layout == GemmLayout::kBf16Panels ? multiply_lying
                        : ahead                               ? multiply_ahead
                                                              : multiply_plain;
  parallel_near(cpu.threads, parts * groups.count, [&](int64_t task, int worker) {
    const int64_t part = task / groups.count, group = task % groups.count;
    const int64_t begin = pairs * part / parts * 2,
                  end = std::min(x.strips(), pairs * (part + 1) / parts * 2);
    uint16_t* const own = buffers + worker * worker_numbers;
    x.kernels.begin();
    multiply(x, begin, end, groups.begin(group), groups.end(group), own);
    x.kernels.end();
  });
}

// Panels [panel_begin, panel_end) of a packed weight of whole steps against one or two strips and the whole
// reduction. ring: kStreamSteps steps of a panel.
void multiply_panels(const Chunk& x, int64_t panel_begin, int64_t panel_end, uint16_t* ring) {
  const GemmProduct& p = x.p;
  const int64_t steps = x.steps(0);
  PanelPack stream;
  stream.is_stream = true;
  stream.src = block_of(p, panel_begin, 0);
  stream.src_stride = kGemmPanel;
  stream.dst = ring;
  stream.pairs = (panel_end - panel_begin) * steps * (kBf16Step / 2);
  const int64_t lead = std::min(kStreamLead, (panel_end - panel_begin) * steps);
  pack_b(x, panel_begin, 0, lead * kBf16Step, ring);
  stream.done = lead * (kBf16Step / 2);
  for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
    const int64_t n = panel * kGemmPanel, cols = std::min(kGemmPanel, p.N - n);
    const GemmFinish then = finish_of(p, x.m, n, x.rows, cols);
    x.kernels.tile({then.c, p.c_stride, x.rows, cols, x.strip(0, 0), x.strips() > 1 ? x.strip(0, 1) : nullptr,
                    ring, steps, p.accumulate, has_finish(p) ? &then : nullptr, &stream, 0,
                    (panel - panel_begin) * steps});
  }
}

// Up to two strips, and a packed weight of whole steps.
void multiply_stream(const Cpu& cpu, const GemmProduct& p, const Bf16Kernels& kernels) {
  const int64_t ring_numbers = kStreamSteps * kernels.parts * 2 * kBf16Tile;
  const int64_t a_numbers = ceil_div(p.M, kBf16Rows) * kBf16Rows * p.K * kernels.parts;
  uint16_t* const rings =
      reinterpret_cast<uint16_t*>(gemm_scratch((ring_numbers * cpu.threads + a_numbers) / 2));
  const Chunk x = {p, kernels, 0, p.K, p.K, 0, p.M, rings + ring_numbers * cpu.threads};
  pack_a(cpu, x);
  const PanelGroups groups(p, kAnyPanels, cpu.threads, kTasksPerThread * cpu.threads);
  parallel_near(cpu.threads, groups.count, [&](int64_t group, int worker) {
    kernels.begin();
    multiply_panels(x, groups.begin(group), groups.end(group), rings + worker * ring_numbers);
    kernels.end();
  });
}

// One or two rows, and a packed weight as it lies.
void multiply_few(const Cpu& cpu, const GemmProduct& p, const Bf16Kernels& kernels) {
  const SplitRowKernels& few = kSplitRowsAvx512;
  float* const a = gemm_scratch(p.M * 3 * p.K);
  for (int64_t m = 0; m < p.M; ++m)
    few.parts_of_row(a + m * 3 * p.K, p.K, p.a_rows ? p.a_rows[m] : p.a + m * p.a_stride, p.K);
  const PanelGroups groups(p, kAnyPanels, cpu.threads, kTasksPerThread * cpu.threads);
  parallel_near(cpu.threads, groups.count, [&](int64_t group, int) {
    kernels.begin();
    for (int64_t panel = groups.begin(group); panel < groups.end(group); ++panel) {
      const int64_t n = panel * kGemmPanel, cols = std::min(kGemmPanel, p.N - n);
      const GemmFinish then = finish_of(p, 0, n, p.M, cols);
      few.rows({then.c, p.c_stride, p.M, cols, a, p.K, p.b + panel * p.K * kGemmPanel, p.K, p.accumulate,
                has_finish(p) ? &then : nullptr});
    }
    kernels.end();
  });
}

}  // namespace

const Bf16Kernels* bf16_kernels(Isa isa) {
  if (isa >= Isa::kAmx && kGemmBf16Amx.tile) return &kGemmBf16Amx;
  if (isa >= Isa::kAvx512 && has_fast_bf16() && kGemmBf16Avx512.tile) return &kGemmBf16Avx512;
  return nullptr;
}

const char* active_bf16() {
  const Bf16Kernels* const kernels = bf16_kernels(active_isa());
  return kernels == &kGemmBf16Amx ? "amx-bf16" : kernels ? "avx512-bf16" : "fp32";
}

const Bf16Kernels* split_kernels(Isa isa, int64_t K) {
  return isa >= Isa::kAmx && kGemmFp32Amx.tile && K >= kSplitDepth ? &kGemmFp32Amx : nullptr;
}

void gemm_bf16(const Cpu& cpu, const GemmProduct& product, const Bf16Kernels& kernels) {
  GemmProduct p = product;
  // All rows for a share of the columns: only where neither A in parts nor a B to be packed fills the caches.
  const bool lies = p.b_layout == GemmLayout::kBf16Panels;
  if (!lies || &kernels != &kGemmBf16Avx512) p.column_parts = 1;
  if (kernels.parts == 3 && p.b_layout == GemmLayout::kPanels && p.K % kBf16Step == 0) {
    if (p.M <= kSplitRowsAvx512.max_rows) return multiply_few(cpu, p, kernels);
    if (p.M <= kStreamRows) return multiply_stream(cpu, p, kernels);
  }
  const int64_t number_bytes = kernels.parts * static_cast<int64_t>(sizeof(uint16_t));
  const int64_t K = ceil_div(p.K, kBf16Step) * kBf16Step;
  const int64_t block_depth = std::min(K, kBlockBytes / number_bytes / kBf16Step * kBf16Step);
  const int64_t near_rows = kPackedA / (block_depth * number_bytes) / 32 * 32;
  // With owners every one of them packs all of B, if it is to be packed: numbers of one part multiply so fast
  // that it would show, and rows that one chunk holds do not need it.
  const int64_t owners = (kernels.parts == 1 && !lies) || p.M <= near_rows
                             ? 1
                             : std::clamp<int64_t>(p.M / kOwnRows, 1, cpu.threads);
  const int64_t most_rows = std::min(near_rows * owners, ceil_div(p.M, 32) * 32);
  const int64_t blocks = std::max<int64_t>(1, kPackedA * owners / (most_rows * block_depth * number_bytes));
  const int64_t deepest = std::min(K, blocks * block_depth);
  const int64_t panel_numbers = block_depth * kGemmPanel * kernels.parts;
  const int64_t worker_numbers = lies ? 0 : panel_numbers * kBuffers;
  uint16_t* const buffers = reinterpret_cast<uint16_t*>(
      gemm_scratch((worker_numbers * cpu.threads + most_rows * deepest * kernels.parts) / 2));
  uint16_t* const a = buffers + worker_numbers * cpu.threads;
  for (int64_t m = 0; m < p.M; m += most_rows) {
    for (int64_t k = 0; k < p.K; k += deepest) {
      multiply_chunk(
          cpu, {p, kernels, k, std::min(deepest, p.K - k), block_depth, m, std::min(most_rows, p.M - m), a},
          owners, buffers, worker_numbers);
    }
  }
}

}  // namespace dn::cpu
