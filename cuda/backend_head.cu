// The head. Rows that are only denoised go through the fused kernel, which keeps no logits (head_fused.cu).
// Training, and rows with a guide or a filter, are gathered, projected in chunks whose fp32 logits fit a
// bounded piece of memory, and consumed there (head.cu).

#include <algorithm>
#include <numeric>
#include <vector>

#include "core/error.h"
#include "cuda/backend_cuda.h"
#include "cuda/gemm.h"
#include "cuda/head.h"

namespace dn::cuda {
namespace {

// Training: a chunk's products add to dwte (V, C) in memory, which only many rows pay for. Sampling: few
// enough that the logits are still in the cache when they are read.
constexpr int64_t kTrainingRows = 4096;
constexpr int64_t kSamplingRows = 512;
constexpr int64_t kFewestRows = 16;

[[noreturn]] void refuse(const char* op, const std::string& what) {
  throw Error(Code::kArgument, std::string(op) + ": " + what);
}

void check_row(const char* op, int64_t r, int64_t row, const Tensor& hidden) {
  if (row < 0 || row >= hidden.rows)
    refuse(op, "row " + std::to_string(r) + " of the list is " + std::to_string(row) + ", outside hidden " +
                   hidden.shape());
}

void check_id(const char* op, const char* what, int64_t r, int32_t id, int64_t V) {
  if (id < 0 || id >= V)
    refuse(op, std::string(what) + " " + std::to_string(r) + " is id " + std::to_string(id) +
                   ", outside the vocabulary of " + std::to_string(V));
}

// logits (rows, V) fp32 = inp * wte^T.
Product projection(float* logits, int64_t stride, const Tensor& inp, const Operand& wte, int64_t V) {
  Product p;
  p.M = inp.rows;
  p.N = V;
  p.K = inp.cols;
  p.input = inp.dtype;
  p.output = Dtype::kF32;
  p.a = {inp.data, inp.stride, false};
  p.b = wte;
  p.c = logits;
  p.c_stride = stride;
  return p;
}

}  // namespace

int64_t CudaBackend::head_chunk_rows(int64_t V, bool training) const {
  const int64_t fit = static_cast<int64_t>(device_memory_ / 32 / sizeof(float)) / logits_stride(V);
  return std::max(kFewestRows, std::min(training ? kTrainingRows : kSamplingRows, fit));
}

Tensor CudaBackend::gather_hidden(const char* op, Tensor hidden, const int64_t* rows, int64_t R) {
  for (int64_t r = 0; r < R; ++r) check_row(op, r, rows[r], hidden);
  void* const data = hidden_rows_.reserve(static_cast<size_t>(R * hidden.cols) * dtype_bytes(dtype_));
  const Tensor gathered(data, dtype_, R, hidden.cols);
  if (R > 0) gather_rows(gathered, hidden, staging_.list(rows, R), state_->stream());
  return gathered;
}

void CudaBackend::head_logits(Tensor logits, Tensor hidden, const int64_t* rows, int64_t R,
                              const Weight& wte) {
  begin();
  check("head_logits", "hidden", hidden, hidden.rows, wte.K, dtype_);
  if (logits.rows < R || logits.cols != wte.N || logits.dtype != Dtype::kF32)
    refuse("head_logits", "logits are " + logits.shape() + ", expected (" + std::to_string(R) + ", " +
                              std::to_string(wte.N) + ") in fp32");
  if (R == 0) return;
  const Tensor inp = gather_hidden("head_logits", hidden, rows, R);
  multiply(projection(static_cast<float*>(logits.data), logits.stride, inp, operand(wte), wte.N));
}

FusedDenoiseCall CudaBackend::fused_call(Tensor hidden, const Weight& wte) {
  FusedDenoiseCall call;
  if (dtype_ != Dtype::kBF16) return call;
  const Operand head = operand(wte);
  if (!head.transposed) return call;
  call.hidden = hidden.data;
  call.hidden_stride = hidden.stride;
  call.wte = head.data;
  call.wte_stride = head.stride;
  call.V = wte.N;
  call.C = wte.K;
  return call;
}

void CudaBackend::run_fused(FusedDenoiseCall call) {
  call.parts = head_parts_.take<TilePart>(std::min(call.R, kFusedRows) * head_tiles(call.V));
  fused_denoise(call, multiprocessors_, state_->stream());
}

void CudaBackend::denoise_chunks(DenoiseResult* results, float* watched, Tensor hidden,
                                 const DenoiseRow* rows, int64_t R, const int32_t* device_watch,
                                 int64_t watch_count, const Weight& wte) {
  const int64_t V = wte.N, stride = logits_stride(V), capacity = head_chunk_rows(V, false);
  const Operand head = operand(wte);
  std::vector<DenoiseRow> chunk;
  std::vector<int64_t> inputs;
  for (int64_t begin_row = 0, end = 0; begin_row < R; begin_row = end) {
    chunk.clear();
    inputs.clear();
    for (end = begin_row; end < R; ++end) {
      const bool guided = rows[end].guide_row >= 0;
      if (static_cast<int64_t>(inputs.size()) + (guided ? 2 : 1) > capacity) break;
      chunk.push_back(rows[end]);
      chunk.back().row = static_cast<int64_t>(inputs.size());
      inputs.push_back(rows[end].row);
      if (!guided) continue;
      chunk.back().guide_row = static_cast<int64_t>(inputs.size());
      inputs.push_back(rows[end].guide_row);
    }
    const int64_t count = end - begin_row, logit_rows = static_cast<int64_t>(inputs.size());
    float* const logits = logits_.take<float>(logit_rows * stride);
    const Tensor inp = gather_hidden("head_denoise", hidden, inputs.data(), logit_rows);
    multiply(projection(logits, stride, inp, head, V));
    DenoiseCall call;
    call.logits = logits;
    call.stride = stride;
    call.V = V;
    call.rows = staging_.list(chunk.data(), count);
    call.R = count;
    call.tile_mass = tile_mass_.take<double>(count * head_tiles(V));
    call.watch = device_watch;
    call.watch_count = watch_count;
    call.watched = watched + begin_row * watch_count;
    call.results = results + begin_row;
    denoise(call, state_->stream());
  }
}

void CudaBackend::head_denoise(DenoiseStats* stats, float* watched, Tensor hidden, const DenoiseRow* rows,
                               int64_t R, const int32_t* watch, int64_t watch_count, const Weight& wte) {
  const Stream stream = begin();
  const char* const op = "head_denoise";
  const int64_t V = wte.N;
  check(op, "hidden", hidden, hidden.rows, wte.K, dtype_);
  check_denoise(op, rows, R, hidden.rows, watch, watch_count, V);
  if (R == 0) return;

  // Rows that the fused kernel takes come first; order: where a row stands in the caller's list.
  FusedDenoiseCall fused = fused_call(hidden, wte);
  const bool fits = fused_denoise_fits(fused);
  std::vector<int64_t> order(static_cast<size_t>(R));
  std::iota(order.begin(), order.end(), int64_t{0});
  fused.R = std::stable_partition(order.begin(), order.end(),
                                  [&](int64_t r) { return fits && !rows[r].needs_logits(V); }) -
            order.begin();
  std::vector<DenoiseRow> ordered;
  for (const int64_t r : order) ordered.push_back(rows[r]);

  DenoiseResult* const results = results_.take<DenoiseResult>(R);
  float* const device_watched = partial_.take<float>(R * std::max<int64_t>(watch_count, 1));
  const int32_t* const device_watch = watch_count > 0 ? staging_.list(watch, watch_count) : nullptr;
  if (fused.R > 0) {
    fused.rows = staging_.list(ordered.data(), fused.R);
    fused.watch = device_watch;
    fused.watch_count = watch_count;
    fused.watched = device_watched;
    fused.results = results;
    run_fused(fused);
  }
  denoise_chunks(results + fused.R, device_watched + fused.R * watch_count, hidden, ordered.data() + fused.R,
                 R - fused.R, device_watch, watch_count, wte);

  std::vector<DenoiseResult> host(static_cast<size_t>(R));
  std::vector<float> host_watched(static_cast<size_t>(R * watch_count));
  copy_to_host(host.data(), results, host.size() * sizeof(DenoiseResult), stream);
  if (watch_count > 0)
    copy_to_host(host_watched.data(), device_watched, host_watched.size() * sizeof(float), stream);
  cuda::synchronize(stream);
  for (int64_t i = 0; i < R; ++i) {
    const int64_t r = order[static_cast<size_t>(i)];
    const DenoiseResult& result = host[static_cast<size_t>(i)];
    if (result.not_finite >= 0) {
      throw Error(Code::kDiverged, "head_denoise: logits of row " + std::to_string(r) +
                                       " are not finite: id " + std::to_string(result.not_finite) + " has " +
                                       std::to_string(result.value) + " (hidden row " +
                                       std::to_string(rows[r].row) + ", position " +
                                       std::to_string(rows[r].position) + ")");
    }
    stats[r] = result.stats;
    if (watch_count > 0)
      std::copy_n(host_watched.data() + i * watch_count, watch_count, watched + r * watch_count);
  }
}

void CudaBackend::head_denoise_listed(DenoiseResult* results, Tensor hidden, const DenoiseRow* rows,
                                      int64_t R, const int32_t* count, const Weight& wte) {
  begin();
  const char* const op = "head_denoise_listed";
  check(op, "hidden", hidden, hidden.rows, wte.K, dtype_);
  FusedDenoiseCall call = fused_call(hidden, wte);
  if (!fused_denoise_fits(call))
    refuse(op, "hidden " + hidden.shape() + " and a head of (K, N) = " + wte.shape() +
                   " do not fit the fused kernel (bf16, rows aligned to 16 bytes)");
  if (R == 0) return;
  call.rows = rows;
  call.R = R;
  call.live = {count, 0};
  call.results = results;
  run_fused(call);
}

void CudaBackend::head_cross_entropy(float* losses, Tensor dhidden, Tensor dwte, Tensor hidden,
                                     const int64_t* rows, const int32_t* targets, const float* weights,
                                     int64_t R, const Weight& wte, MatmulPrecision, Store store) {
  const Stream stream = begin();
  const char* const op = "head_cross_entropy";
  const int64_t V = wte.N, C = wte.K, stride = logits_stride(V);
  const bool with_gradients = static_cast<bool>(dhidden);
  check(op, "hidden", hidden, hidden.rows, C, dtype_);
  for (int64_t r = 0; r < R; ++r) check_id(op, "target", r, targets[r], V);
  if (with_gradients) {
    check(op, "dhidden", dhidden, hidden.rows, C, dtype_);
    check(op, "dwte", dwte, V, C, Dtype::kF32);
    if (dhidden.stride != C) refuse(op, "dhidden " + dhidden.shape() + " must be contiguous");
    // Rows are scattered by parallel threads, so none may be listed twice.
    std::vector<uint8_t> seen(static_cast<size_t>(hidden.rows), 0);
    for (int64_t r = 0; r < R; ++r) {
      check_row(op, r, rows[r], hidden);
      if (seen[static_cast<size_t>(rows[r])]++)
        refuse(op, "row " + std::to_string(rows[r]) + " is listed twice");
    }
    fill_zero(dhidden.data, static_cast<size_t>(dhidden.rows * C) * dtype_bytes(dtype_), stream);
    if (R == 0 && store == Store::kSet)
      fill_zero(dwte.data, static_cast<size_t>(V * dwte.stride) * sizeof(float), stream);
  }
  if (R == 0) return;

  const int64_t chunk = std::min(R, head_chunk_rows(V, true));
  const Operand head = operand(wte);
  float* const device_losses = results_.take<float>(R);
  float* const logits = logits_.take<float>(chunk * stride);
  for (int64_t begin_row = 0; begin_row < R; begin_row += chunk) {
    const int64_t count = std::min(chunk, R - begin_row);
    const Tensor inp = gather_hidden(op, hidden, rows + begin_row, count);
    multiply(projection(logits, stride, inp, head, V));
    CrossEntropyCall call;
    call.logits = logits;
    call.stride = stride;
    call.rows = count;
    call.V = V;
    call.targets = staging_.list(targets + begin_row, count);
    call.weights = staging_.list(weights + begin_row, count);
    call.losses = device_losses + begin_row;
    call.gradients = with_gradients;
    call.gradient = dtype_;
    cross_entropy(call, stream);
    if (!with_gradients) continue;

    // dlogits (count, V) lie where the logits were.
    const Operand dlogits{logits, dtype_ == Dtype::kBF16 ? 2 * stride : stride, false};
    const Tensor drows(gradient_rows_.reserve(static_cast<size_t>(count * C) * dtype_bytes(dtype_)), dtype_,
                       count, C);
    Product to_hidden;  // dlogits (count, V) wte (V, C)
    to_hidden.M = count;
    to_hidden.N = C;
    to_hidden.K = V;
    to_hidden.input = to_hidden.output = dtype_;
    to_hidden.a = dlogits;
    to_hidden.b = head;
    to_hidden.b.transposed = !to_hidden.b.transposed;
    to_hidden.c = drows.data;
    to_hidden.c_stride = C;
    to_hidden.padded_k = true;
    multiply(to_hidden);
    scatter_rows(dhidden, drows, staging_.list(rows + begin_row, count), stream);
    Product to_weight;  // dlogits^T (V, count) rows (count, C)
    to_weight.M = V;
    to_weight.N = C;
    to_weight.K = count;
    to_weight.input = dtype_;
    to_weight.output = Dtype::kF32;
    to_weight.a = dlogits;
    to_weight.a.transposed = true;
    to_weight.b = {inp.data, inp.stride, false};
    to_weight.c = dwte.data;
    to_weight.c_stride = dwte.stride;
    to_weight.accumulate = begin_row > 0 || store == Store::kAdd;
    multiply(to_weight);
  }
  copy_to_host(losses, device_losses, static_cast<size_t>(R) * sizeof(float), stream);
  cuda::synchronize(stream);
}

}  // namespace dn::cuda
