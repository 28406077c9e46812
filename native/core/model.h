// GPT-2 on a Backend: forward, backward and the optimiser step, over packed ragged batches.
// Network (docs/numerics.md): h = wte[x] + wpe[pos]; per block h += attn(LN1(h)), h += mlp(LN2(h)); hidden =
// LNf(h); logits = hidden * wte^T. The class knows tokens and rows; what a row means (diffusion, the
// one-position shift, sampling) is its callers' business.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "core/backend.h"
#include "core/denoise_loop.h"

namespace dn {

struct ModelConfig {
  int32_t layers = 0;
  int32_t heads = 0;
  int32_t channels = 0;  // C, a multiple of heads
  int32_t context = 0;   // rows of wpe: the longest sequence
  int32_t vocab = 0;     // V
};

// One named tensor inside the parameter buffer. Gradients and moments use the same offsets.
struct Parameter {
  std::string name;  // GPT-2 names without prefix: "wte.weight", "h.0.attn.c_attn.weight"
  std::vector<int64_t> shape;
  int64_t offset = 0;  // fp32 words from the start of the buffer, a multiple of 16
  int64_t count = 0;   // product of shape
  bool is_matrix =
      false;  // rank 2: weight decay applies; all but wpe are operands of products and may be packed
};

std::vector<Parameter> make_parameter_table(const ModelConfig& config);

// Keys and values of one sequence for every layer, as the backend lays them out. Forwarding tokens at
// positions p overwrites rows p; attention then reads rows [0, k_len). Autoregressive decoding appends,
// block-wise decoding overwrites a block in place.
class KvCache {
 public:
  KvCache(Backend& backend, const ModelConfig& config, int32_t capacity);
  int32_t capacity() const { return capacity_; }
  void* layer(int32_t layer) const;
  size_t bytes() const { return buffer_->bytes(); }

 private:
  int32_t capacity_;
  size_t layer_bytes_;
  std::unique_ptr<Buffer> buffer_;
};

// A sequence of a batch: packed rows [begin, end). Without a cache its keys are its own tokens (k_len = end -
// begin, at positions 0..k_len-1 in order); with one they are rows [0, k_len) of the cache after this batch's
// rows are written.
struct Sequence {
  int64_t begin = 0;
  int64_t end = 0;
  int32_t k_len = 0;
  KvCache* cache = nullptr;
  AttentionMask mask;
};

struct Batch {
  std::vector<int32_t> ids;        // (N)
  std::vector<int32_t> positions;  // (N) index into wpe
  // (N) the q of visible(q, k); empty: equal to `positions`. They differ for the doubled sequences of block
  // diffusion, where wpe positions restart at the clean copy and mask positions go on.
  std::vector<int32_t> mask_positions;
  std::vector<Sequence> sequences;
};

// What a training step asks of the head: row `rows[i]` of the packed batch predicts `targets[i]` with weight
// weights[i]. Rows are distinct.
struct LossRows {
  std::vector<int64_t> rows;
  std::vector<int32_t> targets;
  std::vector<float> weights;
};

struct TrainingOptions {
  bool recompute = false;  // keep only each block's input and redo its forward in the backward pass
  MatmulPrecision precision = MatmulPrecision::kFP32;
};

class Carver;

class Model {
 public:
  // weights: kF32, or for inference only the operands of products (all matrices but wpe) are held narrower,
  // where memory is the host's: kBF16, rounded to the nearest, or kI8, with a scale per output column.
  Model(std::unique_ptr<Backend> backend, const ModelConfig& config, Dtype weights = Dtype::kF32);
  ~Model();

  const ModelConfig& config() const { return config_; }
  Backend& backend() { return *backend_; }
  const std::vector<Parameter>& parameters() const { return parameters_; }
  // Index into parameters(); throws Error(kArgument) naming the parameter when there is none.
  size_t find_parameter(const std::string& name) const;

