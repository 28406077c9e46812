// Inference: checking and planning a batch, the network's forward pass, caches and the head on the rows it
// kept. The block is written once (block_forward); training calls it with other memory (model_training.cpp).

#include "core/model.h"

#include <algorithm>
#include <cstring>

#include "core/divergence.h"
#include "core/error.h"
#include "core/half.h"
#include "core/workspace.h"

namespace dn {
namespace {

size_t idx(int64_t n) { return static_cast<size_t>(n); }

// A mask must be able to answer visible(q, k) for q < q_end and k < k_end.
void check_mask(const AttentionMask& mask, int64_t q_end, int64_t k_end, const std::string& where) {
  if ((mask.kind == MaskKind::kBlockCausal || mask.kind == MaskKind::kBlockDiffusion) && mask.block < 1) {
    bad(where + ": the mask's block is " + str(mask.block) + ", expected at least 1");
  }
  const int64_t length = std::max(q_end, k_end);
  if (mask.kind == MaskKind::kBlockDiffusion &&
      (mask.half < 1 || 2 * static_cast<int64_t>(mask.half) < length)) {
    bad(where + ": the block-diffusion mask covers two halves of " + str(mask.half) + ", the sequence has " +
        str(length) + " positions");
  }
  if (mask.kind == MaskKind::kMatrix && (!mask.matrix || mask.matrix_width < length)) {
    bad(where + ": the mask matrix is (" + str(mask.matrix_width) + ", " + str(mask.matrix_width) +
        "), the sequence needs (" + str(length) + ", " + str(length) + ")");
  }
}

// dst (R, C) = the rows of src that the plan lists, in order.
void gather(Backend& backend, const BatchPlan& plan, Tensor dst, Tensor src) {
  if (plan.loop) {
    plan.loop->gather(dst, src);
    return;
  }
  int64_t r = 0;
  for (const RowRun& run : plan.gathers) {
    backend.copy(dst.slice(r, run.count), src.slice(run.row, run.count));
    r += run.count;
  }
}

}  // namespace

KvCache::KvCache(Backend& backend, const ModelConfig& config, int32_t capacity)
    : capacity_(capacity),
      channels_(config.channels),
      row_bytes_(static_cast<size_t>(config.channels) * dtype_bytes(backend.activation_dtype())) {
  check_config(config);
  if (capacity < 1 || capacity > config.context) {
    bad("key-value cache: capacity is " + str(capacity) + ", expected 1 to the context, " +
        str(config.context));
  }
  buffer_ = alloc_for(backend, 2 * idx(config.layers) * idx(capacity) * row_bytes_,
                      "a key-value cache of " + str(capacity) + " positions");
}

// A layer's keys lie before its values.
void* KvCache::k(int32_t layer) const {
  return static_cast<char*>(buffer_->data()) + 2 * idx(layer) * idx(capacity_) * row_bytes_;
}
void* KvCache::v(int32_t layer) const { return static_cast<char*>(k(layer)) + idx(capacity_) * row_bytes_; }

void QueryPlan::clear() {
  sequences.clear();
  caches.clear();
  positions.clear();
}

void BatchPlan::clear() {
  N = R = 0;
  listed = false;
  all.clear();
  rows.clear();
  gathers.clear();
  cache_writes.clear();
  loop = nullptr;
}

void QueryPlan::use_layer(int32_t layer) {
  for (size_t s = 0; s < sequences.size(); ++s) {
    if (!caches[s]) continue;
    sequences[s].k = caches[s]->k(layer);
    sequences[s].v = caches[s]->v(layer);
  }
}

void Model::plan_batch(const Batch& batch, const std::vector<int64_t>& rows) {
  BatchPlan& plan = workspace_->plan;
  const int64_t N = static_cast<int64_t>(batch.ids.size());
  plan.clear();
  plan.N = N;
  if (N == 0) bad("batch: there are no tokens");
  if (batch.positions.size() != idx(N)) {
    bad("batch: " + str(N) + " ids but " + std::to_string(batch.positions.size()) + " positions");
  }
  if (!batch.mask_positions.empty() && batch.mask_positions.size() != idx(N)) {
    bad("batch: " + str(N) + " ids but " + std::to_string(batch.mask_positions.size()) + " mask positions");
  }
  for (int64_t n = 0; n < N; ++n) {
    const int32_t id = batch.ids[idx(n)], position = batch.positions[idx(n)];
    if (id < 0 || id >= config_.vocab) {
      bad("batch: id " + str(id) + " of row " + str(n) + " is outside the vocabulary of " +
          str(config_.vocab));
    }
    if (position < 0 || position >= config_.context) {
      bad("batch: position " + str(position) + " of row " + str(n) + " is outside the context of " +
          str(config_.context));
    }
    if (plan.query_position(batch, n) < 0) {
      bad("batch: mask position " + str(plan.query_position(batch, n)) + " of row " + str(n) +
          " is negative");
    }
  }

  int64_t covered = 0;
  for (size_t s = 0; s < batch.sequences.size(); ++s) {
    const Sequence& sequence = batch.sequences[s];
    const std::string where = "sequence " + std::to_string(s);
    if (sequence.begin != covered || sequence.end <= sequence.begin || sequence.end > N) {
      bad(where + ": rows [" + str(sequence.begin) + ", " + str(sequence.end) + ") of " + str(N) +
          ", expected a non-empty range that starts at " + str(covered));
    }
    covered = sequence.end;
    const int64_t length = sequence.end - sequence.begin;
    AttentionSequence a;
    a.q_begin = sequence.begin;
    a.q_end = sequence.end;
    a.kv_begin = sequence.begin;
    a.k_len = length;
    a.mask = sequence.mask;
    if (const KvCache* cache = sequence.cache) {
      const size_t expected = 2 * idx(config_.layers) * idx(cache->capacity()) * idx(config_.channels) *
                              dtype_bytes(backend_->activation_dtype());
      if (cache->bytes() != expected) {
        bad(where + ": its key-value cache has " + std::to_string(cache->bytes()) +
            " bytes, one of this model's shape and " + str(cache->capacity()) + " positions has " +
            std::to_string(expected));
      }
      if (std::find(plan.all.caches.begin(), plan.all.caches.end(), cache) != plan.all.caches.end()) {
        bad(where + ": its key-value cache already belongs to an earlier sequence of the batch");
      }
      if (sequence.k_len < 1 || sequence.k_len > cache->capacity()) {
        bad(where + ": k_len is " + str(sequence.k_len) + ", expected 1 to the cache's capacity, " +
            str(cache->capacity()));
      }
      a.k_len = sequence.k_len;
      for (int64_t n = sequence.begin; n < sequence.end; ++n) {
        const int64_t position = batch.positions[idx(n)];
        if (position >= sequence.k_len) {
          bad(where + ": row " + str(n) + " is at position " + str(position) + ", but k_len is " +
              str(sequence.k_len));
        }
        CacheRun* last = n > sequence.begin ? &plan.cache_writes.back() : nullptr;
        if (last && last->position + last->count == position) {
          ++last->count;
        } else {
          plan.cache_writes.push_back({cache, n, position, 1});
        }
      }
    } else if (sequence.k_len != 0 && sequence.k_len != length) {
      bad(where + ": k_len is " + str(sequence.k_len) + " without a cache, expected its own length, " +
          str(length));
    }
    int64_t q_end = 0;
    for (int64_t n = sequence.begin; n < sequence.end; ++n) {
      q_end = std::max<int64_t>(q_end, plan.query_position(batch, n) + int64_t{1});
    }
    check_mask(sequence.mask, q_end, a.k_len, where);
    plan.all.sequences.push_back(a);
    plan.all.caches.push_back(sequence.cache);
  }
  if (covered != N) bad("batch: the sequences cover " + str(covered) + " of " + str(N) + " rows");
  plan.all.positions = batch.mask_positions.empty() ? batch.positions : batch.mask_positions;

  plan.R = rows.empty() ? N : static_cast<int64_t>(rows.size());
  plan.listed = plan.R != N;
  for (size_t r = 0; r < rows.size(); ++r) {
    if (rows[r] < 0 || rows[r] >= N)
      bad("row " + str(rows[r]) + " is outside the batch of " + str(N) + " rows");
    if (rows[r] != static_cast<int64_t>(r)) plan.listed = true;
  }
  if (!plan.listed) return;
  // Rows that follow each other in the list and stand in one sequence share an entry; the order is the
  // list's.
  size_t previous = batch.sequences.size();
  for (const int64_t row : rows) {
    const auto after = std::upper_bound(batch.sequences.begin(), batch.sequences.end(), row,
                                        [](int64_t n, const Sequence& s) { return n < s.begin; });
    const size_t s = static_cast<size_t>(after - batch.sequences.begin()) - 1;
    const int64_t r = static_cast<int64_t>(plan.rows.positions.size());
    if (s == previous) {
      ++plan.rows.sequences.back().q_end;
    } else {
      plan.rows.sequences.push_back(plan.all.sequences[s]);
      plan.rows.sequences.back().q_begin = r;
      plan.rows.sequences.back().q_end = r + 1;
      plan.rows.caches.push_back(plan.all.caches[s]);
      previous = s;
    }
    plan.rows.positions.push_back(plan.all.positions[idx(row)]);
    if (!plan.gathers.empty() && plan.gathers.back().row + plan.gathers.back().count == row) {
      ++plan.gathers.back().count;
    } else {
      plan.gathers.push_back({row, 1});
    }
  }
}

// One transformer block: mid = inp + attention(LN1(inp)), out = mid + mlp(LN2(mid)). Without `out` the last
// projection is left out: a backward pass that recomputes needs only what lies before it. With `listed`
// everything after the keys and values is computed for the plan's rows; attention, too, unless att_rows is
// given: a backward pass wants it of all.
void Model::block_forward(int32_t layer, Tensor out, Tensor inp, const BlockActivations& a, bool listed,
                          MatmulPrecision precision) {
  const int64_t C = config_.channels;
  Backend& backend = *backend_;
  BatchPlan& plan = workspace_->plan;
  const auto parameter = [&](BlockParameter which) { return block_parameter(layer, which); };

  backend.layernorm_forward(a.ln1, a.ln1_mean, a.ln1_rstd, inp, tensor(parameter(kLn1Weight)),
                            tensor(parameter(kLn1Bias)));
  backend.matmul_forward(a.qkv, a.ln1, weight(parameter(kAttnWeight)), tensor(parameter(kAttnBias)),
                         Epilogue::kNone, Tensor(), precision);
  for (const CacheRun& run : plan.cache_writes) {
    const Dtype dtype = backend.activation_dtype();
    const int64_t capacity = run.cache->capacity();
    backend.copy(Tensor(run.cache->k(layer), dtype, capacity, C).slice(run.position, run.count),
                 a.qkv.columns(C, C).slice(run.row, run.count));
    backend.copy(Tensor(run.cache->v(layer), dtype, capacity, C).slice(run.position, run.count),
                 a.qkv.columns(2 * C, C).slice(run.row, run.count));
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

// 7 C elements a token, whatever the depth. `wide` holds qkv and att, then fc; q and the gathered input of
// the last block live where mid and ln2 will be. rows_held: N or R, whichever is more: a list may repeat
// rows.
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
  a.fc = carver.take(dtype, rows_held, 4 * C);
  const size_t bytes = std::max(narrow.used(), carver.used());
  to->h = to->h.slice(0, N);
  a.mid = a.mid.slice(0, N);
  a.att = a.att.slice(0, N);
  a.fc = a.fc.slice(0, N);
  a.ln1 = a.ln2 = to->ln.slice(0, N);
  return bytes;
}

// The blocks and the last layer norm, from the embedded tokens in `t.h`; returns the hidden states of the R
// rows.
Tensor Model::run_blocks(InferenceActivations t, int64_t R, MatmulPrecision precision) {
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
    block_forward(layer, out, h, a, listed, precision);
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
  hidden_ = run_blocks(t, R, precision);
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
