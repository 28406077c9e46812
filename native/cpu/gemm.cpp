// The fp32 matrix product: packs the rows of A once a call, cuts C into groups of weight panels for the
// threads, and walks each group so that a panel block (32 KB) stays in L1 while packed rows of A stream from
// L2.

#include "cpu/gemm.h"

#include <algorithm>
#include <cstring>
#include <new>

#include "core/error.h"
#include "cpu/thread_pool.h"

namespace dn::cpu {
namespace {

// Rows of A handled against one panel before the next: 256 KB of a block of packed A, a share of L2.
constexpr int64_t kRowBlock = 256;
// So few rows are bound by reading the weight, and all of their packed A fits in L2.
constexpr int64_t kFewRows = 32;
// Packed A kept at a time: 16 MB, or kRowBlock rows when they are longer.
constexpr int64_t kPackedFloats = int64_t{4} << 20;
// Plain weights are packed kGroup panels by kSegment blocks at a time: 512 KB in L2, long runs of the rows in
// memory.
constexpr int64_t kGroup = 8;
constexpr int64_t kSegment = 2;
constexpr int64_t kBufferFloats = kGroup * kSegment * kGemmDepth * kGemmPanel;
// Below this many elements A is packed by the caller alone: a parallel region would cost more.
constexpr int64_t kPackAlone = 32768;
constexpr int64_t kLine = 16;      // floats in a cache line
constexpr int64_t kPackRows = 32;  // rows that are packed at a time

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Scratch {
  float* data = nullptr;
  int64_t floats = 0;
  ~Scratch() { ::operator delete(data, std::align_val_t{64}); }
};

// One row chunk [m_begin, m_begin + rows) of a product and its packed A: blocks of kGemmDepth of the
// reduction, in each the rows one after the other, kGemmDepth floats apart.
struct Chunk {
  const GemmProduct& p;
  const GemmKernels& kernels;
  int64_t m_begin;
  int64_t rows;
  float* packed_a;

