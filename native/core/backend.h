// What a device must be able to do. The model (model.h) is written once against this interface; native/cpu
// and cuda implement it. Ops come in forward/backward pairs. Argument order: outputs, inputs, saved tensors,
// scalars.
//
// Letters: N packed tokens (sequences laid end to end, no padding), R selected rows, C channels, NH heads,
// HS = C / NH head size, V vocabulary, S sequences.
// Gradients of parameters accumulate (+=), those of weights unless Store::kSet is asked for; gradients of
// activations are overwritten unless an op says otherwise. Every output row depends only on its own inputs,
// with a fixed order of additions: results are the same bits for any thread count and whatever else is in the
// batch. Index lists (ids, positions, rows) are host memory; tensors are memory of the backend.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "core/attention_mask.h"
#include "core/error.h"
#include "core/quantise.h"
#include "core/tensor.h"

namespace dn {

// Memory of a backend, freed with the object. 64-byte aligned on the CPU, and zero-filled.
class Buffer {
 public:
  virtual ~Buffer() = default;
  virtual void* data() const = 0;
  virtual size_t bytes() const = 0;
};

// One sequence of an attention call. Its queries are the packed rows [q_begin, q_end) of the query tensor, at
// positions query_positions[q_begin..q_end) inside the sequence; its keys are k_len rows at positions 0 ..
// k_len - 1, found in the packed qkv (cache null: rows kv_begin + 0 .. k_len - 1) or in a layer's cache,
// where kv_cache_write left them.
struct AttentionSequence {
  int64_t q_begin = 0;
  int64_t q_end = 0;
  int64_t kv_begin = 0;
  int64_t k_len = 0;
  const void* cache = nullptr;
  AttentionMask mask;
};

enum class Epilogue : uint8_t {
  kNone,      // out = x W + bias
  kGelu,      // pre = x W + bias; out = gelu(pre), tanh form; `extra` (same shape), when given, receives pre
  kResidual,  // out = x W + bias + extra
};

// How exact a product must be. kBF16 allows inputs rounded to bf16 with fp32 accumulation where the machine
// is faster at it; without such hardware it is the same as kFP32. A weight of bf16 allows it by itself.
enum class MatmulPrecision : uint8_t { kFP32, kBF16 };

// What the gradient of a weight does to what is there.
enum class Store : uint8_t { kAdd, kSet };

// How one row of the head is to be sampled. All lists are per selected row.
struct DenoiseRow {
  int64_t row = 0;         // row of `hidden`
  int64_t guide_row = -1;  // row of the unconditional twin for classifier-free guidance, -1: none
  float guidance = 0;      // w: logits become u + (w + 1)(l - u)
  float temperature = 1;   // 0: the drawn token is the best one
  float top_p =
      1;  // nucleus: keep items whose preceding cumulative mass is <= top_p, 1: all (docs/numerics.md)
  int32_t top_k = 0;  // keep the k best (ties kept), 0: all
  // Ids whose probability is exactly zero, -1: none: the mask id, and an end token that must not come.
  int32_t banned = -1;
  int32_t banned_end = -1;
  uint64_t seed = 0;  // the draw is a function of (seed, step, position) and the distribution alone
  uint32_t step = 0;
  uint32_t position = 0;
  // (V) in host memory: where the row's log probabilities are left for the next step, and where those of the
  // step before were; null: nowhere, and there are none. A call that fails may have written `keep`.
  float* keep = nullptr;
  const float* before = nullptr;  // only with `keep`

