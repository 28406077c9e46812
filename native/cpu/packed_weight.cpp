// Weights as products read them: the checks of what an op is given, and the packed form (gemm_kernels.h:
// panels of kGemmPanel columns) in fp32 or bf16, written and read back. int8: gemm_int8.cpp.

#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/error.h"
#include "core/half.h"
#include "cpu/gemm.h"
#include "cpu/gemm_int8.h"
#include "cpu/ops.h"
#include "cpu/thread_pool.h"

namespace dn::cpu {
namespace {

static_assert(kPackRows % kGemmPanel == 0 && kPackRows % kBf16Step == 0 && kPairBlock % kPackRows == 0,
              "a piece of a packed weight is whole panels and steps, and a block whole pieces");

[[noreturn]] void refuse(const char* op, const std::string& what) {
  throw Error(Code::kArgument, std::string(op) + ": " + what);
}

// Both directions between plain order and panels, a panel a task: copy_panel(first column, columns).
template <typename CopyPanel>
void each_panel(const Cpu& cpu, const Weight& w, CopyPanel&& copy_panel) {
  parallel(cpu.threads, (w.N + kGemmPanel - 1) / kGemmPanel, [&](int64_t panel, int) {
    const int64_t n = panel * kGemmPanel;
    copy_panel(n, std::min(kGemmPanel, w.N - n));
  });
}

// Rows of a panel that are on their way to or from bf16 at a time: 32 KB, on the stack of a task, which must
// not throw.
constexpr int64_t kPieceRows = 256;
static_assert(kPairBlock % kPieceRows == 0, "a piece lies in one block");

// Rows [k, k + rows) of panel n / kGemmPanel of a (K, N) weight packed as `to`, columns past the end zero, k
// a multiple of kPackRows. fill(floats, first, count) writes `count` of them, from the one at `first` on.
template <typename Fill>
void write_panel(const Cpu& cpu, void* packed, Dtype to, const Weight& w, int64_t n, int64_t k, int64_t rows,
                 Fill&& fill) {
  const int64_t panel = n / kGemmPanel;
  float* const words = static_cast<float*>(packed);
  const auto write = [&](float* floats, int64_t first, int64_t count) {
    const int64_t bytes = count * kGemmPanel * static_cast<int64_t>(sizeof(float));
    if (n + kGemmPanel > w.N) std::memset(floats, 0, static_cast<size_t>(bytes));
    fill(floats, first, count);
  };
  if (to == Dtype::kF32) {
    PairPanel* const pairs = reinterpret_cast<PairPanel*>(words + packed_pairs(w.K, w.N, n));
    for (int64_t first = 0, count = 0; first < rows; first += count) {
      const int64_t block = (k + first) / kPairBlock, in_block = (k + first) % kPairBlock;
      const int64_t depth = std::min(kPairBlock, w.K - block * kPairBlock);
      count = std::min(depth - in_block, rows - first);
      float* const floats = words + (panel * w.K + block * kPairBlock) * kGemmPanel;
      unscale_block(pairs + block, floats, depth);
      write(floats + in_block * kGemmPanel, first, count);
      if (in_block + count == depth && packs_for_pairs(cpu.isa, w.K))
        scale_block(pairs + block, floats, depth);
    }
    return;
  }
  alignas(64) float piece[kPieceRows * kGemmPanel];
  for (int64_t first = 0; first < rows; first += kPieceRows) {
    const int64_t count = std::min(kPieceRows, rows - first);
    write(piece, first, count);
    pack_bf16(words + panel * bf16_panel_words(w.K) + bf16_words(k + first), piece, count);
  }
}

void check_form(const char* op, const Weight& w, Dtype to) {
  if (to != Dtype::kF32 && to != Dtype::kBF16)
    refuse(op, "the weight " + w.shape() + " can be packed as fp32 or bf16 only");
}

}  // namespace

void check_weight(const char* op, const Weight& w, bool may_be_packed) {
  const bool is_narrow = (w.dtype == Dtype::kI8 || w.dtype == Dtype::kBF16) && w.packed && may_be_packed;
  if (w.dtype != Dtype::kF32 && !is_narrow) {
    refuse(op, "the weight " + w.shape() + " must be fp32" +
                   (may_be_packed ? ", or packed bf16 or int8," : "") + " on the CPU");
  }
  if (w.packed && !may_be_packed) refuse(op, "the weight " + w.shape() + " is packed, expected a plain one");
  if (w.K < 0 || w.N < 0 || (w.data == nullptr && w.K * w.N > 0))
    refuse(op, "the weight " + w.shape() + " has no data");
}

int64_t packed_elements(int64_t K, int64_t N, Dtype to) {
  const int64_t panels = (N + kGemmPanel - 1) / kGemmPanel;
  return to == Dtype::kBF16 ? panels * 2 * bf16_panel_words(K)
                            : packed_pairs(K, N, panels * kGemmPanel);  // where those of one more would begin
}

void pack_bf16(float* words, const float* rows, int64_t depth) {
  const int64_t whole = (depth + kBf16Step - 1) / kBf16Step * kBf16Step;
  for (int64_t k = 0; k < whole; k += 2) {
    const float* const even = rows + k * kGemmPanel;
    uint32_t pairs[kGemmPanel] = {};
    for (int64_t n = 0; n < kGemmPanel && k < depth; ++n) pairs[n] = f32_to_bf16(even[n]);
    for (int64_t n = 0; n < kGemmPanel && k + 1 < depth; ++n)
      pairs[n] |= static_cast<uint32_t>(f32_to_bf16(even[kGemmPanel + n])) << 16;
    std::memcpy(words + bf16_words(k), pairs, sizeof pairs);
  }
}

void unpack_bf16(float* rows, const float* words, int64_t depth) {
  for (int64_t k = 0; k < depth; k += 2) {
    float* const even = rows + k * kGemmPanel;
    uint32_t pairs[kGemmPanel];
    std::memcpy(pairs, words + bf16_words(k), sizeof pairs);
    for (int64_t n = 0; n < kGemmPanel; ++n) even[n] = bits_float(pairs[n] << 16);
    for (int64_t n = 0; n < kGemmPanel && k + 1 < depth; ++n)
      even[kGemmPanel + n] = bits_float(pairs[n] & 0xffff0000u);
  }
}

void pack_weight(const Cpu& cpu, void* packed, const Weight& plain, Dtype to) {
  check_weight("pack_weight", plain, false);
  check_form("pack_weight", plain, to);
  const GemmKernels& kernels = gemm_kernels(cpu.isa);
  const float* const src = static_cast<const float*>(plain.data);
  each_panel(cpu, plain, [&](int64_t n, int64_t cols) {
    write_panel(cpu, packed, to, plain, n, 0, plain.K, [&](float* dst, int64_t first, int64_t count) {
      if (plain.order == WeightOrder::kInOut) {
        kernels.copy(dst, kGemmPanel, src + first * plain.N + n, plain.N, count, cols);
      } else {
        kernels.transpose(dst, kGemmPanel, src + n * plain.K + first, plain.K, cols, count);
      }
    });
  });
}

void pack_rows(const Cpu& cpu, void* packed, const Weight& whole, const float* rows, int64_t begin,
               int64_t count, Dtype to) {
  const bool by_columns = whole.order == WeightOrder::kOutIn;
  const int64_t all = by_columns ? whole.N : whole.K;
  if (begin < 0 || begin % kPackRows != 0 || begin + count > all ||
      (count % kPackRows != 0 && begin + count < all))
    refuse("pack_rows", "rows [" + std::to_string(begin) + ", " + std::to_string(begin + count) + ") of " +
                            whole.shape() + ", expected multiples of " + std::to_string(kPackRows));
  check_form("pack_rows", whole, to);
  const GemmKernels& kernels = gemm_kernels(cpu.isa);
  Weight part = whole;  // the columns that the rows bring: these, or some rows of all
  if (by_columns) part.N = count;
  each_panel(cpu, part, [&](int64_t n, int64_t cols) {
    const int64_t panel = by_columns ? begin + n : n, depth = by_columns ? whole.K : count;
    write_panel(cpu, packed, to, whole, panel, by_columns ? 0 : begin, depth,
                [&](float* dst, int64_t first, int64_t some) {
                  if (by_columns) {
                    kernels.transpose(dst, kGemmPanel, rows + n * whole.K + first, whole.K, cols, some);
                  } else {
                    kernels.copy(dst, kGemmPanel, rows + first * whole.N + n, whole.N, some, cols);
                  }
                });
  });
}

void unpack_weight(const Cpu& cpu, float* plain, const Weight& packed) {
  check_weight("unpack_weight", packed, true);
  if (packed.dtype == Dtype::kI8)
    refuse("unpack_weight", "the weight " + packed.shape() + " is int8, expected fp32 or bf16");
  if (!packed.packed)
    refuse("unpack_weight", "the weight " + packed.shape() + " is plain, expected a packed one");
  const GemmKernels& kernels = gemm_kernels(cpu.isa);
  const float* const words = static_cast<const float*>(packed.data);
  each_panel(cpu, packed, [&](int64_t n, int64_t cols) {
    const auto read = [&](const float* src, int64_t first, int64_t count) {
      if (packed.order == WeightOrder::kInOut) {
        kernels.copy(plain + first * packed.N + n, packed.N, src, kGemmPanel, count, cols);
      } else {
        kernels.transpose(plain + n * packed.K + first, packed.K, src, kGemmPanel, count, cols);
      }
    };
    alignas(64) float piece[kPieceRows * kGemmPanel];
    if (packed.dtype == Dtype::kF32) {
      const PairPanel* const pairs = pair_panels(words, packed.K, packed.N, n);
      for (int64_t first = 0; first < packed.K; first += kPieceRows) {
        const int64_t count = std::min(kPieceRows, packed.K - first);
        const float* rows = words + (n / kGemmPanel * packed.K + first) * kGemmPanel;
        if (const PairPanel& of = pairs[first / kPairBlock]; is_scaled(of)) {
          std::copy_n(rows, count * kGemmPanel, piece);
          unscale_rows(of, piece, count);
          rows = piece;
        }
        read(rows, first, count);
      }
      return;
    }
    for (int64_t first = 0; first < packed.K; first += kPieceRows) {
      const int64_t count = std::min(kPieceRows, packed.K - first);
      unpack_bf16(piece, words + n / kGemmPanel * bf16_panel_words(packed.K) + bf16_words(first), count);
      read(piece, first, count);
    }
  });
}

void weight_row(const Weight& w, int64_t n, float* out) {
  if (w.dtype == Dtype::kI8) return int8_column(w.data, w.K, n, out);
  const float* const data = static_cast<const float*>(w.data);
  if (!w.packed) {
    std::memcpy(out, data + n * w.K, static_cast<size_t>(w.K) * sizeof(float));
    return;
  }
  const int64_t panel = n / kGemmPanel, column = n % kGemmPanel;
  if (w.dtype == Dtype::kBF16) {
    const float* const words = data + panel * bf16_panel_words(w.K) + column;
    for (int64_t k = 0; k < w.K; ++k) {
      const uint32_t pair = float_bits(words[bf16_words(k)]);
      out[k] = bits_float(k % 2 == 0 ? pair << 16 : pair & 0xffff0000u);
    }
    return;
  }
  const float* const first = data + panel * kGemmPanel * w.K + column;
  const PairPanel* const pairs = pair_panels(data, w.K, w.N, n);
  for (int64_t k = 0; k < w.K; ++k) out[k] = first[k * kGemmPanel];
  for (int64_t k = 0; k < w.K; k += kPairBlock) {
    const PairPanel& of = pairs[k / kPairBlock];
    if (!is_scaled(of)) continue;
    const float factor = std::ldexp(1.0f, static_cast<int>(of.exponents[column]));
    for (int64_t i = k; i < std::min(w.K, k + kPairBlock); ++i) out[i] *= factor;
  }
}

}  // namespace dn::cpu
