// Weights as products read them: the checks of what an op is given, and the packed form (gemm_kernels.h:
// panels of kGemmPanel columns) in fp32 or bf16, written and read back. int8: gemm_int8.cpp.

#include <algorithm>
#include <cstring>

#include "core/error.h"
#include "core/half.h"
#include "cpu/gemm.h"
#include "cpu/gemm_int8.h"
#include "cpu/ops.h"
#include "cpu/thread_pool.h"

namespace dn::cpu {
namespace {

static_assert(kPackRows % kGemmPanel == 0, "a piece of a packed weight is whole panels");

[[noreturn]] void refuse(const char* op, const std::string& what) {
  throw Error(Code::kArgument, std::string(op) + ": " + what);
}

// Both directions between plain order and panels, a panel a task: copy_panel(first element of the panel, its
// first column, its columns).
template <typename CopyPanel>
void each_panel(const Cpu& cpu, const Weight& w, CopyPanel&& copy_panel) {
  parallel(cpu.threads, (w.N + kGemmPanel - 1) / kGemmPanel, [&](int64_t panel, int) {
    const int64_t n = panel * kGemmPanel;
    copy_panel(panel * w.K * kGemmPanel, n, std::min(kGemmPanel, w.N - n));
  });
}

// Rows of a panel, written by fill(floats) with columns past the end zero, to element `at` of a packed weight
// of type `to`.
template <typename Fill>
void write_panel(void* packed, Dtype to, int64_t at, int64_t rows, int64_t cols, Fill&& fill) {
  const int64_t count = rows * kGemmPanel;
  const bool is_bf16 = to == Dtype::kBF16;
  float* const floats = is_bf16 ? gemm_scratch(count) : static_cast<float*>(packed) + at;
  if (cols < kGemmPanel) std::memset(floats, 0, static_cast<size_t>(count) * sizeof(float));
  fill(floats);
  if (!is_bf16) return;
  uint16_t* const narrow = static_cast<uint16_t*>(packed) + at;
  for (int64_t i = 0; i < count; ++i) narrow[i] = f32_to_bf16(floats[i]);
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

int64_t packed_elements(int64_t K, int64_t N) { return (N + kGemmPanel - 1) / kGemmPanel * kGemmPanel * K; }

void pack_weight(const Cpu& cpu, void* packed, const Weight& plain, Dtype to) {
  check_weight("pack_weight", plain, false);
  check_form("pack_weight", plain, to);
  const GemmKernels& kernels = gemm_kernels(cpu.isa);
  const float* const src = static_cast<const float*>(plain.data);
  each_panel(cpu, plain, [&](int64_t offset, int64_t n, int64_t cols) {
    write_panel(packed, to, offset, plain.K, cols, [&](float* dst) {
      if (plain.order == WeightOrder::kInOut) {
        kernels.copy(dst, kGemmPanel, src + n, plain.N, plain.K, cols);
      } else {
        kernels.transpose(dst, kGemmPanel, src + n * plain.K, plain.K, cols, plain.K);
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
  Weight part = whole;
  part.data = rows;
  if (by_columns) {
    part.N = count;
    const int64_t bytes = begin * whole.K * static_cast<int64_t>(dtype_bytes(to));
    return pack_weight(cpu, static_cast<char*>(packed) + bytes, part, to);
  }
  check_form("pack_rows", whole, to);
  const GemmKernels& kernels = gemm_kernels(cpu.isa);
  each_panel(cpu, whole, [&](int64_t offset, int64_t n, int64_t cols) {
    write_panel(packed, to, offset + begin * kGemmPanel, count, cols,
                [&](float* dst) { kernels.copy(dst, kGemmPanel, rows + n, whole.N, count, cols); });
  });
}

void unpack_weight(const Cpu& cpu, float* plain, const Weight& packed) {
  check_weight("unpack_weight", packed, true);
  if (packed.dtype == Dtype::kI8)
    refuse("unpack_weight", "the weight " + packed.shape() + " is int8, expected fp32 or bf16");
  if (!packed.packed)
    refuse("unpack_weight", "the weight " + packed.shape() + " is plain, expected a packed one");
  const GemmKernels& kernels = gemm_kernels(cpu.isa);
  each_panel(cpu, packed, [&](int64_t offset, int64_t n, int64_t cols) {
    const float* src = static_cast<const float*>(packed.data) + offset;
    if (packed.dtype == Dtype::kBF16) {
      const int64_t count = packed.K * kGemmPanel;
      const uint16_t* const narrow = static_cast<const uint16_t*>(packed.data) + offset;
      float* const wide = gemm_scratch(count);
      for (int64_t i = 0; i < count; ++i) wide[i] = bf16_to_f32(narrow[i]);
      src = wide;
    }
    if (packed.order == WeightOrder::kInOut) {
      kernels.copy(plain + n, packed.N, src, kGemmPanel, packed.K, cols);
    } else {
      kernels.transpose(plain + n * packed.K, packed.K, src, kGemmPanel, packed.K, cols);
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
  const int64_t column = n / kGemmPanel * kGemmPanel * w.K + n % kGemmPanel;
  if (w.dtype == Dtype::kBF16) {
    const uint16_t* const narrow = static_cast<const uint16_t*>(w.data) + column;
    for (int64_t k = 0; k < w.K; ++k) out[k] = bf16_to_f32(narrow[k * kGemmPanel]);
    return;
  }
  for (int64_t k = 0; k < w.K; ++k) out[k] = data[column + k * kGemmPanel];
}

}  // namespace dn::cpu
