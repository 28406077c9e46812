// The int8 product's engine: quantises the rows of A once a call, cuts C into groups of weight panels for the
// threads, and keeps a panel in L1 while quantised rows stream past it. The whole reduction is one chain in
// registers: C is written once.

#include "cpu/gemm_int8.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "core/error.h"
#include "cpu/isa.h"
#include "cpu/thread_pool.h"

namespace dn::cpu {
namespace {

constexpr int64_t kRowBytes = int64_t{512} << 10;  // quantised rows handled against a group: a share of L2
constexpr int64_t kMostBytes = int64_t{8} << 20;   // quantised rows kept at a time
// Panels of a task, at most: one where it takes long, so that threads end together; more where they share
// rows that come from memory, a task begins and ends with the tiles of AMX, or one tile waits for its
// weights.
constexpr int64_t kShortGroup = 1;
constexpr int64_t kGroup = 4;
constexpr int64_t kPackAlone = 16384;  // fewer numbers are quantised by the caller alone
constexpr int64_t kPackRows = 8;       // rows that a task quantises
constexpr int64_t kFewRows = 4;        // of A: AMX tiles would be mostly empty

constexpr int64_t kLine = 64;            // bytes of a cache line
constexpr int64_t kFarthest = 32 << 10;  // bytes ahead: beyond, requests lie too long before they are used

static_assert(kInt8Columns % kGemmPanel == 0, "a piece of a packed weight is whole panels");

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Bytes between quantised rows: an odd number of cache lines, so that the rows of a tile spread over the
// sets.
int64_t row_stride(int64_t K) { return (int8_depth(K) / kInt8Step | 1) * kInt8Step; }

const Int8Panel* panel_at(const void* packed, int64_t K, int64_t panel) {
  return reinterpret_cast<const Int8Panel*>(static_cast<const char*>(packed) + panel * int8_panel_bytes(K));
}
Int8Panel* panel_at(void* packed, int64_t K, int64_t panel) {
  return const_cast<Int8Panel*>(panel_at(static_cast<const void*>(packed), K, panel));
}

// Place of (k, column) among the values of a panel.
int64_t place(int64_t k, int64_t column) {
  return (k / kInt8Group * kGemmPanel + column) * kInt8Group + k % kInt8Group;
}

void pack_panel(Int8Panel* panel, const Int8Matrix& plain, int64_t n, int64_t cols) {
  const int64_t K = plain.K;
  int8_t* const values = reinterpret_cast<int8_t*>(panel + 1);
  int32_t sums[kGemmPanel] = {};
  if (cols < kGemmPanel || K % kInt8Step != 0) {
    std::memset(values, 0, static_cast<size_t>(int8_depth(K) * kGemmPanel));
  }
  if (plain.order == WeightOrder::kOutIn) {
    for (int64_t j = 0; j < cols; ++j) {
      const int8_t* const column = plain.values + (n + j) * K;
      for (int64_t k = 0; k < K; k += kInt8Group) {
        std::memcpy(values + place(k, j), column + k, static_cast<size_t>(std::min(kInt8Group, K - k)));
      }
      for (int64_t k = 0; k < K; ++k) sums[j] += column[k];
    }
  } else {
    for (int64_t k = 0; k < K; ++k) {
      const int8_t* const row = plain.values + k * plain.N + n;
      int8_t* const to = values + place(k, 0);
      for (int64_t j = 0; j < cols; ++j) {
        to[j * kInt8Group] = row[j];
        sums[j] += row[j];
      }
    }
  }
  for (int64_t j = 0; j < kGemmPanel; ++j) {
    panel->scales[j] = j < cols ? plain.scales[n + j] : 0.0f;
    panel->correction[j] = -static_cast<int32_t>(kInt8Offset) * sums[j];
  }
}

// Quantised rows [m_begin, m_begin + rows) of A: (rows, stride) bytes and a scale each.
struct Chunk {
  const GemmProduct& p;
  const void* packed;
  const Int8Kernels& kernels;
  int64_t m_begin;
  int64_t rows;
  int64_t stride;
  uint8_t* a;
  float* scales;
};

void quantise_row(const Chunk& chunk, int64_t r) {
  const GemmProduct& p = chunk.p;
  const int64_t m = chunk.m_begin + r;
  uint8_t* const q = chunk.a + r * chunk.stride;
  chunk.scales[r] = chunk.kernels.quantise_row(q, p.a_rows ? p.a_rows[m] : p.a + m * p.a_stride, p.K);
  std::memset(q + p.K, 0, static_cast<size_t>(chunk.stride - p.K));
}

// Rows [row_begin, row_end) of the chunk times one panel, in tiles of nearly equal height.
void multiply_panel(const Chunk& chunk, int64_t row_begin, int64_t row_end, int64_t panel) {
  const GemmProduct& p = chunk.p;
  const int64_t n = panel * kGemmPanel, cols = std::min(kGemmPanel, p.N - n);
  const int64_t count = row_end - row_begin, tiles = ceil_div(count, chunk.kernels.max_rows);
  const bool finish = has_finish(p);
  // Weights come from memory: every tile asks for a share of the panel after this one, on AMX not beyond what
  // would lie too long before it is used. One tile of vectors alone asks as it goes.
  const int64_t depth = int8_depth(p.K);
  const bool is_last = n + kGemmPanel >= p.N, fetch = tiles == 1 && !chunk.kernels.begin;
  const int64_t bytes = int8_panel_bytes(p.K), ahead = tiles == 1 ? std::min(bytes, kFarthest) : bytes;
  const int64_t lines = is_last || fetch ? 0 : std::min(ceil_div(bytes / kLine, tiles), depth / 2);
  const char* const next = reinterpret_cast<const char*>(panel_at(chunk.packed, p.K, panel)) + ahead;
  int64_t r = row_begin;
  for (int64_t i = 0; i < tiles; ++i) {
    // Whole tiles first where they are made of rows (AMX), else equal ones.
    const int64_t rows = chunk.kernels.begin ? std::min(chunk.kernels.max_rows, row_end - r)
                                             : count / tiles + (i < count % tiles);
    const GemmFinish then = finish_of(p, chunk.m_begin + r, n, rows, cols);
    chunk.kernels.tile({then.c, p.c_stride, rows, cols, chunk.a + r * chunk.stride, chunk.stride,
                        chunk.scales + r, panel_at(chunk.packed, p.K, panel), depth, next + i * lines * kLine,
                        lines, finish ? &then : nullptr, fetch});
    r += rows;
  }
}

void multiply_chunk(const Cpu& cpu, const Chunk& chunk) {
  const GemmProduct& p = chunk.p;
  parallel_near(chunk.rows * p.K <= kPackAlone ? 1 : cpu.threads, ceil_div(chunk.rows, kPackRows),
                [&](int64_t task, int) {
                  const int64_t end = std::min(chunk.rows, (task + 1) * kPackRows);
                  for (int64_t r = task * kPackRows; r < end; ++r) quantise_row(chunk, r);
                });

  // Every thread has rows of its own, where there are enough, and all panels for them, or a share of every
  // part of the columns: C is then written by the thread that will read it. Parts are equal in rows, of AMX
  // in whole tiles.
  const int64_t tall = chunk.kernels.max_rows, tiles = ceil_div(chunk.rows, tall);
  const int64_t block = std::max<int64_t>(1, kRowBytes / chunk.stride / tall) * tall;
  const int64_t wanted = kTasksPerThread * cpu.threads;
  const PanelGroups together(p, kGroup, cpu.threads, wanted);
  const int64_t row_parts = together.parts > 1 ? 1 : std::clamp<int64_t>(cpu.threads, 1, ceil_div(tiles, 4));
  const bool is_short = tiles > 1 && !chunk.kernels.begin && ceil_div(chunk.rows, row_parts) <= block;
  const PanelGroups groups = is_short ? PanelGroups(p, kShortGroup, cpu.threads, wanted) : together;
  const auto part_begin = [&](int64_t part) {
    return chunk.kernels.begin ? std::min(chunk.rows, tiles * part / row_parts * tall)
                               : chunk.rows * part / row_parts;
  };
  parallel_near(cpu.threads, row_parts * groups.count, [&](int64_t task, int) {
    const int64_t part = task / groups.count, group = task % groups.count;
    const int64_t row_end = part_begin(part + 1);
    if (chunk.kernels.begin) chunk.kernels.begin();
    for (int64_t r = part_begin(part); r < row_end; r += block) {
      for (int64_t panel = groups.begin(group); panel < groups.end(group); ++panel) {
        multiply_panel(chunk, r, std::min(row_end, r + block), panel);
      }
    }
    if (chunk.kernels.end) chunk.kernels.end();
  });
}

}  // namespace

int64_t int8_bytes(int64_t K, int64_t N) {
  if (K > kInt8MostInputs) {
    throw Error(Code::kArgument, "an int8 weight (" + std::to_string(K) + ", " + std::to_string(N) +
                                     ") has " + std::to_string(K) + " inputs, expected at most " +
                                     std::to_string(kInt8MostInputs));
  }
  return ceil_div(N, kGemmPanel) * int8_panel_bytes(K);
}

void pack_int8(const Cpu& cpu, void* packed, const Int8Matrix& plain, int64_t n_begin) {
  if (n_begin % kGemmPanel != 0) {
    throw Error(Code::kArgument, "pack_int8: columns begin at " + std::to_string(n_begin) +
                                     ", expected a multiple of " + std::to_string(kGemmPanel));
  }
  parallel(cpu.threads, ceil_div(plain.N, kGemmPanel), [&](int64_t panel, int) {
    const int64_t n = panel * kGemmPanel;
    pack_panel(panel_at(packed, plain.K, n_begin / kGemmPanel + panel), plain, n,
               std::min(kGemmPanel, plain.N - n));
  });
}

void unpack_int8(const Cpu& cpu, const Int8Matrix& plain, const void* packed) {
  const int64_t K = plain.K;
  parallel(cpu.threads, ceil_div(plain.N, kGemmPanel), [&](int64_t index, int) {
    const Int8Panel* const panel = panel_at(packed, K, index);
    const int8_t* const values = reinterpret_cast<const int8_t*>(panel + 1);
    const int64_t n = index * kGemmPanel, cols = std::min(kGemmPanel, plain.N - n);
    std::memcpy(plain.scales + n, panel->scales, static_cast<size_t>(cols) * sizeof(float));
    const bool by_columns = plain.order == WeightOrder::kOutIn;
    for (int64_t k = 0; k < K; ++k) {
      for (int64_t j = 0; j < cols; ++j) {
        plain.values[by_columns ? (n + j) * K + k : k * plain.N + n + j] = values[place(k, j)];
      }
    }
  });
}

void int8_column(const void* packed, int64_t K, int64_t n, float* out) {
  const Int8Panel* const panel = panel_at(packed, K, n / kGemmPanel);
  const int8_t* const values = reinterpret_cast<const int8_t*>(panel + 1);
  const float scale = panel->scales[n % kGemmPanel];
  for (int64_t k = 0; k < K; ++k) out[k] = static_cast<float>(values[place(k, n % kGemmPanel)]) * scale;
}

void gemm_int8(const Cpu& cpu, const GemmProduct& product, const void* packed, const Int8Kernels& kernels) {
  GemmProduct p = product;
  if (kernels.begin) p.column_parts = 1;  // AMX has whole tiles of rows for every thread
  if (p.M <= 0 || p.N <= 0) return;
  if (p.K <= 0) return gemm_empty(cpu, p);
  const int64_t stride = row_stride(p.K);
  const int64_t most_rows = std::min(p.M, std::max(kMostBytes / stride, kernels.max_rows));
  const int64_t scale_floats = ceil_div(most_rows, 16) * 16;
  // Tiles of AMX read whole: rows past the last one are read, and what they give is not used.
  const int64_t bytes = (most_rows + kernels.max_rows) * stride;
  float* const scratch = gemm_scratch(scale_floats + bytes / static_cast<int64_t>(sizeof(float)));
  uint8_t* const a = reinterpret_cast<uint8_t*>(scratch + scale_floats);
  for (int64_t m = 0; m < p.M; m += most_rows) {
    multiply_chunk(cpu, {p, packed, kernels, m, std::min(most_rows, p.M - m), stride, a, scratch});
  }
}

void gemm_int8(const Cpu& cpu, const GemmProduct& p, const void* packed) {
  gemm_int8(cpu, p, packed, int8_kernels(cpu.isa, p.M));
}

const Int8Kernels& int8_kernels(Isa isa, int64_t rows) {
  if (isa >= Isa::kAmx && has_amx_int8() && kInt8Amx.tile && rows > kFewRows) return kInt8Amx;
  if (isa >= Isa::kAvx512 && has_avx512_vnni() && kInt8Avx512.tile) return kInt8Avx512;
  if (isa >= Isa::kAvx2 && has_avx_vnni() && kInt8AvxVnni.tile) return kInt8AvxVnni;
  if (isa >= Isa::kAvx2 && kInt8Avx2.tile) return kInt8Avx2;
  return kInt8Portable;
}

const char* active_int8() { return int8_kernels(active_isa(), INT64_MAX).name; }

std::vector<const Int8Kernels*> all_int8_kernels() {
  std::vector<const Int8Kernels*> all = {&kInt8Portable};
  const Isa isa = detected_isa();
  if (isa >= Isa::kAvx2 && kInt8Avx2.tile) all.push_back(&kInt8Avx2);
  if (isa >= Isa::kAvx2 && has_avx_vnni() && kInt8AvxVnni.tile) all.push_back(&kInt8AvxVnni);
  if (isa >= Isa::kAvx512 && has_avx512_vnni() && kInt8Avx512.tile) all.push_back(&kInt8Avx512);
  if (isa >= Isa::kAmx && has_amx_int8() && kInt8Amx.tile) all.push_back(&kInt8Amx);
  return all;
}

}  // namespace dn::cpu
