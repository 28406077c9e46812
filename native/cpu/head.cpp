// The output head fused with its consumers: logits of listed rows, masked cross-entropy with its gradients,
// and the statistics and draws of a denoising step. (R, V) logits are never held in full: rows go through in
// chunks whose logits fit a bounded buffer, and everything done to a row depends on that row alone, so
// neither the chunks nor the threads change a bit.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <mutex>
#include <string>
#include <vector>

#include "core/error.h"
#include "cpu/gemm.h"
#include "cpu/head_kernels.h"
#include "cpu/ops.h"
#include "cpu/scratch.h"
#include "cpu/thread_pool.h"

namespace dn::cpu {
namespace {

// Logits held at a time: 16 MB, which stay near while they are worked on, but no fewer than 256 rows, since
// every chunk reads the (V, C) weight, and in training its gradient, once more. 51 MB at V = 50257. Fewer
// where these would take more than 256 MB, beyond a V of 262,000.
constexpr int64_t kChunkBytes = int64_t{16} << 20;
constexpr int64_t kMostChunkBytes = int64_t{256} << 20;
constexpr int64_t kMinChunkRows = 256;

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Elements between rows of a logits chunk: whole cache lines, and not a multiple of 4 KiB, where rows would
// compete for the same cache sets.
int64_t chunk_stride(int64_t V) {
  const int64_t stride = round_up(V, 16);
  return stride % 1024 == 0 ? stride + 16 : stride;
}

int64_t chunk_rows(int64_t V) {
  const int64_t bytes = chunk_stride(V) * static_cast<int64_t>(sizeof(float));
  const int64_t most = std::max<int64_t>(1, kMostChunkBytes / bytes);
  return std::max(std::min(kMinChunkRows, most), kChunkBytes / bytes);
}

// The scratch of a call in flight. Calls take turns with the blocks, which all threads of the process share
// and which live as long as it does.
class CallScratch {
 public:
  CallScratch() {
    const std::lock_guard<std::mutex> lock(mutex());
    if (idle().empty()) return;
    scratch_ = std::move(idle().back());
    idle().pop_back();
  }
  ~CallScratch() {
    const std::lock_guard<std::mutex> lock(mutex());
    idle().push_back(std::move(scratch_));
  }
  CallScratch(const CallScratch&) = delete;
  CallScratch& operator=(const CallScratch&) = delete;

  Scratch& scratch() { return scratch_; }

 private:
  // Never destroyed: a call may still run on another thread while the process ends.
  static std::mutex& mutex() {
    static std::mutex* const instance = new std::mutex;
    return *instance;
  }
  static std::vector<Scratch>& idle() {
    static std::vector<Scratch>* const instance = new std::vector<Scratch>;
    return *instance;
  }