  // Whether the row's V logits must be held: they are mixed with a guide's, or a filter drops some of them.
  // Otherwise statistics and draw follow from sums over them.
  bool needs_logits(int64_t V) const {
    return guide_row >= 0 || (temperature > 0 && (top_p < 1 || (top_k > 0 && top_k < V)));
  }
};

// What is wrong with a row's options (guidance, temperature, filters, banned ids) over V ids; empty: nothing.
std::string denoise_fault(const DenoiseRow& row, int64_t V);
// Throws Error(kArgument), beginning with `op`, unless rows and guides are among `hidden_rows`, their options
// make sense, and the watched ids are among V.
void check_denoise(const char* op, const DenoiseRow* rows, int64_t R, int64_t hidden_rows,
                   const int32_t* watch, int64_t watch_count, int64_t V);

// Statistics of one row. Probability, margin and entropy are of the distribution at temperature 1 without
// filters (after guidance and without the banned ids); the draw is from the tempered and filtered one.
struct DenoiseStats {
  int32_t best = 0;          // arg max, the smallest id among equals
  int32_t drawn = 0;         // sampled id
  float probability = 0;     // of `best`
  float margin = 0;          // probability of `best` minus that of the runner-up
  float entropy = 0;         // nats
  float drawn_log_prob = 0;  // log probability of `drawn` at temperature 1 without filters
  // KL(this distribution || the one in DenoiseRow::before), nats; infinity without one, 0 without `keep`.
  // Backends whose memory is not the host's leave it to Model::denoise.
  float divergence = 0;
};

// AdamW over one span of parameters that share a decay. Decoupled decay: p -= lr * decay * p.
struct AdamWStep {
  float learning_rate = 0;
  float beta1 = 0.9f;
  float beta2 = 0.999f;
  float eps = 1e-8f;
  float weight_decay = 0;
  float gradient_scale = 1;  // multiplies every gradient first: clipping and accumulation in one factor
  int64_t step = 1;          // 1-based, for bias correction
};

// A packed weight may be written in pieces of a multiple of this many rows, an int8 one of as many columns.
constexpr int64_t kPackRows = 32;
constexpr int64_t kInt8Columns = kPackRows;

// What a step needs memory for. R: rows of the head; logit_rows: those of them, when sampling, whose logits
// must be held (DenoiseRow::needs_logits), guides included.
struct StepShape {
  int64_t N = 0, S = 0, R = 0, logit_rows = 0;
  int64_t C = 0, NH = 0, V = 0;
  bool training = false;
  int64_t loop_steps = 0;  // of a denoising loop that stays on the device (denoise_loop.h), 0: none
};

class DeviceLoop;

class Backend {
 public:
  virtual ~Backend() = default;

  // "cpu/avx512", "cuda:0/sm_90".
  virtual std::string name() const = 0;
  // How activations are stored: fp32 on the CPU.
  virtual Dtype activation_dtype() const = 0;
  // True when the backend's memory is ordinary host memory, so that a caller's own array can be a tensor.
  virtual bool host_memory() const { return false; }
  virtual std::unique_ptr<Buffer> alloc(size_t bytes) = 0;  // throws Error(kOutOfMemory)
  // Estimates, to refuse a step before anything is allocated for it. free_bytes: what alloc() could still
  // give; unbounded where the system alone knows. step_bytes: what a step takes beside the model's buffers,
  // and beyond what earlier steps have left with the backend. parameter_bytes: what it adds to so many bytes
  // of parameters.
  virtual size_t free_bytes() { return SIZE_MAX; }
  virtual size_t step_bytes(const StepShape&) const { return 0; }
  virtual size_t parameter_bytes(size_t) const { return 0; }
  virtual void upload(void* dst, const void* host, size_t bytes) = 0;
  virtual void download(void* host, const void* src, size_t bytes) = 0;
  virtual void zero(void* dst, size_t bytes) = 0;
  virtual void copy(Tensor dst, Tensor src) = 0;  // same shape, any strides
  virtual void synchronize() = 0;

