// Layer norm. Forward and dx: a warp per row, statistics in fp32 with the variance from centred values.
// dweight and dbias: a thread per column sums a chunk of rows, and chunks are added in order: no float
// atomics.

#include "cuda/common.cuh"
#include "cuda/rows.h"

namespace dn::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr float kEps = 1e-5f;
constexpr int64_t kRowsPerChunk = 128;

struct ForwardParams {
  void* out;
  const void* inp;
  const float* weight;
  const float* bias;
  float* mean;  // both may be null
  float* rstd;
  int64_t out_stride, inp_stride, N;
  int C;
  LiveRows live;
};

template <typename T, int kVector>
DN_KERNEL(kThreads)
layernorm_forward_kernel(ForwardParams p) {
  const int64_t row = static_cast<int64_t>(block_x()) * kWarps + thread_index() / kWarp;
  if (row >= p.N || beyond(p.live, row)) return;
  const int lane = thread_index() % kWarp;
  const T* const inp = static_cast<const T*>(p.inp) + row * p.inp_stride;
  T* const out = static_cast<T*>(p.out) + row * p.out_stride;
  float x[kVector], sum = 0;
  for (int c = lane * kVector; c < p.C; c += kWarp * kVector) {
    load_vector(x, inp + c);
    DN_UNROLL
    for (int i = 0; i < kVector; ++i) sum += x[i];
  }
  const float mean = warp_sum(sum) / static_cast<float>(p.C);
  float squares = 0;
  for (int c = lane * kVector; c < p.C; c += kWarp * kVector) {
    load_vector(x, inp + c);
    DN_UNROLL
    for (int i = 0; i < kVector; ++i) squares += (x[i] - mean) * (x[i] - mean);
  }
  const float rstd = 1 / sqrtf(warp_sum(squares) / static_cast<float>(p.C) + kEps);
  for (int c = lane * kVector; c < p.C; c += kWarp * kVector) {
    float weight[kVector], bias[kVector];
    load_vector(x, inp + c);
    load_vector(weight, p.weight + c);
    load_vector(bias, p.bias + c);
    DN_UNROLL
    for (int i = 0; i < kVector; ++i) x[i] = (x[i] - mean) * rstd * weight[i] + bias[i];
    store_vector(out + c, x);
  }
  if (lane != 0) return;
  if (p.mean) p.mean[row] = mean;
  if (p.rstd) p.rstd[row] = rstd;
}

struct BackwardParams {
  void* dinp;
  const void* dout;
  const void* inp;
  const float* weight;
  const float* mean;
  const float* rstd;
  float* partial;  // (chunks, 2, C)
  int64_t dinp_stride, dout_stride, inp_stride, N;
  int C;
  float inverse_C;  // a division would call a routine that makes the kernel spill
};

// With norm = (x - mean) rstd and dnorm = dout * weight: dx = rstd (dnorm - avg(dnorm) - norm avg(dnorm *
// norm)).
template <typename T, int kVector>
DN_KERNEL(kThreads)
layernorm_backward_input_kernel(BackwardParams p) {
  const int64_t row = static_cast<int64_t>(block_x()) * kWarps + thread_index() / kWarp;
  if (row >= p.N) return;
  const int lane = thread_index() % kWarp;
  const T* const inp = static_cast<const T*>(p.inp) + row * p.inp_stride;
  const T* const dout = static_cast<const T*>(p.dout) + row * p.dout_stride;
  T* const dinp = static_cast<T*>(p.dinp) + row * p.dinp_stride;
  const float mean = p.mean[row], rstd = p.rstd[row];
  float x[kVector], dy[kVector], weight[kVector], sum = 0, product = 0;
  for (int c = lane * kVector; c < p.C; c += kWarp * kVector) {
    load_vector(x, inp + c);
    load_vector(dy, dout + c);
    load_vector(weight, p.weight + c);
    DN_UNROLL
    for (int i = 0; i < kVector; ++i) {
      const float dnorm = dy[i] * weight[i];
      sum += dnorm;
      product += dnorm * (x[i] - mean) * rstd;
    }
  }
  sum = warp_sum(sum) * p.inverse_C;
  product = warp_sum(product) * p.inverse_C;
  for (int c = lane * kVector; c < p.C; c += kWarp * kVector) {
    float dx[kVector];
    load_vector(x, inp + c);
    load_vector(dy, dout + c);
    load_vector(weight, p.weight + c);
    load_vector(dx, dinp + c);
    DN_UNROLL
    for (int i = 0; i < kVector; ++i)
      dx[i] += (dy[i] * weight[i] - sum - (x[i] - mean) * rstd * product) * rstd;
    store_vector(dinp + c, dx);
  }
}