  Scratch scratch_;
};

void check_hidden(const char* op, Tensor hidden, const Weight& wte) {
  if (hidden.cols != wte.K) {
    throw Error(Code::kArgument, std::string(op) + ": hidden is " + hidden.shape() + ", expected " +
                                     std::to_string(wte.K) +
                                     " columns for a head of (K, N) = " + wte.shape());
  }
}

void check_row(const char* op, int64_t r, int64_t row, Tensor hidden) {
  if (row < 0 || row >= hidden.rows) {
    throw Error(Code::kArgument, std::string(op) + ": row " + std::to_string(r) + " of the list is " +
                                     std::to_string(row) + ", outside hidden " + hidden.shape());
  }
}

void check_id(const char* op, const char* what, int64_t r, int32_t id, int64_t V) {
  if (id < 0 || id >= V) {
    throw Error(Code::kArgument, std::string(op) + ": " + what + " " + std::to_string(r) + " is id " +
                                     std::to_string(id) + ", outside the vocabulary of " + std::to_string(V));
  }
}

double sum_of(const double* x, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += x[i];
  return sum;
}

}  // namespace

const HeadKernels& head_kernels(Isa isa) {
  if (isa >= Isa::kAvx512) return kHeadAvx512;
  return isa >= Isa::kAvx2 ? kHeadAvx2 : kHeadPortable;
}

void head_logits(const Cpu& cpu, Tensor logits, Tensor hidden, const int64_t* rows, int64_t R,
                 const Weight& wte) {
  check_hidden("head_logits", hidden, wte);
  if (logits.rows < R || logits.cols != wte.N) {
    throw Error(Code::kArgument, "head_logits: logits are " + logits.shape() + ", expected (" +
                                     std::to_string(R) + ", " + std::to_string(wte.N) + ")");
  }
  if (R == 0) return;
  std::vector<const float*> inputs(static_cast<size_t>(R));
  for (int64_t r = 0; r < R; ++r) {
    check_row("head_logits", r, rows[r], hidden);
    inputs[static_cast<size_t>(r)] = hidden.f32(rows[r]);
  }
  head_gemm(cpu, logits.f32(), logits.stride, inputs.data(), R, wte, 0, wte.N, MatmulPrecision::kFP32);
}

void head_denoise(const Cpu& cpu, DenoiseStats* stats, float* watched, Tensor hidden, const DenoiseRow* rows,
                  int64_t R, const int32_t* watch, int64_t watch_count, const Weight& wte) {
  const int64_t V = wte.N;
  check_hidden("head_denoise", hidden, wte);
  check_denoise("head_denoise", rows, R, hidden.rows, watch, watch_count, V);
  if (R == 0) return;

  // A row and its guide lie in the same chunk, one after the other.
  const HeadKernels& kernels = head_kernels(cpu.isa);
  const int64_t stride = chunk_stride(V), capacity = chunk_rows(V);
  int64_t needed = 0;
  for (int64_t r = 0; r < R; ++r) needed += rows[r].guide_row >= 0 ? 2 : 1;
  const int64_t logit_rows = std::min(needed, capacity);
  const int threads = std::max(1, cpu.threads);
  const int64_t workspace_floats = round_up(denoise_workspace_floats(V), 16);
  CallScratch call;
  float *logits = nullptr, *workspaces = nullptr;
  lay_out(call.scratch(), [&](Cutter& cut) {
    logits = cut.take(logit_rows * stride);
    workspaces = cut.take(threads * workspace_floats);
  });
  std::vector<const float*> inputs;
  std::vector<float*> row_logits;  // where each row of the chunk begins; its guide, if any, follows
  std::vector<int64_t> not_finite;

  for (int64_t begin = 0, end = 0; begin < R; begin = end) {
    inputs.clear();
    row_logits.clear();
    for (end = begin; end < R; ++end) {
      const bool guided = rows[end].guide_row >= 0;
      if (static_cast<int64_t>(inputs.size()) + (guided ? 2 : 1) > logit_rows) break;
      row_logits.push_back(logits + static_cast<int64_t>(inputs.size()) * stride);
      inputs.push_back(hidden.f32(rows[end].row));
      if (guided) inputs.push_back(hidden.f32(rows[end].guide_row));
    }
    head_gemm(cpu, logits, stride, inputs.data(), static_cast<int64_t>(inputs.size()), wte, 0, V,
              MatmulPrecision::kFP32);
    not_finite.assign(static_cast<size_t>(end - begin), -1);
    parallel(threads, end - begin, [&](int64_t i, int worker) {
      const int64_t r = begin + i;
      float* const x = row_logits[static_cast<size_t>(i)];
      not_finite[static_cast<size_t>(i)] =
          denoise_row(stats + r, watched + r * watch_count, x, rows[r].guide_row >= 0 ? x + stride : nullptr,
                      V, rows[r], watch, watch_count, workspaces + worker * workspace_floats, kernels);
    });
    for (int64_t r = begin; r < end; ++r) {
      const int64_t id = not_finite[static_cast<size_t>(r - begin)];
      if (id < 0) continue;
      throw Error(Code::kDiverged, "logits of row " + std::to_string(r) + " are not finite: id " +
                                       std::to_string(id) + " has " +
                                       std::to_string(row_logits[static_cast<size_t>(r - begin)][id]) +
                                       " (hidden row " + std::to_string(rows[r].row) + ", position " +
                                       std::to_string(rows[r].position) + ")");
    }
  }
}

void head_cross_entropy(const Cpu& cpu, float* losses, Tensor dhidden, Tensor dwte, Tensor hidden,
                        const int64_t* rows, const int32_t* targets, const float* weights, int64_t R,
                        const Weight& wte, MatmulPrecision precision, Store store) {
  const int64_t V = wte.N, C = wte.K;
  const bool with_gradients = static_cast<bool>(dhidden);
  check_hidden("head_cross_entropy", hidden, wte);
  for (int64_t r = 0; r < R; ++r) {
    check_row("head_cross_entropy", r, rows[r], hidden);
    check_id("head_cross_entropy", "target", r, targets[r], V);
  }
  if (with_gradients) {
    if (dhidden.rows != hidden.rows || dhidden.cols != C || dwte.rows != V || dwte.cols != C || !dwte) {
      throw Error(Code::kArgument, "head_cross_entropy: dhidden is " + dhidden.shape() + " and dwte " +
                                       dwte.shape() + ", expected " + hidden.shape() + " and (" +
                                       std::to_string(V) + ", " + std::to_string(C) + ")");
    }
    if (wte.packed)
      throw Error(Code::kArgument, "head_cross_entropy: gradients need a plain wte, this one is packed");
    for (int64_t n = 0; n < dhidden.rows; ++n)
      std::memset(dhidden.f32(n), 0, static_cast<size_t>(C) * sizeof(float));
    if (R == 0 && store == Store::kSet)
      zero(cpu, dwte.data, static_cast<size_t>(V * dwte.stride) * sizeof(float));
  }
  if (R == 0) return;

  const HeadKernels& kernels = head_kernels(cpu.isa);
  const int64_t stride = chunk_stride(V), chunks = (R + chunk_rows(V) - 1) / chunk_rows(V);
  const int64_t chunk = (R + chunks - 1) / chunks;  // of equal size
  const int64_t tiles = round_up(head_tiles(V), 16);
  const int threads = std::max(1, cpu.threads);
  CallScratch call;
  float *logits = nullptr, *tile_sums = nullptr, *scaled_hidden = nullptr, *drows = nullptr,
        *factors = nullptr;
  lay_out(call.scratch(), [&](Cutter& cut) {
    logits = cut.take(chunk * stride);
    tile_sums = cut.take(threads * 3 * tiles);
    scaled_hidden = cut.take(chunk * C);
    drows = cut.take(chunk * C);
    factors = cut.take(chunk);
  });
  std::vector<const float*> inputs(static_cast<size_t>(chunk));

  for (int64_t begin = 0; begin < R; begin += chunk) {
    const int64_t count = std::min(chunk, R - begin);
    for (int64_t i = 0; i < count; ++i) inputs[static_cast<size_t>(i)] = hidden.f32(rows[begin + i]);
    head_gemm(cpu, logits, stride, inputs.data(), count, wte, 0, V, precision);

    // With Z = sum of e^(l - max): d loss / d l = weight * (e^(l - max) / Z - onehot) = (weight / Z) * (e^(l
    // - max) - Z * onehot). The logits become the bracket in place, and the factor goes to the (rows, C) side
    // of both products: no pass over (rows, V) only to scale.
    parallel(threads, count, [&](int64_t i, int worker) {
      float* const x = logits + i * stride;
      double* const tile_mass = reinterpret_cast<double*>(tile_sums + worker * 3 * tiles);
      float* const tile_max = tile_sums + worker * 3 * tiles + 2 * tiles;
      const int32_t target = targets[begin + i];
      double total, target_exponent;
      if (kernels.scan(tile_max, x, nullptr, 0, V)) {
        const float max = *std::max_element(tile_max, tile_max + head_tiles(V));
        target_exponent = static_cast<double>(x[target]) - static_cast<double>(max);
        kernels.exponentiate(x, tile_mass, nullptr, x, max, 1.0f, V);
        total = sum_of(tile_mass, head_tiles(V));
      } else {
        // A model that diverged: NaN in the loss and the gradients is what the training loop watches for.
        total = target_exponent = std::numeric_limits<double>::quiet_NaN();
      }
      losses[begin + i] = static_cast<float>(std::log(total) - target_exponent);
      if (!with_gradients) return;
      x[target] = static_cast<float>(static_cast<double>(x[target]) - total);
      const float factor = static_cast<float>(static_cast<double>(weights[begin + i]) / total);
      factors[i] = factor;
      const float* const h = inputs[static_cast<size_t>(i)];
      for (int64_t c = 0; c < C; ++c) scaled_hidden[i * C + c] = factor * h[c];
    });
    if (!with_gradients) continue;

    gemm_nn(cpu, drows, C, logits, stride, static_cast<const float*>(wte.data), C, count, C, V, false,
            precision);
    gemm_tn(cpu, dwte.f32(), dwte.stride, logits, stride, scaled_hidden, C, V, C, count,
            begin > 0 || store == Store::kAdd, precision);
    // In list order on one thread: a hidden row may be listed twice, and its gradients add up.
    for (int64_t i = 0; i < count; ++i) {
      float* const out = dhidden.f32(rows[begin + i]);
      for (int64_t c = 0; c < C; ++c) out[c] += factors[i] * drows[i * C + c];
    }
  }
}

}  // namespace dn::cpu
