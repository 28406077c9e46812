// Inference: the network's forward pass, caches and the head on the rows it kept. The block is written once
// (block_qkv, block_forward); training calls it with other memory (model_training.cpp).

#include "core/model.h"

#include <algorithm>
#include <cstring>

#include "core/divergence.h"
#include "core/error.h"
#include "core/half.h"
#include "core/workspace.h"

namespace dn {

KvCache::KvCache(Backend& backend, const ModelConfig& config, int32_t capacity)
    : capacity_(capacity), layer_bytes_(0) {
  check_config(config);
  if (capacity < 1 || capacity > config.context) {
    bad("key-value cache: capacity is " + str(capacity) + ", expected 1 to the context, " +
        str(config.context));
  }
  layer_bytes_ = backend.kv_cache_bytes(capacity, config.channels);
  buffer_ = alloc_for(backend, idx(config.layers) * layer_bytes_,
                      "a key-value cache of " + str(capacity) + " positions");
}

void* KvCache::layer(int32_t layer) const {
  return static_cast<char*>(buffer_->data()) + idx(layer) * layer_bytes_;
}

void Model::block_qkv(int32_t layer, Tensor inp, const BlockActivations& a, MatmulPrecision precision) {
  backend_->layernorm_forward(a.ln1, a.ln1_mean, a.ln1_rstd, inp, tensor(block_parameter(layer, kLn1Weight)),
                              tensor(block_parameter(layer, kLn1Bias)));
  Weight w = weight(block_parameter(layer, kAttnWeight));
  // The heads of one sequence are what threads share; of one row they share nothing.
  if (workspace_->plan.all.sequences.size() == 1 && inp.rows > 1) w.column_parts = 3;
  backend_->matmul_forward(a.qkv, a.ln1, w, tensor(block_parameter(layer, kAttnBias)), Epilogue::kNone,
                           Tensor(), precision);
}

// One transformer block: mid = inp + attention(LN1(inp)), out = mid + mlp(LN2(mid)), from what block_qkv made
// of LN1(inp). Without `out` the last projection is left out: a backward pass that recomputes needs only what
// lies before it. With `listed` everything after the keys and values is computed for the plan's rows;
// attention, too, unless att_rows is given: a backward pass wants it of all.
void Model::block_forward(int32_t layer, Tensor out, Tensor inp, const BlockActivations& a, bool listed,
                          MatmulPrecision precision) {
  const int64_t C = config_.channels;
  Backend& backend = *backend_;
  BatchPlan& plan = workspace_->plan;
  const auto parameter = [&](BlockParameter which) { return block_parameter(layer, which); };

  for (const CacheRun& run : plan.cache_writes) {
    backend.kv_cache_write(run.cache->layer(layer), run.position,
                           a.qkv.columns(C, 2 * C).slice(run.row, run.count), config_.heads);
  }

  Tensor q = a.qkv.columns(0, C);
  Tensor residual = inp, att = a.att;
  const bool listed_queries = listed && !a.att_rows;
  if (listed) {
    gather(backend, plan, a.inp_rows, inp);
    residual = a.inp_rows;
  }
  if (listed_queries) {
    gather(backend, plan, a.q, q);
    q = a.q;
  }
  if (plan.loop) {
    plan.loop->attention(a.att, q, a.qkv.columns(C, 2 * C), listed_queries, config_.heads);
  } else {
    QueryPlan& queries = listed_queries ? plan.rows : plan.all;
    queries.use_layer(layer);
    backend.attention_forward(a.att, a.lse, q, a.qkv.columns(C, 2 * C), queries.sequences.data(),
                              static_cast<int64_t>(queries.sequences.size()), queries.positions.data(),
                              config_.heads);
  }
  if (listed && a.att_rows) {
    gather(backend, plan, a.att_rows, a.att);
    att = a.att_rows;
  }
  backend.matmul_forward(a.mid, att, weight(parameter(kAttnProjWeight)), tensor(parameter(kAttnProjBias)),
                         Epilogue::kResidual, residual, precision);

  backend.layernorm_forward(a.ln2, a.ln2_mean, a.ln2_rstd, a.mid, tensor(parameter(kLn2Weight)),
                            tensor(parameter(kLn2Bias)));
  backend.matmul_forward(a.fc, a.ln2, weight(parameter(kFcWeight)), tensor(parameter(kFcBias)),
                         Epilogue::kGelu, a.fc_pre, precision);
  if (!out) return;
  backend.matmul_forward(out, a.fc, weight(parameter(kFcProjWeight)), tensor(parameter(kFcProjBias)),
                         Epilogue::kResidual, a.mid, precision);
}

// 11 C elements a token of the host's memory, 7 C of a device's, whatever the depth. There fc lies where qkv
// and att were; here it has a place of its own: where cores lie on two dies, what one wrote and the other
// read, as keys are, costs the first one when it writes there again. q and the gathered input of the last
// block live where mid and ln2 will be. rows_held: N or R, whichever is more: a list may repeat rows.
size_t Model::lay_out_inference(Carver carver, int64_t N, int64_t rows_held, InferenceActivations* to) const {
  const Dtype dtype = backend_->activation_dtype();
  const int64_t C = config_.channels;
  BlockActivations& a = to->block;
  to->h = carver.take(dtype, rows_held, C);
  a.mid = carver.take(dtype, rows_held, C);
  to->ln = carver.take(dtype, rows_held, C);
  Carver narrow = carver;
  a.qkv = narrow.take(dtype, N, 3 * C);
  a.att = narrow.take(dtype, rows_held, C);
  Carver wide = backend_->host_memory() ? narrow : carver;
  a.fc = wide.take(dtype, rows_held, 4 * C);
  to->h = to->h.slice(0, N);
  a.mid = a.mid.slice(0, N);
  a.att = a.att.slice(0, N);
  a.fc = a.fc.slice(0, N);
  a.ln1 = a.ln2 = to->ln.slice(0, N);
  return std::max(narrow.used(), wide.used());
}

// The blocks and the last layer norm, from the embedded tokens in `t.h`; returns the hidden states of the R
// rows.
Tensor Model::run_blocks(InferenceActivations t, int64_t R, MatmulPrecision precision, Tensor first_qkv) {
  const BatchPlan& plan = workspace_->plan;
  BlockActivations& a = t.block;
  Tensor h = t.h;
  for (int32_t layer = 0; layer < config_.layers; ++layer) {
    const bool listed = plan.listed && layer == config_.layers - 1;
    Tensor out = h;
    if (listed) {
      for (Tensor* each : {&a.att, &a.mid, &a.fc, &out}) each->rows = R;
      a.q = a.mid;
      a.inp_rows = a.ln2 = Tensor(t.ln.data, t.ln.dtype, R, config_.channels);
    }
    if (layer == 0 && first_qkv) {
      BlockActivations first = a;
      first.qkv = first_qkv;
      block_forward(layer, out, h, first, listed, precision);
    } else {
      block_qkv(layer, h, a, precision);
      block_forward(layer, out, h, a, listed, precision);
    }
    h = out;
  }
  t.ln.rows = R;
  backend_->layernorm_forward(t.ln, Tensor(), Tensor(), h, tensor(ln_f_weight(config_)),
                              tensor(ln_f_bias(config_)));
  return t.ln;
}

void Model::run_forward(const Batch& batch, const std::vector<int64_t>& rows, MatmulPrecision precision) {
  hidden_ = Tensor();
  plan_batch(batch, rows);
  prepare_inference();
  const BatchPlan& plan = workspace_->plan;
  const int64_t N = plan.N, R = plan.R, rows_held = std::max(N, R);

  InferenceActivations t;
  const size_t bytes = lay_out_inference(Carver(nullptr), N, rows_held, &t);
  require_memory(
      *backend_, workspace_->arena.growth(bytes) + backend_->step_bytes(step_shape(0, false)),
      "a forward pass over " + str(N) + " tokens in " + str(plan.all.sequences.size()) + " sequences",
      "lower the batch size or the sequence length");
  workspace_->arena.reserve(*backend_, bytes, "the activations of a forward pass");
  lay_out_inference(Carver(workspace_->arena.data()), N, rows_held, &t);

  backend_->embedding_forward(t.h, batch.ids.data(), batch.positions.data(), weight(kWte), tensor(kWpe));
  hidden_ =
      run_blocks(t, R, precision, keeps_first_block(N, precision) ? first_block_qkv(batch, t) : Tensor());
}

StepShape Model::step_shape(int64_t R, bool training) const {
  StepShape shape;
  // Of its attention calls the last block's may be the larger one: a list repeats rows, and goes from one
  // sequence to another and back.
  const BatchPlan& plan = workspace_->plan;
  shape.N = std::max(plan.N, plan.R);
  shape.S = static_cast<int64_t>(std::max(plan.all.sequences.size(), plan.rows.sequences.size()));
  shape.R = R;
  shape.C = config_.channels;
  shape.NH = config_.heads;
  shape.V = config_.vocab;
  shape.training = training;
  return shape;
}

void Model::forward(const Batch& batch, const std::vector<int64_t>& rows) {
  run_forward(batch, rows, MatmulPrecision::kFP32);
}

void Model::read_hidden(float* out) {
  if (!hidden_) bad("read_hidden: there are no hidden states, call forward first");
  const size_t cols = idx(hidden_.cols), count = idx(hidden_.rows) * cols;
  const size_t bytes = dtype_bytes(hidden_.dtype);
  // Narrow numbers arrive at the end of `out`, from where each widens to a place not behind it.
  char* const arrived = reinterpret_cast<char*>(out) + count * (sizeof(float) - bytes);
  if (hidden_.stride == hidden_.cols) {
    backend_->download(arrived, hidden_.data, count * bytes);
  } else {
    for (int64_t r = 0; r < hidden_.rows; ++r)
      backend_->download(arrived + idx(r) * cols * bytes, hidden_.slice(r, 1).data, cols * bytes);
  }
  if (hidden_.dtype == Dtype::kF32) return;
  for (size_t i = 0; i < count; ++i) {
    uint16_t narrow;
    std::memcpy(&narrow, arrived + i * bytes, sizeof narrow);
    out[i] = bf16_to_f32(narrow);
  }
}

void Model::logits(float* out, const int64_t* rows, int64_t R) {
  if (!hidden_) bad("logits: there are no hidden states, call forward first");
  for (int64_t r = 0; r < R; ++r) {
    if (rows[r] < 0 || rows[r] >= hidden_.rows) {
      bad("logits: row " + str(rows[r]) + " is outside the " + str(hidden_.rows) + " rows kept by forward");
    }
  }
  const int64_t V = config_.vocab;
  if (backend_->host_memory()) {
    if (R > 0) backend_->head_logits(Tensor(out, Dtype::kF32, R, V), hidden_, rows, R, weight(kWte));
    return;
  }
  constexpr int64_t kBlock = 64;  // rows: device memory stays small whatever R is
  const int64_t block = std::min(R, kBlock);
  workspace_->logits.reserve(*backend_, idx(block) * idx(V) * sizeof(float), "a block of logits");
  for (int64_t r = 0; r < R; r += kBlock) {
    const int64_t count = std::min(kBlock, R - r);
    backend_->head_logits(Tensor(workspace_->logits.data(), Dtype::kF32, count, V), hidden_, rows + r, count,
                          weight(kWte));
    backend_->download(out + r * V, workspace_->logits.data(), idx(count) * idx(V) * sizeof(float));
  }
}

void Model::denoise(DenoiseStats* stats, float* watched, const DenoiseRow* rows, int64_t R,
                    const int32_t* watch, int64_t watch_count) {
  if (!hidden_) bad("denoise: there are no hidden states, call forward first");
  check_denoise("denoise", rows, R, hidden_.rows, watch, watch_count, config_.vocab);
  if (R == 0) return;
  StepShape shape = step_shape(R, false);
  shape.N = shape.S = 0;
  for (int64_t r = 0; r < R; ++r) {
    const int64_t guides = rows[r].guide_row >= 0 ? 1 : 0;
    shape.R += guides;
    if (rows[r].needs_logits(config_.vocab)) shape.logit_rows += 1 + guides;
  }
  require_memory(*backend_, backend_->step_bytes(shape), "sampling " + str(R) + " rows",
                 "lower the batch size, or sample fewer rows at a time");
  backend_->head_denoise(stats, watched, hidden_, rows, R, watch, watch_count, weight(kWte));
  if (!backend_->host_memory()) set_divergences(*this, stats, rows, R);
}

}  // namespace dn