  float* a_block(int64_t block) const { return packed_a + block * rows * kGemmDepth; }
};

void pack_a(const Chunk& chunk, int64_t block, int64_t row_begin, int64_t row_end) {
  const GemmProduct& p = chunk.p;
  const int64_t k = block * kGemmDepth, depth = std::min(kGemmDepth, p.K - k), m = chunk.m_begin + row_begin;
  float* const dst = chunk.a_block(block) + row_begin * kGemmDepth;
  if (p.a_layout == GemmLayout::kTransposed) {
    chunk.kernels.transpose(dst, kGemmDepth, p.a + k * p.a_stride + m, p.a_stride, depth,
                            row_end - row_begin);
  } else if (p.a_rows != nullptr) {
    for (int64_t r = 0; r < row_end - row_begin; ++r) {
      std::memcpy(dst + r * kGemmDepth, p.a_rows[m + r] + k, static_cast<size_t>(depth) * sizeof(float));
    }
  } else {
    chunk.kernels.copy(dst, kGemmDepth, p.a + m * p.a_stride + k, p.a_stride, row_end - row_begin, depth);
  }
}

// Packs the block of panels [panel_begin, panel_end) into buffer, kGemmDepth * kGemmPanel floats apart.
void pack_panels(const Chunk& chunk, int64_t panel_begin, int64_t panel_end, int64_t k, int64_t depth,
                 float* buffer) {
  const GemmProduct& p = chunk.p;
  const int64_t panel_floats = kGemmDepth * kGemmPanel, last_cols = p.N - (panel_end - 1) * kGemmPanel;
  if (last_cols < kGemmPanel) {
    std::memset(buffer + (panel_end - 1 - panel_begin) * panel_floats, 0,
                static_cast<size_t>(depth * kGemmPanel) * sizeof(float));
  }
  // Some rows of every panel at a time where rows run across panels: whole runs of memory.
  const bool transposed = p.b_layout == GemmLayout::kTransposed;
  const int64_t strip = transposed ? depth : kPackRows;
  for (int64_t d = 0; d < depth; d += strip) {
    const int64_t rows = std::min(strip, depth - d);
    for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
      const int64_t n = panel * kGemmPanel, cols = std::min(kGemmPanel, p.N - n);
      float* const dst = buffer + (panel - panel_begin) * panel_floats + d * kGemmPanel;
      if (transposed) {
        chunk.kernels.transpose(dst, kGemmPanel, p.b + n * p.b_stride + k, p.b_stride, cols, depth);
      } else {
        chunk.kernels.copy(dst, kGemmPanel, p.b + (k + d) * p.b_stride + n, p.b_stride, rows, cols);
      }
    }
  }
}

// One block of the reduction for rows [row_begin, row_end) of the chunk, at most kRowBlock, and panels
// [panel_begin, panel_end). buffer: the block of these panels, unless B is packed already.
void multiply_block(const Chunk& chunk, int64_t block, int64_t row_begin, int64_t row_end,
                    int64_t panel_begin, int64_t panel_end, const float* buffer) {
  const GemmProduct& p = chunk.p;
  const bool packed = p.b_layout == GemmLayout::kPanels;
  const int64_t k = block * kGemmDepth, depth = std::min(kGemmDepth, p.K - k);
  const bool finish = depth == p.K - k && (p.bias || p.gelu || p.residual);
  const int64_t tiles = ceil_div(row_end - row_begin, chunk.kernels.max_rows);
  const int64_t lines = ceil_div(depth * kGemmPanel / kLine, tiles);
  for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
    const int64_t n = panel * kGemmPanel, cols = std::min(kGemmPanel, p.N - n);
    const float* const b = packed ? p.b + (panel * p.K + k) * kGemmPanel
                                  : buffer + (panel - panel_begin) * kGemmDepth * kGemmPanel;
    // A packed panel comes from memory: every tile asks for a share of the one after it.
    const float* next = nullptr;
    if (packed && panel + 1 < panel_end) {
      next = b + p.K * kGemmPanel;
    } else if (packed && k + depth < p.K) {
      next = p.b + (panel_begin * p.K + k + depth) * kGemmPanel;
    } else if (packed && n + kGemmPanel < p.N) {
      next = b + depth * kGemmPanel;
    }
    int64_t m = row_begin;
    for (int64_t i = 0; i < tiles; ++i) {  // tiles of nearly equal height
      const int64_t rows = (row_end - row_begin) / tiles + (i < (row_end - row_begin) % tiles);
      float* const c = p.c + (chunk.m_begin + m) * p.c_stride + n;
      chunk.kernels.tile({c, p.c_stride, rows, cols, chunk.a_block(block) + m * kGemmDepth, b, depth,
                          p.accumulate || block > 0, next ? next + i * lines * kLine : nullptr,
                          next ? lines : 0});
      if (finish) {
        const int64_t extra = (chunk.m_begin + m) * p.extra_stride + n;
        chunk.kernels.finish({c, p.c_stride, rows, cols, p.bias ? p.bias + n : nullptr, p.gelu,
                              p.pre ? p.pre + extra : nullptr, p.residual ? p.residual + extra : nullptr,
                              p.extra_stride});
      }
      m += rows;
    }
  }
}

// C of rows [row_begin, row_end) of the chunk and panels [panel_begin, panel_end). Some blocks of the
// reduction at a time for some rows at a time, so that the rows' part of C stays in L2 meanwhile.
void multiply_group(const Chunk& chunk, int64_t row_begin, int64_t row_end, int64_t panel_begin,
                    int64_t panel_end, float* buffer) {
  const GemmProduct& p = chunk.p;
  const bool packed = p.b_layout == GemmLayout::kPanels;
  const int64_t blocks = ceil_div(p.K, kGemmDepth), step = packed ? blocks : kSegment;
  if (packed && row_end - row_begin <= kFewRows) {  // the weight is read once, in the order it lies in memory
    for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
      for (int64_t block = 0; block < blocks; ++block) {
        multiply_block(chunk, block, row_begin, row_end, panel, panel + 1, nullptr);
      }
    }
    return;
  }
  const int64_t block_floats = (panel_end - panel_begin) * kGemmDepth * kGemmPanel;
  for (int64_t first = 0; first < blocks; first += step) {
    const int64_t last = std::min(blocks, first + step);
    for (int64_t block = first; block < last && !packed; ++block) {
      const int64_t k = block * kGemmDepth;
      pack_panels(chunk, panel_begin, panel_end, k, std::min(kGemmDepth, p.K - k),
                  buffer + (block - first) * block_floats);
    }
    for (int64_t m = row_begin; m < row_end; m += kRowBlock) {
      for (int64_t block = first; block < last; ++block) {
        multiply_block(chunk, block, m, std::min(row_end, m + kRowBlock), panel_begin, panel_end,
                       buffer + (block - first) * block_floats);
      }
    }
  }
}