  // Elements that a (K, N) weight needs once packed as `to`: kF32, or kBF16 on backends whose memory is the
  // host's; at least K * N.
  virtual int64_t packed_elements(int64_t K, int64_t N, Dtype to) const = 0;
  // Writes `plain`, which is fp32, in the backend's packed layout to `packed`, each number rounded to the
  // nearest of type `to`, and back.
  virtual void pack_weight(void* packed, const Weight& plain, Dtype to) = 0;
  // A piece of it, on backends whose memory is the host's: rows [begin, begin + count) of the plain matrix as
  // it is stored (K or, with kOutIn, N of them), in `rows`. `whole` has no data. begin is a multiple of
  // kPackRows, and count too unless the rows are the last ones.
  virtual void pack_rows(void* /*packed*/, const Weight& /*whole*/, const float* /*rows*/, int64_t /*begin*/,
                         int64_t /*count*/, Dtype /*to*/) {
    throw Error(Code::kInternal, "the backend " + name() + " packs whole weights only");
  }
  virtual void unpack_weight(void* plain, const Weight& packed) = 0;

  // Narrow weights, for inference: the ops below that take a packed weight also take one whose dtype is
  // kBF16, on backends whose memory is the host's, or kI8. Plain int8 matrices lie in host memory. A backend
  // without int8 products throws Error(kArgument). (K, N): bytes of a packed weight with its scales, a
  // multiple of 64.
  virtual size_t int8_bytes(int64_t, int64_t) const { throw no_int8(); }
  // (packed, plain, n_begin): columns [n_begin, n_begin + plain.N) of `packed` = plain; n_begin is a multiple
  // of kInt8Columns.
  virtual void pack_int8(void*, const Int8Matrix&, int64_t) { throw no_int8(); }
  // (plain, packed): plain = all of `packed`, whose K, N and order are plain's.
  virtual void unpack_int8(const Int8Matrix&, const void*) { throw no_int8(); }

  // out (N, C) = wte[id] + wpe[position]. wte is the head's weight: K = C, N = V, order kOutIn, plain or
  // packed.
  virtual void embedding_forward(Tensor out, const int32_t* ids, const int32_t* positions, const Weight& wte,
                                 Tensor wpe) = 0;
  // dwte (V, C), dwpe (P, C) += rows of dout, in token order.
  virtual void embedding_backward(Tensor dwte, Tensor dwpe, Tensor dout, const int32_t* ids,
                                  const int32_t* positions) = 0;

  // out = LN(inp) * weight + bias, eps 1e-5. mean, rstd: (N, 1), may be null for inference.
  virtual void layernorm_forward(Tensor out, Tensor mean, Tensor rstd, Tensor inp, Tensor weight,
                                 Tensor bias) = 0;
  // dinp += (it is the residual stream's gradient); dweight, dbias += (1, C).
  virtual void layernorm_backward(Tensor dinp, Tensor dweight, Tensor dbias, Tensor dout, Tensor inp,
                                  Tensor weight, Tensor mean, Tensor rstd) = 0;

  // out (M, N) = epilogue(inp (M, K) * w + bias); bias (1, N) may be null.
  virtual void matmul_forward(Tensor out, Tensor inp, const Weight& w, Tensor bias, Epilogue epilogue,
                              Tensor extra, MatmulPrecision precision) = 0;
  // dinp (M, K) = dout * W^T, when dinp is given; dweight (in w's order) += or, with `store`, = inp^T dout;
  // dbias (1, N) += column sums. w must be plain.
  virtual void matmul_backward(Tensor dinp, Tensor dweight, Tensor dbias, Tensor dout, Tensor inp,
                               const Weight& w, MatmulPrecision precision, Store store) = 0;
  // dinp = dout * gelu'(inp); dinp may be dout.
  virtual void gelu_backward(Tensor dinp, Tensor dout, Tensor inp) = 0;

  // A layer's cache of keys and values, in an order that is the backend's own: its bytes for so many
  // positions of C channels, and rows [position, position + kv.rows) of it = kv, (n, 2C) = [k | v].
  virtual size_t kv_cache_bytes(int64_t capacity, int64_t C) const = 0;
  virtual void kv_cache_write(void* cache, int64_t position, Tensor kv, int64_t NH) = 0;

