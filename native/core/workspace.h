// What the model's source files share: where a parameter stands in the table, the memory of a step and the
// plan of a batch. Private to
// native/core/{batch_plan,model,model_first_block,model_loop,model_training,parameter_file,parameter_table,
// params}.cpp.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "core/backend.h"
#include "core/denoise_loop.h"
#include "core/error.h"
#include "core/model.h"

namespace dn {

// Refuses an argument.
[[noreturn]] inline void bad(const std::string& message) { throw Error(Code::kArgument, message); }
inline std::string str(int64_t n) { return std::to_string(n); }
inline size_t idx(int64_t n) { return static_cast<size_t>(n); }

// Order of the parameter table: wte, wpe, twelve tensors a block, ln_f.
constexpr size_t kWte = 0;
constexpr size_t kWpe = 1;
enum BlockParameter : size_t {
  kLn1Weight,
  kLn1Bias,
  kAttnWeight,  // c_attn (C, 3C), columns q | k | v
  kAttnBias,
  kAttnProjWeight,
  kAttnProjBias,
  kLn2Weight,
  kLn2Bias,
  kFcWeight,
  kFcBias,
  kFcProjWeight,
  kFcProjBias,
  kBlockParameters,
};
inline size_t block_parameter(int32_t layer, BlockParameter which) {
  return 2 + static_cast<size_t>(layer) * kBlockParameters + which;
}
inline size_t ln_f_weight(const ModelConfig& config) { return block_parameter(config.layers, kLn1Weight); }
inline size_t ln_f_bias(const ModelConfig& config) { return ln_f_weight(config) + 1; }

// Matrices that products read through Backend's packed layout; wpe is only ever read row by row.
inline bool is_packable(size_t index, const Parameter& parameter) {
  return parameter.is_matrix && index != kWpe;
}

// K and N of y = x W for a packable parameter: the head reads wte (V, C) as K = C, N = V.
inline int64_t weight_k(size_t index, const Parameter& p) { return index == kWte ? p.shape[1] : p.shape[0]; }
inline int64_t weight_n(size_t index, const Parameter& p) { return index == kWte ? p.shape[0] : p.shape[1]; }

// Throws Error(kArgument) when a field is not positive, heads do not divide channels, or a size is out of
// bounds.
void check_config(const ModelConfig& config);

// Throws Error(kArgument) when there is no such parameter.
const Parameter& parameter_at(const std::vector<Parameter>& table, size_t index);

// Backend::alloc whose error says what the bytes were for.
std::unique_ptr<Buffer> alloc_for(Backend& backend, size_t bytes, const std::string& what);

// Throws Error(kOutOfMemory) when the backend cannot give `bytes` more: what they are for, how many they are,
// what is free and what to do about it. Called before the first allocation, so that nothing has changed.
void require_memory(Backend& backend, size_t bytes, const std::string& what, const std::string& advice);

// Host memory for a large temporary, given back to the system with the object where the backend's memory is
// the host's: the heap would keep such pieces for every thread that loads.
class HostTemporary {
 public:
  HostTemporary(Backend& backend, size_t bytes, const std::string& what) {
    if (backend.host_memory()) {
      buffer_ = alloc_for(backend, bytes, what);
    } else {
      heap_.resize(bytes);
    }
  }
  template <typename T>
  T* as() {
    return static_cast<T*>(buffer_ ? buffer_->data() : heap_.data());
  }

