// Everything that works row by row or element by element: embedding, layer norm, GELU, AdamW, sum of squares.
// This file checks shapes and cuts the work into tasks; rows_kernels.h does the arithmetic. Where several
// rows are added into one place, either every task owns its own columns, or rows are added in chunks of a
// fixed size that are combined in order: never in an order that depends on threads.
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "core/error.h"
#include "cpu/ops.h"
#include "cpu/rows_kernels.h"
#include "cpu/thread_pool.h"

namespace dn::cpu {
namespace {

constexpr int64_t kElementsPerTask = 16384;          // 64 KiB: well above the cost of handing out a task
constexpr size_t kStreamedBytes = size_t{16} << 20;  // zero: larger memory does not stay in the caches anyway
constexpr int64_t kColumnsPerTask = 64;              // embedding_backward: four cache lines of every row
constexpr int64_t kRowsPerChunk = 64;  // layernorm_backward: rows that share one partial dweight and dbias

const RowsKernels& kernels(const Cpu& cpu) {
#if defined(__x86_64__) || defined(_M_X64)
  if (cpu.isa >= Isa::kAvx512) return kRowsAvx512;
  if (cpu.isa >= Isa::kAvx2) return kRowsAvx2;
#endif
  (void)cpu;
  return kRowsPortable;
}

void require_shape(const char* op, const char* name, const Tensor& t, int64_t rows, int64_t cols) {
  if (!t || t.dtype != Dtype::kF32 || t.rows != rows || t.cols != cols) {
    throw Error(Code::kInternal, std::string(op) + ": " + name + " has shape " + t.shape() +
                                     (t && t.dtype != Dtype::kF32 ? " but is not fp32" : "") +
                                     ", expected (" + std::to_string(rows) + ", " + std::to_string(cols) +
                                     ") in fp32");
  }
}

void require_contiguous(const char* op, const char* name, const Tensor& t) {
  if (t.rows > 1 && t.stride != t.cols) {
    throw Error(Code::kInternal, std::string(op) + ": " + name + " " + t.shape() +
                                     " must be contiguous, its stride is " + std::to_string(t.stride));
  }
}

// f(first, count) for tasks of consecutive items, about kElementsPerTask elements each.
template <typename F>
void parallel_ranges(const Cpu& cpu, int64_t items, int64_t elements_per_item, F f) {
  const int64_t per_item = elements_per_item > 0 ? elements_per_item : 1;
  const int64_t per_task = per_item >= kElementsPerTask ? 1 : kElementsPerTask / per_item;
  const int64_t tasks = (items + per_task - 1) / per_task;
  parallel_near(cpu.threads, tasks, [&](int64_t task, int) {
    const int64_t first = task * per_task;
    f(first, first + per_task <= items ? per_task : items - first);
  });
}

}  // namespace

void embedding_forward(const Cpu& cpu, Tensor out, const int32_t* ids, const int32_t* positions,
                       const Weight& wte, Tensor wpe) {
  const int64_t C = out.cols;
  require_shape("embedding_forward", "out", out, out.rows, wte.K);
  require_shape("embedding_forward", "wpe", wpe, wpe.rows, C);
  const RowsKernels& k = kernels(cpu);
  parallel_ranges(cpu, out.rows, C, [&](int64_t first, int64_t count) {
    for (int64_t n = first; n < first + count; ++n) {
      float* row = out.f32(n);
      weight_row(wte, ids[n], row);
      k.accumulate(row, wpe.f32(positions[n]), C);
    }
  });
}

void embedding_backward(const Cpu& cpu, Tensor dwte, Tensor dwpe, Tensor dout, const int32_t* ids,
                        const int32_t* positions) {
  const int64_t C = dout.cols;
  require_shape("embedding_backward", "dwte", dwte, dwte.rows, C);
  require_shape("embedding_backward", "dwpe", dwpe, dwpe.rows, C);
  const RowsKernels& k = kernels(cpu);
  // A task owns a range of columns and walks all tokens in order: tokens that share an id add up in token
  // order.
  const int64_t tasks = (C + kColumnsPerTask - 1) / kColumnsPerTask;
  parallel(cpu.threads, tasks, [&](int64_t task, int) {
    const int64_t c = task * kColumnsPerTask;
    const int64_t count = c + kColumnsPerTask <= C ? kColumnsPerTask : C - c;
    for (int64_t n = 0; n < dout.rows; ++n) {
      k.accumulate(dwte.f32(ids[n]) + c, dout.f32(n) + c, count);
      k.accumulate(dwpe.f32(positions[n]) + c, dout.f32(n) + c, count);
    }
  });
}

void layernorm_forward(const Cpu& cpu, Tensor out, Tensor mean, Tensor rstd, Tensor inp, Tensor weight,
                       Tensor bias) {
  const int64_t N = inp.rows, C = inp.cols;
  require_shape("layernorm_forward", "out", out, N, C);
  require_shape("layernorm_forward", "weight", weight, 1, C);
  require_shape("layernorm_forward", "bias", bias, 1, C);
  if (mean)
    require_shape("layernorm_forward", "mean", mean, N, 1),
        require_contiguous("layernorm_forward", "mean", mean);
  if (rstd)
    require_shape("layernorm_forward", "rstd", rstd, N, 1),
        require_contiguous("layernorm_forward", "rstd", rstd);
  const RowsKernels& k = kernels(cpu);
  parallel_ranges(cpu, N, C, [&](int64_t first, int64_t count) {
    k.layernorm_forward(out.f32(first), out.stride, mean ? mean.f32(first) : nullptr,
                        rstd ? rstd.f32(first) : nullptr, inp.f32(first), inp.stride, weight.f32(),
                        bias.f32(), count, C);
  });
}

void layernorm_backward(const Cpu& cpu, Tensor dinp, Tensor dweight, Tensor dbias, Tensor dout, Tensor inp,
                        Tensor weight, Tensor mean, Tensor rstd) {
  const int64_t N = inp.rows, C = inp.cols;
  require_shape("layernorm_backward", "dinp", dinp, N, C);
  require_shape("layernorm_backward", "dout", dout, N, C);
  require_shape("layernorm_backward", "dweight", dweight, 1, C);
  require_shape("layernorm_backward", "dbias", dbias, 1, C);
  require_shape("layernorm_backward", "weight", weight, 1, C);
  require_shape("layernorm_backward", "mean", mean, N, 1);
  require_shape("layernorm_backward", "rstd", rstd, N, 1);
  require_contiguous("layernorm_backward", "mean", mean);
  require_contiguous("layernorm_backward", "rstd", rstd);
  const RowsKernels& k = kernels(cpu);
  // Every chunk of rows sums into its own partial dweight and dbias; then chunks are added in order.
  const int64_t chunks = (N + kRowsPerChunk - 1) / kRowsPerChunk;
  static thread_local std::vector<float> partial;  // (chunks, 2, C), kept between calls
  partial.assign(static_cast<size_t>(chunks * 2 * C), 0.0f);
  float* const sums = partial.data();
  parallel(cpu.threads, chunks, [&](int64_t chunk, int) {
    const int64_t first = chunk * kRowsPerChunk;
    const int64_t count = first + kRowsPerChunk <= N ? kRowsPerChunk : N - first;
    float* chunk_sums = sums + chunk * 2 * C;
    k.layernorm_backward(dinp.f32(first), dinp.stride, chunk_sums, chunk_sums + C, dout.f32(first),
                         dout.stride, inp.f32(first), inp.stride, weight.f32(), mean.f32(first),
                         rstd.f32(first), count, C);
  });
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    k.accumulate(dweight.f32(), sums + chunk * 2 * C, C);
    k.accumulate(dbias.f32(), sums + chunk * 2 * C + C, C);
  }
}