  // GPT-2 initialisation: N(0, 0.02); attn.c_proj and mlp.c_proj weights N(0, 0.02 / sqrt(2 layers)); biases
  // 0, layer norm weights 1. Box-Muller on Stream::kInit, so a seed means the same weights everywhere.
  void initialise(uint64_t seed);
  void get_parameter(size_t index, float* out);  // plain layout, whatever the storage
  // A value that is not finite cannot become int8, one that is not finite in bf16 not bf16: Error(kArgument).
  void set_parameter(size_t index, const float* values);
  // The same from read(begin, count, out), asked for consecutive elements in ascending order. An int8 model
  // reads its largest matrix, wte, piece by piece.
  using ReadValues = std::function<void(int64_t begin, int64_t count, float* out)>;
  void set_parameter(size_t index, const ReadValues& read);
  // A matrix as it is, or would be, held as int8: values in the parameter's shape, a scale per output column
  // (int8_columns). Error(kArgument) for a parameter that is not the operand of a product.
  int64_t int8_columns(size_t index) const;
  void get_int8(size_t index, int8_t* values, float* scales);
  void set_int8(size_t index, const int8_t* values, const float* scales);
  // After the last set_parameter of a load: packs weights for inference. Forward does it by itself when it
  // was not called.
  void prepare_inference();

  // Runs the network and keeps the final hidden states (after LNf) of the listed packed rows, in the listed
  // order (empty: all rows). The last block computes attention, its projection and the MLP only for them.
  // Validates ids, positions, cache capacity and row numbers: Error(kArgument).
  void forward(const Batch& batch, const std::vector<int64_t>& rows);
  Tensor hidden() const { return hidden_; }  // (R, C), valid until the next forward, loss or training call
  void read_hidden(float* out);              // all of it, host (R, C) fp32 whatever the activations are
  // Of the rows kept by the last forward; DenoiseRow::row and `rows` count within them.
  void logits(float* out, const int64_t* rows, int64_t R);  // host (R, V)
  void denoise(DenoiseStats* stats, float* watched, const DenoiseRow* rows, int64_t R, const int32_t* watch,
               int64_t watch_count);
  // Left-to-right decoding with a cache: the step that `batch` (one sequence) and `row` (of the one row that
  // is kept) ask for, and those that follow it, each fed the id that the one before drew. Ends after `most`
  // of them, after an id of `stops`, or when it has taken long; appends to stats and watched what single
  // steps give.
  struct DecodeLimits {
    int64_t most = 1;
    std::vector<int32_t> stops;
  };
  void decode(Batch batch, std::vector<int64_t> rows, DenoiseRow row, const std::vector<int32_t>& watch,
              const DecodeLimits& limits, std::vector<DenoiseStats>* stats, std::vector<float>* watched);
  // Several denoising steps of whole canvases, decided on the device (denoise_loop.h); the log says what
  // every step looked at and did. Error(kArgument) on a backend without such a loop. Keeps no hidden states.
  bool has_device_loop() const { return backend_->device_loop() != nullptr; }
  void denoise_steps(const LoopRequest& request, LoopLog* log);
  void use_graphs(bool on);

  // Training. begin_training unpacks weights and allocates gradients and moments, which are zero then, also
  // when the model was training already; end_training frees them.
  void begin_training();
  void end_training();
  bool training() const { return training_ != nullptr; }
  // Unweighted losses (R) of LossRows, without gradients.
  void loss(const Batch& batch, const LossRows& rows, const TrainingOptions& options, float* losses);
  // The same, and gradients of sum_i weights[i] * losses[i] are added to the gradient buffer.
  void loss_and_gradients(const Batch& batch, const LossRows& rows, const TrainingOptions& options,
                          float* losses);
  void zero_gradients();
  double gradient_sum_of_squares();
  // decay applies to matrices only (nanoGPT's rule: rank >= 2). Numbers out of range, or not finite in fp32:
  // Error(kArgument).
  void adamw(const AdamWStep& step, float weight_decay);
  void get_gradient(size_t index, float* out);
  enum class Moment { kFirst, kSecond };
  void get_moment(size_t index, Moment which, float* out);
  void set_moment(size_t index, Moment which, const float* values);