template <typename T>
DN_KERNEL(kThreads)
layernorm_backward_weight_kernel(BackwardParams p) {
  const int c = block_x() * kThreads + thread_index();
  if (c >= p.C) return;
  const int64_t first = static_cast<int64_t>(block_y()) * kRowsPerChunk;
  const int64_t end = first + kRowsPerChunk < p.N ? first + kRowsPerChunk : p.N;
  float dweight = 0, dbias = 0;
  for (int64_t row = first; row < end; ++row) {
    const float x = to_float(static_cast<const T*>(p.inp)[row * p.inp_stride + c]);
    const float dy = to_float(static_cast<const T*>(p.dout)[row * p.dout_stride + c]);
    dweight += dy * (x - p.mean[row]) * p.rstd[row];
    dbias += dy;
  }
  float* const partial = p.partial + static_cast<int64_t>(block_y()) * 2 * p.C;
  partial[c] = dweight;
  partial[p.C + c] = dbias;
}

bool vectors(std::initializer_list<int64_t> extents) {
  for (const int64_t e : extents) {
    if (e % 4 != 0) return false;
  }
  return true;
}

template <typename T>
void run_forward(const ForwardParams& p, Stream stream) {
  const Grid grid{blocks_of(p.N, kWarps)};
  if (vectors({p.C, p.out_stride, p.inp_stride})) {
    launch(layernorm_forward_kernel<T, 4>, grid, kThreads, 0, stream, p);
  } else {
    launch(layernorm_forward_kernel<T, 1>, grid, kThreads, 0, stream, p);
  }
}

template <typename T>
void run_backward(const BackwardParams& p, Stream stream) {
  const Grid grid{blocks_of(p.N, kWarps)};
  launch(layernorm_backward_weight_kernel<T>, Grid{blocks_of(p.C, kThreads), blocks_of(p.N, kRowsPerChunk)},
         kThreads, 0, stream, p);
  // fp32 is the mode for checking: one element at a time is fast enough.
  if constexpr (sizeof(T) == 2) {
    if (vectors({p.C, p.dinp_stride, p.dout_stride, p.inp_stride})) {
      launch(layernorm_backward_input_kernel<T, 4>, grid, kThreads, 0, stream, p);
      return;
    }
  }
  launch(layernorm_backward_input_kernel<T, 1>, grid, kThreads, 0, stream, p);
}

}  // namespace

void layernorm_forward(Tensor out, float* mean, float* rstd, Tensor inp, const float* weight,
                       const float* bias, Stream stream, LiveRows live) {
  const ForwardParams p{out.data, inp.data,   weight,     bias,     mean,
                        rstd,     out.stride, inp.stride, inp.rows, static_cast<int>(inp.cols),
                        live};
  inp.dtype == Dtype::kBF16 ? run_forward<bf16>(p, stream) : run_forward<float>(p, stream);
}

int64_t layernorm_partial_rows(int64_t N) { return blocks_of(N, kRowsPerChunk); }

void layernorm_backward(Tensor dinp, float* dweight, float* dbias, Tensor dout, Tensor inp,
                        const float* weight, const float* mean, const float* rstd, float* partial,
                        Stream stream) {
  const BackwardParams p{dinp.data,
                         dout.data,
                         inp.data,
                         weight,
                         mean,
                         rstd,
                         partial,
                         dinp.stride,
                         dout.stride,
                         inp.stride,
                         inp.rows,
                         static_cast<int>(inp.cols),
                         1 / static_cast<float>(inp.cols)};
  inp.dtype == Dtype::kBF16 ? run_backward<bf16>(p, stream) : run_backward<float>(p, stream);
  const int64_t chunks = layernorm_partial_rows(inp.rows);
  add_partial_rows(dweight, partial, chunks, inp.cols, 2 * inp.cols, stream);
  add_partial_rows(dbias, partial + inp.cols, chunks, inp.cols, 2 * inp.cols, stream);
}

}  // namespace dn::cuda
