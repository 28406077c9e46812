// Training: forward with saved activations, the hand-written backward pass in the reverse order of the
// forward one, and the optimiser over the parameter table. Which tokens are asked for, and with what weight,
// is noise.h's business.

#include <algorithm>
#include <cmath>
#include <numeric>

#include "core/error.h"
#include "core/model.h"
#include "core/workspace.h"

namespace dn {
namespace {

// One number that is not among these makes every weight NaN.
void check_adamw(const AdamWStep& step, float weight_decay) {
  if (step.step < 1) bad("adamw: step is " + std::to_string(step.step) + ", expected at least 1");
  const auto require = [](bool condition, const char* name, float value, const char* expected) {
    if (!condition)
      bad(std::string("adamw: ") + name + " is " + std::to_string(value) + " in fp32, expected " + expected);
  };
  const char* const finite = "a finite number";
  require(std::isfinite(step.learning_rate), "the learning rate", step.learning_rate, finite);
  require(std::isfinite(weight_decay), "the weight decay", weight_decay, finite);
  require(std::isfinite(step.gradient_scale), "the gradients' scale", step.gradient_scale, finite);
  require(step.beta1 >= 0 && step.beta1 < 1, "beta1", step.beta1, "0 or more and less than 1");
  require(step.beta2 >= 0 && step.beta2 < 1, "beta2", step.beta2, "0 or more and less than 1");
  require(step.eps > 0 && std::isfinite(step.eps), "eps", step.eps, "a finite number above 0");
  // What kernels make of them.
  const double rate = step.learning_rate;
  const double unbiased = 1 - std::pow(static_cast<double>(step.beta1), static_cast<double>(step.step));
  const float size = static_cast<float>(rate / unbiased), decay = static_cast<float>(rate * weight_decay);
  require(std::isfinite(size), "the learning rate divided by 1 - beta1^step", size, finite);
  require(std::isfinite(decay), "the learning rate times the weight decay", decay, finite);
}

}  // namespace

void Model::begin_training() {
  if (training_) {
    for (const Buffer* each : {training_->m.get(), training_->v.get()})
      backend_->zero(each->data(), each->bytes());
    zero_gradients();
    return;
  }
  if (weights_ != Dtype::kF32) {
    bad("training needs fp32 weights, this model holds narrower ones; load it with dtype 'fp32'");
  }
  // Everything that can fail comes before the first change of state.
  require_memory(*backend_,
                 3 * storage_->bytes() + static_cast<size_t>(packed_ ? largest_room() : 0) * sizeof(float),
                 "training (gradients and two moments of " +
                     std::to_string(storage_->bytes() / sizeof(float)) + " parameters)",
                 "train a smaller model, or on another device");
  auto training = std::make_unique<Training>();
  training->gradients = alloc_for(*backend_, storage_->bytes(), "the gradients");
  training->m = alloc_for(*backend_, storage_->bytes(), "AdamW's first moments");
  training->v = alloc_for(*backend_, storage_->bytes(), "AdamW's second moments");
  unpack();
  training_ = std::move(training);
  workspace_->first.memory.release();  // and with it what was known
}

void Model::end_training() {
  // A backend may still have the last update to do, on memory that is about to go.
  if (training_) backend_->synchronize();
  training_.reset();
  // The activations of a training step are many times those of inference; the next forward takes what it
  // needs.
  hidden_ = Tensor();
  workspace_->arena.release();
}

const Model::Training& Model::require_training(const char* caller) const {
  if (!training_) bad(std::string(caller) + ": the model is not training, call begin_training first");
  return *training_;
}

// What of clear gradients a backward pass adds to becomes zeros; weights it is told to set.
Store Model::begin_gradients() {
  if (!training_->are_clear) return Store::kAdd;
  for (size_t i = 0; i < parameters_.size(); ++i) {
    if (is_packable(i, parameters_[i])) continue;
    backend_->zero(gradient(i).data, static_cast<size_t>(parameters_[i].count) * sizeof(float));
  }
  return Store::kSet;
}

// For what reads all gradients.
void Model::settle_gradients() {
  if (!training_->are_clear) return;
  backend_->zero(training_->gradients->data(), training_->gradients->bytes());
  training_->are_clear = false;
}

Tensor Model::gradient(size_t index) const {
  Tensor t = tensor(index);
  t.data = static_cast<float*>(training_->gradients->data()) + parameters_[index].offset;
  return t;
}

void Model::check_loss_rows(const Batch& batch, const LossRows& rows) {
  for (size_t s = 0; s < batch.sequences.size(); ++s) {
    if (batch.sequences[s].cache)
      bad("loss: sequence " + std::to_string(s) + " has a key-value cache, training takes none");
  }
  const int64_t N = static_cast<int64_t>(batch.ids.size());
  const size_t R = rows.rows.size();
  if (rows.targets.size() != R || rows.weights.size() != R) {
    bad("loss: " + std::to_string(R) + " rows, " + std::to_string(rows.targets.size()) + " targets and " +
        std::to_string(rows.weights.size()) + " weights, expected as many of each");
  }
  std::vector<uint8_t>& seen = workspace_->seen;
  seen.assign(static_cast<size_t>(N), 0);
  for (size_t r = 0; r < R; ++r) {
    const int64_t row = rows.rows[r];
    if (row < 0 || row >= N) {
      bad("loss: row " + std::to_string(row) + " is outside the batch of " + std::to_string(N) + " rows");
    }
    if (seen[static_cast<size_t>(row)]) bad("loss: row " + std::to_string(row) + " is listed twice");
    seen[static_cast<size_t>(row)] = 1;
    if (rows.targets[r] < 0 || rows.targets[r] >= config_.vocab) {
      bad("loss: target " + std::to_string(rows.targets[r]) + " of row " + std::to_string(row) +
          " is outside the vocabulary of " + std::to_string(config_.vocab));
    }
  }
}

// 0 .. R - 1: the rows of the list that a forward pass has kept.
const int64_t* Model::first_rows(int64_t R) {
  std::vector<int64_t>& kept = workspace_->kept_rows;
  kept.resize(static_cast<size_t>(R));
  std::iota(kept.begin(), kept.end(), int64_t{0});
  return kept.data();
}

void Model::loss(const Batch& batch, const LossRows& rows, const TrainingOptions& options, float* losses) {
  check_loss_rows(batch, rows);
  const int64_t R = static_cast<int64_t>(rows.rows.size());
  if (R == 0) {
    plan_batch(batch, {});
    return;
  }
  run_forward(batch, rows.rows, options.precision);
  backend_->head_cross_entropy(losses, Tensor(), Tensor(), hidden_, first_rows(R), rows.targets.data(),
                               rows.weights.data(), R, weight(kWte), options.precision, Store::kAdd);
}

void Model::loss_and_gradients(const Batch& batch, const LossRows& rows, const TrainingOptions& options,
                               float* losses) {
  require_training("loss_and_gradients");
  hidden_ = Tensor();
  check_loss_rows(batch, rows);
  plan_batch(batch, rows.rows);
  const int64_t R = static_cast<int64_t>(rows.rows.size());
  if (R == 0) return;

  Workspace& w = *workspace_;
  Backend& backend = *backend_;
  const int64_t N = w.plan.N, C = config_.channels, NH = config_.heads;
  const bool listed = w.plan.listed;
  const int32_t L = config_.layers;
  const Dtype dtype = backend.activation_dtype();
  Tensor lnf, lnf_mean, lnf_rstd;
  w.inputs.resize(static_cast<size_t>(L) + 1);
  w.blocks.resize(options.recompute ? 1 : static_cast<size_t>(L));
  const auto layout = [&](Carver carver) {
    for (Tensor& inp : w.inputs) inp = carver.take(dtype, N, C);
    for (BlockActivations& a : w.blocks) {
      a = BlockActivations();
      a.ln1 = carver.take(dtype, N, C);
      a.ln1_mean = carver.take(Dtype::kF32, N, 1);
      a.ln1_rstd = carver.take(Dtype::kF32, N, 1);
      a.qkv = carver.take(dtype, N, 3 * C);
      a.lse = carver.take(Dtype::kF32, N, NH);
      a.att = carver.take(dtype, N, C);
      a.mid = carver.take(dtype, N, C);
      a.ln2 = carver.take(dtype, N, C);
      a.ln2_mean = carver.take(Dtype::kF32, N, 1);
      a.ln2_rstd = carver.take(Dtype::kF32, N, 1);
      a.fc_pre = carver.take(dtype, N, 4 * C);
      a.fc = carver.take(dtype, N, 4 * C);
    }
    lnf = carver.take(dtype, R, C);
    lnf_mean = carver.take(Dtype::kF32, R, 1);
    lnf_rstd = carver.take(Dtype::kF32, R, 1);
    w.last = w.blocks.back();
    w.dh_rows = Tensor();
    if (listed) {
      w.inputs.back().rows = R;
      for (Tensor* each :
           {&w.last.mid, &w.last.ln2, &w.last.ln2_mean, &w.last.ln2_rstd, &w.last.fc_pre, &w.last.fc})
        each->rows = R;
      w.last.att_rows = carver.take(dtype, R, C);
      w.last.inp_rows = w.last.ln2;
      w.dh_rows = carver.take(dtype, R, C);
    }
    w.dh = carver.take(dtype, N, C);
    w.dln = carver.take(dtype, N, C);
    Carver narrow = carver;
    w.dqkv = narrow.take(dtype, N, 3 * C);
    w.datt = narrow.take(dtype, N, C);
    w.dfc = carver.take(dtype, N, 4 * C);
    return std::max(narrow.used(), carver.used());
  };
  const size_t bytes = layout(Carver(nullptr));
  require_memory(
      backend, w.arena.growth(bytes) + backend.step_bytes(step_shape(R, true)),
      "a training step over " + std::to_string(N) + " tokens with " + std::to_string(R) + " targets",
      std::string("lower the batch size or the sequence length") +
          (options.recompute ? "" : ", or recompute activations"));
  w.arena.reserve(backend, bytes, "the activations of a training step");
  layout(Carver(w.arena.data()));
  const auto activations = [&](int32_t layer) -> const BlockActivations& {
    return layer == L - 1 ? w.last : w.blocks[options.recompute ? 0 : static_cast<size_t>(layer)];
  };
  const auto input = [&](int32_t layer) { return w.inputs[static_cast<size_t>(layer)]; };

  backend.embedding_forward(input(0), batch.ids.data(), batch.positions.data(), weight(kWte), tensor(kWpe));
  for (int32_t layer = 0; layer < L; ++layer) {
    block_qkv(layer, input(layer), activations(layer), options.precision);
    block_forward(layer, input(layer + 1), input(layer), activations(layer), listed && layer == L - 1,
                  options.precision);
  }
  const size_t lnf_weight = ln_f_weight(config_), lnf_bias = ln_f_bias(config_);
  backend.layernorm_forward(lnf, lnf_mean, lnf_rstd, input(L), tensor(lnf_weight), tensor(lnf_bias));

  const Tensor dh = listed ? w.dh_rows : w.dh, dlnf = w.dln.slice(0, R);
  const Store store = begin_gradients();
  backend.head_cross_entropy(losses, dlnf, gradient(kWte), lnf, first_rows(R), rows.targets.data(),
                             rows.weights.data(), R, weight(kWte), options.precision, store);
  backend.zero(dh.data, static_cast<size_t>(R * C) * dtype_bytes(dtype));
  backend.layernorm_backward(dh, gradient(lnf_weight), gradient(lnf_bias), dlnf, input(L), tensor(lnf_weight),
                             lnf_mean, lnf_rstd);
  for (int32_t layer = L - 1; layer >= 0; --layer) {
    // The last block's activations are still there.
    if (options.recompute && layer < L - 1) {
      block_qkv(layer, input(layer), activations(layer), options.precision);
      block_forward(layer, Tensor(), input(layer), activations(layer), false, options.precision);
    }
    block_backward(layer, input(layer), activations(layer), listed && layer == L - 1, options.precision,
                   store);
  }
  backend.embedding_backward(gradient(kWte), gradient(kWpe), w.dh, batch.ids.data(), batch.positions.data());
  training_->are_clear = false;
}

// Mirror of block_forward. The workspace's dh holds the gradient of the block's output and becomes that of
// its input: both residual connections pass it on as it is, and each branch adds its own through the layer
// norm. With `listed` only the plan's rows of the output have one, in dh_rows; below the projection of
// attention, where the rows meet again, all have.
void Model::block_backward(int32_t layer, Tensor inp, const BlockActivations& a, bool listed,
                           MatmulPrecision precision, Store store) {
  Workspace& w = *workspace_;
  Backend& backend = *backend_;
  const auto parameter = [&](BlockParameter which) { return block_parameter(layer, which); };
  const auto matmul_backward = [&](Tensor dinp, BlockParameter matrix, BlockParameter bias, Tensor dout,
                                   Tensor input) {
    backend.matmul_backward(dinp, gradient(parameter(matrix)), gradient(parameter(bias)), dout, input,
                            weight(parameter(matrix)), precision, store);
  };

  const int64_t R = a.mid.rows;
  const Tensor dh = listed ? w.dh_rows : w.dh, dln = w.dln.slice(0, R), dfc = w.dfc.slice(0, R);
  matmul_backward(dfc, kFcProjWeight, kFcProjBias, dh, a.fc);
  backend.gelu_backward(dfc, dfc, a.fc_pre);
  matmul_backward(dln, kFcWeight, kFcBias, dfc, a.ln2);
  backend.layernorm_backward(dh, gradient(parameter(kLn2Weight)), gradient(parameter(kLn2Bias)), dln, a.mid,
                             tensor(parameter(kLn2Weight)), a.ln2_mean, a.ln2_rstd);

  if (listed) {
    matmul_backward(dln, kAttnProjWeight, kAttnProjBias, dh, a.att_rows);
    scatter(backend, w.plan, w.datt, dln);
    scatter(backend, w.plan, w.dh, dh);
  } else {
    matmul_backward(w.datt, kAttnProjWeight, kAttnProjBias, dh, a.att);
  }
  const QueryPlan& queries = w.plan.all;
  backend.attention_backward(w.dqkv, w.datt, a.qkv, a.att, a.lse, queries.sequences.data(),
                             static_cast<int64_t>(queries.sequences.size()), queries.positions.data(),
                             config_.heads);
  matmul_backward(w.dln, kAttnWeight, kAttnBias, w.dqkv, a.ln1);
  backend.layernorm_backward(w.dh, gradient(parameter(kLn1Weight)), gradient(parameter(kLn1Bias)), w.dln, inp,
                             tensor(parameter(kLn1Weight)), a.ln1_mean, a.ln1_rstd);
}

// On the host a pass over all gradients costs more than to clear the few that are added to one by one; a
// device clears all at once.
void Model::zero_gradients() {
  require_training("zero_gradients");
  training_->are_clear = true;
  if (!backend_->host_memory()) settle_gradients();
}

double Model::gradient_sum_of_squares() {
  const Training& training = require_training("gradient_sum_of_squares");
  settle_gradients();
  const int64_t n = static_cast<int64_t>(training.gradients->bytes() / sizeof(float));
  return backend_->sum_of_squares(training.gradients->data(), n);
}

// Neighbours with the same decay go together, gaps included: there everything is zero and stays so.
void Model::adamw(const AdamWStep& step, float weight_decay) {
  const Training& training = require_training("adamw");
  check_adamw(step, weight_decay);
  settle_gradients();
  const int64_t total = static_cast<int64_t>(storage_->bytes() / sizeof(float));
  for (size_t begin = 0; begin < parameters_.size();) {
    size_t end = begin + 1;
    while (end < parameters_.size() && parameters_[end].is_matrix == parameters_[begin].is_matrix) ++end;
    const int64_t first = parameters_[begin].offset;
    const int64_t last = end < parameters_.size() ? parameters_[end].offset : total;
    AdamWStep span = step;
    span.weight_decay = parameters_[begin].is_matrix ? weight_decay : 0;
    backend_->adamw(static_cast<float*>(storage_->data()) + first,
                    static_cast<float*>(training.gradients->data()) + first,
                    static_cast<float*>(training.m->data()) + first,
                    static_cast<float*>(training.v->data()) + first, last - first, span);
    begin = end;
  }
}

void Model::get_gradient(size_t index, float* out) {
  require_training("get_gradient");
  settle_gradients();
  const Parameter& p = parameter_at(parameters_, index);
  backend_->download(out, gradient(index).data, static_cast<size_t>(p.count) * sizeof(float));
}

void Model::get_moment(size_t index, Moment which, float* out) {
  const Training& training = require_training("get_moment");
  const Parameter& p = parameter_at(parameters_, index);
  const Buffer& moment = which == Moment::kFirst ? *training.m : *training.v;
  backend_->download(out, static_cast<float*>(moment.data()) + p.offset,
                     static_cast<size_t>(p.count) * sizeof(float));
}

void Model::set_moment(size_t index, Moment which, const float* values) {
  const Training& training = require_training("set_moment");
  const Parameter& p = parameter_at(parameters_, index);
  const Buffer& moment = which == Moment::kFirst ? *training.m : *training.v;
  backend_->upload(static_cast<float*>(moment.data()) + p.offset, values,
                   static_cast<size_t>(p.count) * sizeof(float));
}

}  // namespace dn
