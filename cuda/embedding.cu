// The embedding. Backward adds the rows of dout that share a token in token order: the host sorts the tokens
// (stably) into runs, long runs are cut into pieces whose sums are added in order. No atomics; the mask
// token, half of all tokens, does not hold up the rest.

#include "cuda/common.cuh"
#include "cuda/rows.h"

namespace dn::cuda {
namespace {

constexpr int kThreads = 256;

struct ForwardParams {
  void* out;
  const int32_t* ids;
  const int32_t* positions;
  const float* wte;
  const float* wpe;
  int64_t out_stride, wpe_stride, C;
  LiveRows live;
};
template <typename T>
DN_KERNEL(kThreads)
embedding_forward_kernel(ForwardParams p) {
  const int64_t n = block_x();
  if (beyond(p.live, n)) return;
  const float* const token = p.wte + p.ids[n] * p.C;
  const float* const position = p.wpe + p.positions[n] * p.wpe_stride;
  T* const out = static_cast<T*>(p.out) + n * p.out_stride;
  for (int64_t c = thread_index(); c < p.C; c += kThreads) out[c] = from_float<T>(token[c] + position[c]);
}

struct RunParams {
  float* table;
  int64_t table_stride, C;
  const void* dout;
  int64_t dout_stride;
  const int32_t* order;
  const EmbeddingRun* runs;
  float* partial;  // (pieces, C)
};
template <typename T>
DN_KERNEL(kThreads)
embedding_runs_kernel(RunParams p) {
  const EmbeddingRun run = p.runs[block_x()];
  const int64_t c = static_cast<int64_t>(block_y()) * kThreads + thread_index();
  if (c >= p.C) return;
  float* const target =
      run.partial < 0 ? p.table + run.row * p.table_stride + c : p.partial + run.partial * p.C + c;
  float sum = run.partial < 0 ? *target : 0.0f;
  for (int i = run.begin; i < run.end; ++i)
    sum += to_float(static_cast<const T*>(p.dout)[p.order[i] * p.dout_stride + c]);
  *target = sum;
}

struct SumParams {
  float* table;
  int64_t table_stride, C;
  const EmbeddingSum* sums;
  const float* partial;
};
DN_KERNEL(kThreads) embedding_sums_kernel(SumParams p) {
  const EmbeddingSum sum = p.sums[block_x()];
  const int64_t c = static_cast<int64_t>(block_y()) * kThreads + thread_index();
  if (c >= p.C) return;
  float* const target = p.table + sum.row * p.table_stride + c;
  float total = *target;
  for (int i = sum.begin; i < sum.end; ++i) total += p.partial[i * p.C + c];
  *target = total;
}

}  // namespace

void embedding_forward(Tensor out, const int32_t* ids, const int32_t* positions, const float* wte, Tensor wpe,
                       Stream stream, LiveRows live) {
  const ForwardParams p{out.data,   ids,        positions, wte, static_cast<const float*>(wpe.data),
                        out.stride, wpe.stride, out.cols,  live};
  const Grid grid{static_cast<unsigned>(out.rows)};
  if (out.dtype == Dtype::kBF16) {
    launch(embedding_forward_kernel<bf16>, grid, kThreads, 0, stream, p);
  } else {
    launch(embedding_forward_kernel<float>, grid, kThreads, 0, stream, p);
  }
}

void embedding_backward(Tensor dtable, Tensor dout, const int32_t* order, const EmbeddingRun* runs,
                        int64_t run_count, const EmbeddingSum* sums, int64_t sum_count, float* partial,
                        Stream stream) {
  const int64_t C = dout.cols;
  const RunParams p{
      static_cast<float*>(dtable.data), dtable.stride, C, dout.data, dout.stride, order, runs, partial};
  const unsigned columns = blocks_of(C, kThreads);
  const Grid grid{static_cast<unsigned>(run_count), columns};
  if (dout.dtype == Dtype::kBF16) {
    launch(embedding_runs_kernel<bf16>, grid, kThreads, 0, stream, p);
  } else {
    launch(embedding_runs_kernel<float>, grid, kThreads, 0, stream, p);
  }
  launch(embedding_sums_kernel, Grid{static_cast<unsigned>(sum_count), columns}, kThreads, 0, stream,
         SumParams{p.table, dtable.stride, C, sums, partial});
}

}  // namespace dn::cuda
