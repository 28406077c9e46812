// CudaBackend: the ops that are one or two launches, with the lists that they need. Embeddings, layer norm,
// products, GELU and the optimiser, whose segments are gathered into one launch.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "cuda/backend_cuda.h"
#include "cuda/gemm.h"

namespace dn::cuda {
namespace {

float* f32(const Tensor& t) { return static_cast<float*>(t.data); }

}  // namespace

void CudaBackend::embedding_forward(Tensor out, const int32_t* ids, const int32_t* positions,
                                    const Weight& wte, Tensor wpe) {
  const Stream stream = begin();
  check("embedding_forward", "out", out, out.rows, wte.K, dtype_);
  check("embedding_forward", "wpe", wpe, wpe.rows, wte.K, Dtype::kF32);
  const int32_t* const device_ids = staging_.list(ids, out.rows);
  cuda::embedding_forward(out, device_ids, staging_.list(positions, out.rows),
                          static_cast<const float*>(wte.data), wpe, stream);
}

void CudaBackend::add_embedding_gradient(Tensor dtable, Tensor dout, const int32_t* rows, const char* what) {
  check("embedding_backward", what, dtable, dtable.rows, dout.cols, Dtype::kF32);
  const int64_t N = dout.rows;
  // Tokens by row, stably: a counting sort, because a stable comparison sort of a large batch takes longer
  // than the launch.
  std::vector<int32_t> first(static_cast<size_t>(dtable.rows) + 1, 0), order(static_cast<size_t>(N));
  for (int64_t n = 0; n < N; ++n) ++first[static_cast<size_t>(rows[n]) + 1];
  for (size_t r = 1; r < first.size(); ++r) first[r] += first[r - 1];
  std::vector<int32_t> next(first.begin(), first.end() - 1);
  for (int64_t n = 0; n < N; ++n)
    order[static_cast<size_t>(next[static_cast<size_t>(rows[n])]++)] = static_cast<int32_t>(n);
  std::vector<EmbeddingRun> runs;
  std::vector<EmbeddingSum> sums;
  int32_t pieces = 0;
  for (size_t r = 0; r + 1 < first.size(); ++r) {
    const int32_t begin = first[r], end = first[r + 1], row = static_cast<int32_t>(r);
    if (begin == end) continue;
    if (end - begin <= kRunPiece) {
      runs.push_back({row, begin, end, -1});
      continue;
    }
    const int32_t piece = pieces;
    for (int32_t at = begin; at < end; at += kRunPiece)
      runs.push_back({row, at, std::min(at + kRunPiece, end), pieces++});
    sums.push_back({row, piece, pieces});
  }
  float* const partial = partial_.take<float>(pieces * dout.cols);
  const int32_t* const device_order = staging_.list(order.data(), N);
  const EmbeddingRun* const device_runs = staging_.list(runs.data(), static_cast<int64_t>(runs.size()));
  const EmbeddingSum* const device_sums = staging_.list(sums.data(), static_cast<int64_t>(sums.size()));
  cuda::embedding_backward(dtable, dout, device_order, device_runs, static_cast<int64_t>(runs.size()),
                           device_sums, static_cast<int64_t>(sums.size()), partial, state_->stream());
}

void CudaBackend::embedding_backward(Tensor dwte, Tensor dwpe, Tensor dout, const int32_t* ids,
                                     const int32_t* positions) {
  begin();
  check("embedding_backward", "dout", dout, dout.rows, dwte.cols, dtype_);
  if (dout.rows == 0) return;
  add_embedding_gradient(dwte, dout, ids, "dwte");
  add_embedding_gradient(dwpe, dout, positions, "dwpe");
}

void CudaBackend::layernorm_forward(Tensor out, Tensor mean, Tensor rstd, Tensor inp, Tensor weight,
                                    Tensor bias) {
  const Stream stream = begin();
  const char* const op = "layernorm_forward";
  check(op, "inp", inp, inp.rows, inp.cols, dtype_);
  check(op, "out", out, inp.rows, inp.cols, dtype_);
  check(op, "weight", weight, 1, inp.cols, Dtype::kF32);
  check(op, "bias", bias, 1, inp.cols, Dtype::kF32);
  if (mean) check(op, "mean", mean, inp.rows, 1, Dtype::kF32);
  if (rstd) check(op, "rstd", rstd, inp.rows, 1, Dtype::kF32);
  cuda::layernorm_forward(out, f32(mean), f32(rstd), inp, f32(weight), f32(bias), stream, live_);
}

void CudaBackend::layernorm_backward(Tensor dinp, Tensor dweight, Tensor dbias, Tensor dout, Tensor inp,
                                     Tensor weight, Tensor mean, Tensor rstd) {
  const Stream stream = begin();
  const char* const op = "layernorm_backward";
  const int64_t N = inp.rows, C = inp.cols;
  check(op, "inp", inp, N, C, dtype_);
  check(op, "dinp", dinp, N, C, dtype_);
  check(op, "dout", dout, N, C, dtype_);
  check(op, "weight", weight, 1, C, Dtype::kF32);
  check(op, "dweight", dweight, 1, C, Dtype::kF32);
  check(op, "dbias", dbias, 1, C, Dtype::kF32);
  check(op, "mean", mean, N, 1, Dtype::kF32);
  check(op, "rstd", rstd, N, 1, Dtype::kF32);
  if (N == 0) return;
  float* const partial = partial_.take<float>(layernorm_partial_rows(N) * 2 * C);
  cuda::layernorm_backward(dinp, f32(dweight), f32(dbias), dout, inp, f32(weight), f32(mean), f32(rstd),
                           partial, stream);
}

Operand CudaBackend::operand(const Weight& w) {
  Operand o;
  o.data = dtype_ == Dtype::kBF16 ? state_->shadow(w.data) : w.data;
  o.transposed = w.order == WeightOrder::kOutIn;
  o.stride = o.transposed ? w.K : w.N;
  return o;
}

void CudaBackend::multiply(const Product& product) {
  cuda::multiply(product, library_.get(), multiprocessors_, state_->stream());
}

void CudaBackend::matmul_forward(Tensor out, Tensor inp, const Weight& w, Tensor bias, Epilogue epilogue,
                                 Tensor extra, MatmulPrecision) {
  begin();
  const char* const op = "matmul_forward";
  check(op, "inp", inp, inp.rows, w.K, dtype_);
  check(op, "out", out, inp.rows, w.N, dtype_);
  if (bias) check(op, "bias", bias, 1, w.N, Dtype::kF32);
  if (epilogue == Epilogue::kResidual || (epilogue == Epilogue::kGelu && extra))
    check(op, "extra", extra, inp.rows, w.N, dtype_);
  Product p;
  p.M = inp.rows;
  p.N = w.N;
  p.K = w.K;
  p.input = p.output = dtype_;
  p.a = {inp.data, inp.stride, false};
  p.b = operand(w);
  p.c = out.data;
  p.c_stride = out.stride;
  p.bias = f32(bias);
  p.epilogue = epilogue;
  p.extra = extra.data;
  p.extra_stride = extra.stride;
  p.live = live_;
  multiply(p);
}

void CudaBackend::matmul_backward(Tensor dinp, Tensor dweight, Tensor dbias, Tensor dout, Tensor inp,
                                  const Weight& w, MatmulPrecision, Store store) {
  const Stream stream = begin();
  const char* const op = "matmul_backward";
  const int64_t M = dout.rows;
  check(op, "dout", dout, M, w.N, dtype_);
  if (dinp) {  // dout (M, N) W^T
    check(op, "dinp", dinp, M, w.K, dtype_);
    Product p;
    p.M = M;
    p.N = w.K;
    p.K = w.N;
    p.input = p.output = dtype_;
    p.a = {dout.data, dout.stride, false};
    p.b = operand(w);
    p.b.transposed = !p.b.transposed;
    p.c = dinp.data;
    p.c_stride = dinp.stride;
    multiply(p);
  }
  if (dweight) {  // inp^T dout, or its transpose
    check(op, "inp", inp, M, w.K, dtype_);
    const bool in_out = w.order == WeightOrder::kInOut;
    const Tensor& left = in_out ? inp : dout;
    const Tensor& right = in_out ? dout : inp;
    check(op, "dweight", dweight, left.cols, right.cols, Dtype::kF32);
    Product p;
    p.M = left.cols;
    p.N = right.cols;
    p.K = M;
    p.input = dtype_;
    p.output = Dtype::kF32;
    p.a = {left.data, left.stride, true};
    p.b = {right.data, right.stride, false};
    p.c = dweight.data;
    p.c_stride = dweight.stride;
    p.accumulate = store == Store::kAdd;
    multiply(p);
  }
  if (dbias) {
    check(op, "dbias", dbias, 1, w.N, Dtype::kF32);
    add_column_sums(f32(dbias), dout, partial_.take<float>(column_partial_rows(M) * w.N), stream);
  }
}

void CudaBackend::gelu_backward(Tensor dinp, Tensor dout, Tensor inp) {
  const Stream stream = begin();
  check("gelu_backward", "inp", inp, inp.rows, inp.cols, dtype_);
  check("gelu_backward", "dout", dout, inp.rows, inp.cols, dtype_);
  check("gelu_backward", "dinp", dinp, inp.rows, inp.cols, dtype_);
  cuda::gelu_backward(dinp, dout, inp, stream);
}

// Segments wait until something else is asked for, so that a step over the whole parameter table is one
// launch.
void CudaBackend::adamw(void* params, const void* gradients, void* m, void* v, int64_t n,
                        const AdamWStep& step) {
  const double t = static_cast<double>(step.step);
  AdamWConstants k;
  k.step_size = static_cast<float>(step.learning_rate / (1.0 - std::pow(static_cast<double>(step.beta1), t)));
  k.v_scale = static_cast<float>(1.0 / (1.0 - std::pow(static_cast<double>(step.beta2), t)));
  k.beta1 = step.beta1;
  k.beta2 = step.beta2;
  k.eps = step.eps;
  k.gradient_scale = step.gradient_scale;
  if (!segments_.empty() && std::memcmp(&k, &adamw_constants_, sizeof k) != 0) flush_adamw();
  if (n == 0) return;
  adamw_constants_ = k;
  AdamWSegment s;
  s.params = static_cast<float*>(params);
  s.gradients = static_cast<const float*>(gradients);
  s.m = static_cast<float*>(m);
  s.v = static_cast<float*>(v);
  s.n = n;
  s.shadow = dtype_ == Dtype::kBF16 ? state_->fresh_shadow(params) : nullptr;
  if (!segments_.empty()) s.first_block = segments_.back().first_block + adamw_blocks(segments_.back().n);
  s.decay = static_cast<float>(1.0 - static_cast<double>(step.learning_rate) * step.weight_decay);
  segments_.push_back(s);
}

void CudaBackend::flush_adamw() {
  std::vector<AdamWSegment> segments;
  segments.swap(segments_);
  staging_.begin_op();
  state_->use();
  const int64_t blocks = segments.back().first_block + adamw_blocks(segments.back().n);
  const int64_t count = static_cast<int64_t>(segments.size());
  cuda::adamw(staging_.list(segments.data(), count), count, blocks, adamw_constants_, state_->stream());
  for (const AdamWSegment& s : segments) {
    if (!s.shadow) state_->touch(s.params);
  }
}

double CudaBackend::sum_of_squares(const void* gradients, int64_t n) {
  const Stream stream = begin();
  if (n == 0) return 0;
  double* const sums = doubles_.take<double>(1 + square_partials(n));
  cuda::sum_of_squares(sums, static_cast<const float*>(gradients), n, sums + 1, stream);
  double sum = 0;
  copy_to_host(&sum, sums, sizeof sum, stream);
  cuda::synchronize(stream);
  return sum;
}

}  // namespace dn::cuda