  // out (Nq, C): for every query and head, softmax over its visible keys of q . k / sqrt(HS), times v. A
  // query that sees no key writes zeros. lse (Nq, NH), may be null: log-sum-exp of the scaled scores (0 where
  // nothing is visible). q (Nq, C); kv (Nkv, 2C) = [k | v], a column slice of the packed qkv; unused for
  // sequences with a cache.
  virtual void attention_forward(Tensor out, Tensor lse, Tensor q, Tensor kv,
                                 const AttentionSequence* sequences, int64_t S,
                                 const int32_t* query_positions, int64_t NH) = 0;
  // dqkv (N, 3C) overwritten, from dout, qkv, out (N, C) and lse. No caches: queries and keys are the same
  // tokens.
  virtual void attention_backward(Tensor dqkv, Tensor dout, Tensor qkv, Tensor out, Tensor lse,
                                  const AttentionSequence* sequences, int64_t S,
                                  const int32_t* query_positions, int64_t NH) = 0;

  // logits (R, V) = hidden[rows] * wte^T, only where a caller asks for them.
  virtual void head_logits(Tensor logits, Tensor hidden, const int64_t* rows, int64_t R,
                           const Weight& wte) = 0;
  // Statistics of R rows without ever holding (R, V) logits in full. watch: ids whose probability
  // (temperature 1, no filters) is written to watched (R, watch_count), host memory.
  virtual void head_denoise(DenoiseStats* stats, float* watched, Tensor hidden, const DenoiseRow* rows,
                            int64_t R, const int32_t* watch, int64_t watch_count, const Weight& wte) = 0;
  // Fused projection and cross-entropy of R rows: losses[r] = -log softmax(hidden[rows[r]] *
  // wte^T)[targets[r]] (host, unweighted). When dhidden is given: dhidden[rows[r]] = weights[r] * d losses[r]
  // (the other rows are zeroed), and dwte (V, C) += or, with `store`, = . (R, V) logits are never held in
  // full. wte must be plain for gradients.
  virtual void head_cross_entropy(float* losses, Tensor dhidden, Tensor dwte, Tensor hidden,
                                  const int64_t* rows, const int32_t* targets, const float* weights,
                                  int64_t R, const Weight& wte, MatmulPrecision precision, Store store) = 0;

  // One AdamW step over n consecutive parameters, gradients and moments.
  virtual void adamw(void* params, const void* gradients, void* m, void* v, int64_t n,
                     const AdamWStep& step) = 0;
  // Sum of squares of n gradients in double, with an order of additions that does not depend on threads. NaN
  // and infinities propagate.
  virtual double sum_of_squares(const void* gradients, int64_t n) = 0;

  // The denoising loop that stays on the device (denoise_loop.h); null: there is none, and steps come one by
  // one.
  virtual DeviceLoop* device_loop() { return nullptr; }

 private:
  Error no_int8() const {
    return Error(Code::kArgument,
                 "the backend " + name() + " has no int8 products; int8 weights are for the CPU");
  }
};

// threads 0: every core this process may use. The pool is process-wide: concurrent callers take turns.
std::unique_ptr<Backend> make_cpu_backend(int threads);
// activations: kBF16, or kF32 to check against the CPU. Throws Error(kDevice) with the reason when there is
// no CUDA in this build or no usable device.
std::unique_ptr<Backend> make_cuda_backend(int device, Dtype activations = Dtype::kBF16);

struct CudaDevice {
  std::string name;
  size_t memory = 0;       // bytes
  std::string capability;  // "9.0"
};
// Devices by number; none, and why, when there is no CUDA in this build or no usable driver. Never throws.
std::vector<CudaDevice> cuda_devices(std::string* reason);
// What computes matrix products on every device: "cuBLASLt 130100", or "own kernels: " and why; empty when
// there is no CUDA in this build. Never throws.
std::string cuda_products();

}  // namespace dn