void gelu_backward(const Cpu& cpu, Tensor dinp, Tensor dout, Tensor inp) {
  require_shape("gelu_backward", "dinp", dinp, inp.rows, inp.cols);
  require_shape("gelu_backward", "dout", dout, inp.rows, inp.cols);
  const RowsKernels& k = kernels(cpu);
  parallel_ranges(cpu, inp.rows, inp.cols, [&](int64_t first, int64_t count) {
    for (int64_t r = first; r < first + count; ++r)
      k.gelu_backward(dinp.f32(r), dout.f32(r), inp.f32(r), inp.cols);
  });
}

void adamw(const Cpu& cpu, float* params, const float* gradients, float* m, float* v, int64_t n,
           const AdamWStep& step) {
  const double t = static_cast<double>(step.step);
  AdamWConstants c;
  c.decay = static_cast<float>(1.0 - static_cast<double>(step.learning_rate) * step.weight_decay);
  c.step_size = static_cast<float>(step.learning_rate / (1.0 - std::pow(static_cast<double>(step.beta1), t)));
  c.v_scale = static_cast<float>(1.0 / (1.0 - std::pow(static_cast<double>(step.beta2), t)));
  c.beta1 = step.beta1;
  c.beta2 = step.beta2;
  c.eps = step.eps;
  c.gradient_scale = step.gradient_scale;
  const RowsKernels& k = kernels(cpu);
  parallel_ranges(cpu, n, 1, [&](int64_t first, int64_t count) {
    k.adamw(params + first, gradients + first, m + first, v + first, count, &c);
  });
}

void zero(const Cpu& cpu, void* dst, size_t bytes) {
  if (bytes < kStreamedBytes) {
    std::memset(dst, 0, bytes);
    return;
  }
  const RowsKernels& k = kernels(cpu);
  float* const floats = static_cast<float*>(dst);
  const int64_t n = static_cast<int64_t>(bytes / sizeof(float));
  parallel_ranges(cpu, n, 1, [&](int64_t first, int64_t count) { k.clear(floats + first, count); });
  std::memset(floats + n, 0, bytes % sizeof(float));
}

double sum_of_squares(const Cpu& cpu, const float* gradients, int64_t n) {
  const RowsKernels& k = kernels(cpu);
  const int64_t chunks = (n + kElementsPerTask - 1) / kElementsPerTask;
  static thread_local std::vector<double> partial;
  partial.assign(static_cast<size_t>(chunks), 0.0);
  double* const sums = partial.data();
  parallel(cpu.threads, chunks, [&](int64_t chunk, int) {
    const int64_t first = chunk * kElementsPerTask;
    sums[chunk] =
        k.sum_of_squares(gradients + first, first + kElementsPerTask <= n ? kElementsPerTask : n - first);
  });
  double sum = 0;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += sums[chunk];
  return sum;
}

}  // namespace dn::cpu