void multiply_chunk(const Cpu& cpu, const Chunk& chunk, float* buffers) {
  const GemmProduct& p = chunk.p;
  const int64_t blocks = ceil_div(p.K, kGemmDepth), strips = ceil_div(chunk.rows, kPackRows);
  const int pack_threads = chunk.rows * p.K <= kPackAlone ? 1 : cpu.threads;
  parallel(pack_threads, blocks * strips, [&](int64_t task, int) {
    const int64_t begin = task % strips * kPackRows;
    pack_a(chunk, task / strips, begin, std::min(chunk.rows, begin + kPackRows));
  });

  // Tasks: some four a thread, of whole panels; rows are divided only when there are too few panels.
  const int64_t panels = ceil_div(p.N, kGemmPanel), wanted = int64_t{4} * cpu.threads;
  const int64_t group = std::clamp<int64_t>(panels / wanted, 1, kGroup);
  const int64_t groups = ceil_div(panels, group);
  int64_t row_parts = 1;
  if (cpu.threads > 1 && groups < wanted) {
    row_parts = std::clamp<int64_t>(wanted / groups, 1, ceil_div(chunk.rows, 4 * chunk.kernels.max_rows));
  }
  parallel(cpu.threads, groups * row_parts, [&](int64_t task, int worker) {
    const int64_t part = task % row_parts, panel = task / row_parts * group;
    multiply_group(chunk, chunk.rows * part / row_parts, chunk.rows * (part + 1) / row_parts, panel,
                   std::min(panels, panel + group), buffers + worker * kBufferFloats);
  });
}

void gemm_fp32(const Cpu& cpu, const GemmProduct& p) {
  const GemmKernels& kernels = gemm_kernels(cpu.isa);
  const int64_t padded_k = ceil_div(p.K, kGemmDepth) * kGemmDepth;
  const int64_t most_rows =
      std::min(p.M, std::max(kRowBlock, kPackedFloats / padded_k / kRowBlock * kRowBlock));
  const int64_t buffer_floats = p.b_layout == GemmLayout::kPanels ? 0 : cpu.threads * kBufferFloats;
  float* const scratch = gemm_scratch(most_rows * padded_k + buffer_floats);
  for (int64_t m = 0; m < p.M; m += most_rows) {
    multiply_chunk(cpu, {p, kernels, m, std::min(most_rows, p.M - m), scratch + buffer_floats}, scratch);
  }
}

// K = 0: the sum of nothing.
void gemm_empty(const GemmProduct& p, const GemmKernels& kernels) {
  for (int64_t m = 0; m < p.M; ++m) {
    float* const c = p.c + m * p.c_stride;
    if (!p.accumulate) std::fill(c, c + p.N, 0.0f);
    const int64_t extra = m * p.extra_stride;
    kernels.finish({c, p.c_stride, 1, p.N, p.bias, p.gelu, p.pre ? p.pre + extra : nullptr,
                    p.residual ? p.residual + extra : nullptr, p.extra_stride});
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
  if (floats > scratch.floats) {
    ::operator delete(scratch.data, std::align_val_t{64});
    scratch.data = nullptr;
    scratch.floats = 0;
    const size_t bytes = static_cast<size_t>(floats) * sizeof(float);
    scratch.data = static_cast<float*>(::operator new(bytes, std::align_val_t{64}, std::nothrow));
    if (scratch.data == nullptr) {
      throw Error(Code::kOutOfMemory,
                  "cannot allocate " + std::to_string(bytes) + " bytes for a matrix product");
    }
    scratch.floats = floats;
  }
  return scratch.data;
}

void gemm(const Cpu& cpu, const GemmProduct& p, MatmulPrecision precision) {
  if (p.M <= 0 || p.N <= 0) return;
  if (p.K <= 0) return gemm_empty(p, gemm_kernels(cpu.isa));
  const bool tiles = cpu.isa == Isa::kAmx && kGemmAmx.tile != nullptr;  // a compiler may lack them
  if (precision == MatmulPrecision::kBF16 && tiles) return gemm_bf16(cpu, p);
  gemm_fp32(cpu, p);
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
  gemm(cpu, p, precision);
}

}  // namespace dn::cpu