 private:
  std::unique_ptr<Buffer> buffer_;
  std::vector<char> heap_;
};

// Cuts tensors out of one piece of memory, each 64-byte aligned. Without memory it only counts, so a layout
// is written once and run twice: to learn its size, then to get its tensors.
class Carver {
 public:
  explicit Carver(void* base) : base_(static_cast<char*>(base)) {}
  Tensor take(Dtype dtype, int64_t rows, int64_t cols) {
    const Tensor t(base_ ? base_ + used_ : nullptr, dtype, rows, cols);
    used_ += (static_cast<size_t>(rows) * static_cast<size_t>(cols) * dtype_bytes(dtype) + 63) / 64 * 64;
    return t;
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

// Memory of a step, kept for the next one. Grows only; the old piece is freed before a larger one is taken,
// because both together may not fit. After a failure it is empty and a smaller step still works.
class Arena {
 public:
  void reserve(Backend& backend, size_t bytes, const char* what) {
    if (growth(bytes) == 0) return;
    const size_t wanted = with_slack(bytes);
    buffer_.reset();
    buffer_ = alloc_for(backend, wanted, what);
  }
  // Bytes that reserve(bytes) would take beyond what is held.
  size_t growth(size_t bytes) const {
    return buffer_ && buffer_->bytes() >= bytes ? 0 : with_slack(bytes) - this->bytes();
  }
  void release() { buffer_.reset(); }
  void* data() const { return buffer_ ? buffer_->data() : nullptr; }
  size_t bytes() const { return buffer_ ? buffer_->bytes() : 0; }

 private:
  // The first shape is met exactly; a second one suggests more to come, so it gets an eighth on top.
  size_t with_slack(size_t bytes) const { return buffer_ ? bytes + bytes / 8 : bytes; }

  std::unique_ptr<Buffer> buffer_;
};

// An attention call: sequences as the op wants them, the cache of each (null: keys in the packed qkv) and the
// position of every query row inside its sequence.
struct QueryPlan {
  std::vector<AttentionSequence> sequences;
  std::vector<const KvCache*> caches;
  std::vector<int32_t> positions;

  void clear();
  void use_layer(int32_t layer);  // points sequences at their caches of this layer
};

// Neighbouring packed rows that are copied together.
struct RowRun {
  int64_t row = 0;
  int64_t count = 0;
};

// Neighbouring packed rows whose keys and values go to neighbouring rows of a cache.
struct CacheRun {
  const KvCache* cache = nullptr;
  int64_t row = 0;
  int64_t position = 0;
  int64_t count = 0;
};

// A checked batch. The vectors keep their memory from step to step.
struct BatchPlan {
  int64_t N = 0;
  int64_t R = 0;        // rows kept: N, or the listed ones
  bool listed = false;  // some rows only, or in another order
  QueryPlan all;        // every row asks
  QueryPlan rows;       // the listed rows ask, in the listed order; used by the last block
  std::vector<RowRun> gathers;
  std::vector<CacheRun> cache_writes;
  DeviceLoop* loop = nullptr;  // given: the lists above are empty, it holds them

  void clear();
  // Position of packed row n in its sequence, as masks see it.
  int32_t query_position(const Batch& batch, int64_t n) const {
    return (batch.mask_positions.empty() ? batch.positions : batch.mask_positions)[static_cast<size_t>(n)];
  }
};

// dst (R, C) = the rows of src that the plan lists, in order.
void gather(Backend& backend, const BatchPlan& plan, Tensor dst, Tensor src);
// dst (N, C) = the rows of src (R, C) where the plan lists them, zero elsewhere.
void scatter(Backend& backend, const BatchPlan& plan, Tensor dst, Tensor src);

// Where a block leaves its intermediate results. Inference lets them share memory and leaves out what only a
// backward pass reads (null); training keeps all. With listed rows everything from q on has R rows instead of
// N.
struct Model::BlockActivations {
  Tensor ln1, ln1_mean, ln1_rstd;  // (N, C), (N, 1), (N, 1)
  Tensor qkv;                      // (N, 3C)
  Tensor q, inp_rows;              // (R, C) gathered, only with listed rows
  Tensor lse;                      // (N, NH)
  Tensor att;                      // (N, C)
  Tensor att_rows;  // (R, C) gathered, only with listed rows in training, which keeps all of att
  Tensor mid;       // (N, C) residual stream after attention
  Tensor ln2, ln2_mean, ln2_rstd;
  Tensor fc_pre, fc;  // (N, 4C) before and after GELU
};

struct Model::InferenceActivations {
  Tensor h, ln;  // (N, C) residual stream; last layer norm, with the rows that it is given
  BlockActivations block;
};

// What the last forward that keeps it left of the first block (model_first_block.cpp).
struct FirstBlock {
  Arena memory;                         // (N, 3C) queries, keys and values
  std::vector<int32_t> ids, positions;  // (N) of the tokens they belong to; empty: none
  std::vector<RowRun> changed;          // of the forward that is being computed
};

struct Model::Workspace {
  Arena arena;   // activations and their gradients
  Arena logits;  // a block of logits on backends that do not share the host's memory
  BatchPlan plan;
  FirstBlock first;                      // inference
  std::vector<int64_t> kept_rows;        // 0 .. R - 1
  std::vector<uint8_t> seen;             // (N) marks of check_loss_rows
  std::vector<BlockActivations> blocks;  // training: one a layer, or one for all with recompute
  BlockActivations last;                 // training: those of the last block, with listed rows
  std::vector<Tensor> inputs;            // training: (N, C) input of each block, then the last one's output
  Tensor dh, dln, datt, dqkv, dfc;       // training: gradients; dqkv and datt share dfc's memory
  Tensor dh_rows;                        // training: (R, C) that of the listed rows in the last block
};

struct Model::Training {
  std::unique_ptr<Buffer> gradients, m, v;  // laid out like the parameters
  // What lies in `gradients` is to be taken for zeros: the next backward pass sets weights instead of
  // clearing them and adding to them.
  bool are_clear = false;
};

}  // namespace dn