  // Bytes of parameters, of training state and of the workspace now held.
  struct Memory {
    size_t parameters = 0, training = 0, workspace = 0;
  };
  Memory memory() const;

 private:
  struct Training;
  struct Workspace;
  struct BlockActivations;
  struct InferenceActivations;

  // Views of a parameter, or of the same place in a gradient buffer. Vectors are (1, n), wpe is (context, C).
  Tensor tensor(size_t index) const;
  Tensor gradient(size_t index) const;
  Store begin_gradients();  // of a backward pass: what it does with those of weights
  void settle_gradients();
  Weight weight(size_t index) const;
  Weight plain_weight(size_t index, const void* data) const;
  // fp32 words reserved for parameter `index`: its count, or what its packed form needs.
  int64_t room(size_t index) const;
  bool is_int8(size_t index) const;
  Dtype packed_type(size_t index) const;  // of a packed parameter: kF32 or weights_
  // Throws Error(kArgument) where one of the values, from element `begin` on, cannot be held as bf16 and has
  // to be.
  void require_held(size_t index, int64_t begin, int64_t count, const float* values) const;
  Int8Matrix int8_matrix(size_t index, int8_t* values, float* scales) const;
  // Columns [n_begin, n_begin + N) of an int8 weight from as much of its plain fp32 form.
  void set_int8_columns(size_t index, int64_t n_begin, int64_t N, const float* values);
  int64_t largest_room() const;  // of the parameters that are packed
  void unpack();
  // Of a step with R rows of the head; what run_forward and loss_and_gradients ask require_memory for.
  StepShape step_shape(int64_t R, bool training) const;

  // Checks a batch against the model and plans its attention calls; `rows` as in forward.
  void plan_batch(const Batch& batch, const std::vector<int64_t>& rows);
  // Cuts the activations of a forward pass out of memory; returns their bytes.
  size_t lay_out_inference(Carver carver, int64_t N, int64_t rows_held, InferenceActivations* to) const;
  // first_qkv: of the first block, or null: computed.
  Tensor run_blocks(InferenceActivations t, int64_t R, MatmulPrecision precision, Tensor first_qkv);
  void run_forward(const Batch& batch, const std::vector<int64_t>& rows, MatmulPrecision precision);
  // Whether a forward over N tokens keeps the first block's queries, keys and values for the next one; and
  // they themselves, computed where they are not known. Null: there is no memory to keep them in.
  bool keeps_first_block(int64_t N, MatmulPrecision precision) const;
  Tensor first_block_qkv(const Batch& batch, const InferenceActivations& t);
  void forget_first_block();  // when a weight changes
  // Layer norm and the product that give a.qkv; then the rest of the block.
  void block_qkv(int32_t layer, Tensor inp, const BlockActivations& a, MatmulPrecision precision);
  void block_forward(int32_t layer, Tensor out, Tensor inp, const BlockActivations& a, bool listed,
                     MatmulPrecision precision);
  void block_backward(int32_t layer, Tensor inp, const BlockActivations& a, bool listed,
                      MatmulPrecision precision, Store store);
  const int64_t* first_rows(int64_t R);
  void check_loop(const LoopRequest& request) const;
  void check_loss_rows(const Batch& batch, const LossRows& rows);
  const Training& require_training(const char* caller) const;

  ModelConfig config_;
  Dtype weights_;
  std::unique_ptr<Backend> backend_;
  std::vector<Parameter> parameters_;
  std::unique_ptr<Buffer> storage_;
  std::unique_ptr<Training> training_;
  std::unique_ptr<Workspace> workspace_;
  Tensor hidden_;
  bool packed_ = false;
};

}  // namespace dn
