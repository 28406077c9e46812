// NativeModel's methods but those of single parameters; see model_wrap.h and lib/native-types.ts.

#include "addon/model_wrap.h"

#include <charconv>
#include <system_error>
#include <utility>

#include "addon/cache_wrap.h"
#include "addon/convert.h"
#include "addon/requests.h"

namespace dn::addon {

namespace {

// N of "cuda:N"; -1 unless N is decimal digits of an int.
int cuda_ordinal(const std::string& device) {
  const char *const end = device.data() + device.size(), *const digits = device.data() + 5;
  if (device.rfind("cuda:", 0) != 0 || digits == end || *digits < '0' || *digits > '9') return -1;
  int ordinal = 0;
  const auto [rest, error] = std::from_chars(digits, end, ordinal);
  return error == std::errc() && rest == end ? ordinal : -1;
}

// dtype: on a GPU of activations, on the CPU of the weights, with fp32 activations.
std::unique_ptr<Backend> make_backend(const std::string& device, int threads, const std::string& dtype) {
  if (dtype != "fp32" && dtype != "bf16" && (dtype != "int8" || device != "cpu"))
    throw Error(Code::kArgument, "dtype \"" + dtype + "\" is not available on device \"" + device + "\"");
  if (device == "cpu") return make_cpu_backend(threads);
  if (const int ordinal = cuda_ordinal(device); ordinal >= 0)
    return make_cuda_backend(ordinal, dtype == "fp32" ? Dtype::kF32 : Dtype::kBF16);
  throw Error(Code::kDevice, "device \"" + device + "\" is unknown; expected cpu or cuda:N");
}

Napi::ObjectReference keep_alive(const Napi::Value& value) {
  return Napi::Persistent(value.As<Napi::Object>());
}

}  // namespace

Napi::Function ModelWrap::define(Napi::Env env) {
  return DefineClass(
      env, "NativeModel",
      {property<ModelWrap, &ModelWrap::backend, kModelTag>("backend"),
       property<ModelWrap, &ModelWrap::device_loop, kModelTag>("deviceLoop"),
       property<ModelWrap, &ModelWrap::parameters, kModelTag>("parameters"),
       InstanceMethod<&ModelWrap::coded<&ModelWrap::memory>>("memory"),
       InstanceMethod<&ModelWrap::coded<&ModelWrap::initialise>>("initialise"),
       InstanceMethod<&ModelWrap::coded<&ModelWrap::get_parameter>>("getParameter"),
       InstanceMethod<&ModelWrap::coded<&ModelWrap::set_parameter>>("setParameter"),
       InstanceMethod<&ModelWrap::coded<&ModelWrap::load_parameter>>("loadParameter"),
       InstanceMethod<&ModelWrap::coded<&ModelWrap::load_moment>>("loadMoment"),
       InstanceMethod<&ModelWrap::coded<&ModelWrap::create_cache>>("createCache"),
       InstanceMethod<&ModelWrap::coded<&ModelWrap::denoise>>("denoise"),
       InstanceMethod<&ModelWrap::coded<&ModelWrap::denoise_steps>>("denoiseSteps"),
       InstanceMethod<&ModelWrap::coded<&ModelWrap::forward>>("forward"),
       InstanceMethod<&ModelWrap::coded<&ModelWrap::begin_training>>("beginTraining"),
       InstanceMethod<&ModelWrap::coded<&ModelWrap::end_training>>("endTraining"),
       InstanceMethod<&ModelWrap::coded<&ModelWrap::train_batch>>("trainBatch"),
       InstanceMethod<&ModelWrap::coded<&ModelWrap::zero_gradients>>("zeroGradients"),
       InstanceMethod<&ModelWrap::coded<&ModelWrap::gradient_sum_of_squares>>("gradientSumOfSquares"),
       InstanceMethod<&ModelWrap::coded<&ModelWrap::adamw>>("adamw"),
       InstanceMethod<&ModelWrap::coded<&ModelWrap::get_gradient>>("getGradient"),
       InstanceMethod<&ModelWrap::coded<&ModelWrap::get_moment>>("getMoment"),
       InstanceMethod<&ModelWrap::coded<&ModelWrap::dispose>>("dispose")});
}

ModelWrap::ModelWrap(const Napi::CallbackInfo& info)
    : Napi::ObjectWrap<ModelWrap>(info), state_(state_of(info.Env())) {
  const Napi::Env env = info.Env();
  info.This().As<Napi::Object>().TypeTag(&kModelTag);
  const Napi::Object input = object_argument(info, 0, "config"),
                     options = object_argument(info, 1, "options");
  ModelConfig config;
  config.layers = static_cast<int32_t>(int_field(input, "layers"));
  config.heads = static_cast<int32_t>(int_field(input, "heads"));
  config.channels = static_cast<int32_t>(int_field(input, "channels"));
  config.context = static_cast<int32_t>(int_field(input, "context"));
  config.vocab = static_cast<int32_t>(int_field(input, "vocab"));
  const std::string device = string_field(options, "device");
  const int threads = static_cast<int>(int_field(options, "threads"));
  const std::string dtype = string_field(options, "dtype");
  const Dtype weights = dtype == "int8"                      ? Dtype::kI8
                        : dtype == "bf16" && device == "cpu" ? Dtype::kBF16
                                                             : Dtype::kF32;
  guarded(env, [&] {
    model_ = std::make_shared<Model>(make_backend(device, threads, dtype), config, weights);
    has_device_loop_ = model_->has_device_loop();
  });
  account(env);
}

ModelWrap::~ModelWrap() { release(Env()); }

Model& ModelWrap::model(Napi::Env env) const {
  if (!model_) throw coded_error(env, "ERR_DN_DISPOSED", "the model was disposed");
  return *model_;
}

Model& ModelWrap::idle(Napi::Env env) const {
  Model& m = model(env);
  expect(env, !busy_, "the model is busy with another call");
  return m;
}

void ModelWrap::account(Napi::Env env) {
  int64_t now = 0;
  if (model_) {
    const Model::Memory memory = model_->memory();
    now = static_cast<int64_t>(memory.parameters + memory.training + memory.workspace + results_->bytes());
  }
  state_->adjust(env, now - reported_);
  reported_ = now;
}

void ModelWrap::release(Napi::Env env) {
  if (!model_) return;
  model_.reset();
  results_->close();
  account(env);
}

Napi::Promise ModelWrap::start(const Napi::CallbackInfo& info, std::vector<Napi::ObjectReference> keep,
                               Task::Work work, Task::Result result) {
  keep.push_back(keep_alive(info.This()));
  const Napi::Promise promise = Task::start(
      info.Env(), std::move(keep), std::move(work),
      [this](Napi::Env env) {
        busy_ = false;
        account(env);
      },
      std::move(result));
  busy_ = true;  // not before: what throws above starts no work
  return promise;
}

Napi::Value ModelWrap::backend(const Napi::CallbackInfo& info) {
  return Napi::String::New(info.Env(), model(info.Env()).backend().name());
}

Napi::Value ModelWrap::device_loop(const Napi::CallbackInfo& info) {
  model(info.Env());
  return Napi::Boolean::New(info.Env(), has_device_loop_);
}

Napi::Value ModelWrap::memory(const Napi::CallbackInfo& info) {
  const Model::Memory memory = idle(info.Env()).memory();
  Napi::Object result = Napi::Object::New(info.Env());
  result.Set("parameters", static_cast<double>(memory.parameters));
  result.Set("training", static_cast<double>(memory.training));
  result.Set("workspace", static_cast<double>(memory.workspace + results_->bytes()));
  return result;
}

Napi::Value ModelWrap::initialise(const Napi::CallbackInfo& info) {
  Model& m = idle(info.Env());
  const uint64_t seed = bigint_value(info[0], "seed");
  return start(
      info, {}, [&m, seed] { m.initialise(seed); }, [](Napi::Env env) { return env.Undefined(); });
}

Napi::Value ModelWrap::create_cache(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  idle(env);  // a backend allocates for one thread at a time
  expect(env, info.Length() == 1 && info[0].IsNumber(), "createCache takes a capacity");
  const auto external = Napi::External<std::shared_ptr<Model>>::New(env, &model_);
  return state_->cache_class.New({external, info[0]});
}

namespace {

// The fields of `result` that hold statistics: stats_at(i) for i < D.
template <typename StatsAt>
void set_stats(const Napi::Object& result, size_t D, const StatsAt& stats_at) {
  const Napi::Env env = result.Env();
  auto best = Napi::Int32Array::New(env, D), drawn = Napi::Int32Array::New(env, D);
  auto probability = Napi::Float32Array::New(env, D), margin = Napi::Float32Array::New(env, D);
  auto entropy = Napi::Float32Array::New(env, D), drawn_log_prob = Napi::Float32Array::New(env, D);
  for (size_t i = 0; i < D; ++i) {
    const DenoiseStats& s = stats_at(i);
    best[i] = s.best;
    drawn[i] = s.drawn;
    probability[i] = s.probability;
    margin[i] = s.margin;
    entropy[i] = s.entropy;
    drawn_log_prob[i] = s.drawn_log_prob;
  }
  result.Set("best", best);
  result.Set("drawn", drawn);
  result.Set("probability", probability);
  result.Set("margin", margin);
  result.Set("entropy", entropy);
  result.Set("drawnLogProb", drawn_log_prob);
}

}  // namespace

Napi::Value ModelWrap::denoise(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  Model& m = idle(env);
  auto batch = to_batch(object_argument(info, 0, "batch"), m);
  const Napi::Object input = object_argument(info, 1, "denoise");
  auto request = to_denoise(input, batch->row_count(), m.config().vocab);
  auto stats = std::make_shared<std::vector<DenoiseStats>>();
  auto watched = std::make_shared<std::vector<float>>();
  // Written in place by the pool thread, like the result of forward.
  const int64_t K = static_cast<int64_t>(request->logit_rows.size());
  Napi::Float32Array values =
      result_array(env, static_cast<size_t>(K) * static_cast<size_t>(m.config().vocab), results_);
  float* logits = values.Data();
  auto kept = std::make_shared<Napi::ObjectReference>(Napi::Persistent(values.As<Napi::Object>()));
  std::vector<Napi::ObjectReference> keep;  // what the rows point to on the pool thread
  if (!absent(input, "keep")) {
    keep.push_back(keep_alive(input.Get("keep")));
    keep.push_back(keep_alive(input.Get("before")));
  }
  return start(
      info, std::move(keep),
      [&m, batch, request, stats, watched, logits, K] {
        if (request->ahead.most > 1) {
          m.decode(batch->batch, batch->rows, request->rows.at(0), request->watch, request->ahead,
                   stats.get(), watched.get());
          return;
        }
        stats->resize(request->rows.size());
        watched->resize(request->rows.size() * request->watch.size());
        m.forward(batch->batch, batch->rows);
        m.denoise(stats->data(), watched->data(), request->rows.data(),
                  static_cast<int64_t>(request->rows.size()), request->watch.data(),
                  static_cast<int64_t>(request->watch.size()));
        if (K > 0) m.logits(logits, request->logit_rows.data(), K);
      },
      [stats, watched, kept](Napi::Env e) -> Napi::Value {
        Napi::Object result = Napi::Object::New(e);
        set_stats(result, stats->size(), [&](size_t i) -> const DenoiseStats& { return (*stats)[i]; });
        auto divergence = Napi::Float32Array::New(e, stats->size());
        for (size_t i = 0; i < stats->size(); ++i) divergence[i] = (*stats)[i].divergence;
        result.Set("divergence", divergence);
        result.Set("watched", to_array<Napi::Float32Array>(e, *watched));
        result.Set("logits", kept->Value());
        return result;
      });
}

Napi::Value ModelWrap::denoise_steps(const Napi::CallbackInfo& info) {
  Model& m = idle(info.Env());
  auto request = to_loop(object_argument(info, 0, "batch"));
  auto log = std::make_shared<LoopLog>();
  return start(
      info, {}, [&m, request, log] { m.denoise_steps(*request, log.get()); },
      [log](Napi::Env e) -> Napi::Value {
        const size_t events = log->events.size(), L = log->rows.size();
        Napi::Object result = Napi::Object::New(e);
        auto triples = Napi::Int32Array::New(e, 3 * events);
        for (size_t i = 0; i < events; ++i) {
          triples[3 * i] = static_cast<int32_t>(log->events[i].step);
          triples[3 * i + 1] = log->events[i].begin;
          triples[3 * i + 2] = log->events[i].end;
        }
        auto position = Napi::Int32Array::New(e, L);
        auto committed = Napi::Uint8Array::New(e, L);
        for (size_t i = 0; i < L; ++i) {
          position[i] = log->rows[i].position;
          committed[i] = static_cast<uint8_t>(log->rows[i].committed);
        }
        result.Set("events", triples);
        result.Set("position", position);
        result.Set("committed", committed);
        set_stats(result, L, [&](size_t i) -> const DenoiseStats& { return log->rows[i].stats; });
        return result;
      });
}

Napi::Value ModelWrap::forward(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  Model& m = idle(env);
  auto batch = to_batch(object_argument(info, 0, "batch"), m);
  const bool hidden = string_argument(info, 1, "output") == "hidden";
  const int64_t R = batch->row_count();
  const int64_t width = hidden ? m.config().channels : m.config().vocab;
  // The result is written in place by the pool thread: one copy of (R, V) logits, not two. Nobody else holds
  // it yet, unless it lies in the buffer of an earlier one, whose pages then live until the call has ended.
  const size_t n = static_cast<size_t>(R * width);
  Napi::Float32Array values;
  std::shared_ptr<Pages> pages;
  if (!info[2].IsUndefined()) {
    expect(env, info[2].IsArrayBuffer(), "forward takes an ArrayBuffer to write to");
    Napi::ArrayBuffer into = info[2].As<Napi::ArrayBuffer>();
    pages = results_->lent(into.Data());
    if (pages && into.ByteLength() >= n * sizeof(float)) values = Napi::Float32Array::New(env, n, into, 0);
  }
  if (values.IsEmpty()) values = result_array(env, n, results_);
  float* out = values.Data();
  auto kept = std::make_shared<Napi::ObjectReference>(Napi::Persistent(values.As<Napi::Object>()));
  return start(
      info, {},
      [&m, batch, hidden, out, pages, R] {
        m.forward(batch->batch, batch->rows);
        if (hidden) {
          m.read_hidden(out);
        } else {
          std::vector<int64_t> rows(static_cast<size_t>(R));
          for (int64_t r = 0; r < R; ++r) rows[static_cast<size_t>(r)] = r;
          m.logits(out, rows.data(), R);
        }
      },
      [kept](Napi::Env) -> Napi::Value { return kept->Value(); });
}

Napi::Value ModelWrap::begin_training(const Napi::CallbackInfo& info) {
  Model& m = idle(info.Env());
  return start(
      info, {}, [&m] { m.begin_training(); }, [](Napi::Env env) { return env.Undefined(); });
}

Napi::Value ModelWrap::end_training(const Napi::CallbackInfo& info) {
  Model& m = idle(info.Env());
  return start(
      info, {}, [&m] { m.end_training(); }, [](Napi::Env env) { return env.Undefined(); });
}

Napi::Value ModelWrap::train_batch(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  Model& m = idle(env);
  auto request = to_train(object_argument(info, 0, "batch"), object_argument(info, 1, "noise"),
                          object_argument(info, 2, "options"));
  auto noisy = std::make_shared<NoisyBatch>();
  auto losses = std::make_shared<std::vector<float>>();
  return start(
      info, {},
      [&m, request, noisy, losses] {
        *noisy = corrupt(request->clean, request->noise);
        losses->resize(noisy->rows.rows.size());
        if (losses->empty()) return;  // nothing masked: no loss, no gradient
        if (request->backward) {
          m.loss_and_gradients(noisy->batch, noisy->rows, request->options, losses->data());
        } else {
          m.loss(noisy->batch, noisy->rows, request->options, losses->data());
        }
      },
      [noisy, losses, backward = request->backward](Napi::Env e) -> Napi::Value {
        double weighted = 0, unweighted = 0;
        for (size_t i = 0; i < losses->size(); ++i) {
          weighted += static_cast<double>(noisy->rows.weights[i]) * (*losses)[i];
          unweighted += (*losses)[i];
        }
        Napi::Object result = Napi::Object::New(e);
        result.Set("weighted", weighted);
        result.Set("unweighted", unweighted);
        result.Set("masked", static_cast<double>(losses->size()));
        result.Set("predictable", static_cast<double>(noisy->predictable));
        result.Set("denominator", noisy->denominator);
        if (backward) return result;
        Napi::Int32Array rows = Napi::Int32Array::New(e, losses->size());
        for (size_t i = 0; i < losses->size(); ++i) rows[i] = static_cast<int32_t>(noisy->rows.rows[i]);
        result.Set("rows", rows);
        result.Set("losses", to_array<Napi::Float32Array>(e, *losses));
        return result;
      });
}

Napi::Value ModelWrap::zero_gradients(const Napi::CallbackInfo& info) {
  Model& m = idle(info.Env());
  return start(
      info, {}, [&m] { m.zero_gradients(); }, [](Napi::Env env) { return env.Undefined(); });
}

Napi::Value ModelWrap::gradient_sum_of_squares(const Napi::CallbackInfo& info) {
  Model& m = idle(info.Env());
  auto sum = std::make_shared<double>(0);
  return start(
      info, {}, [&m, sum] { *sum = m.gradient_sum_of_squares(); },
      [sum](Napi::Env env) -> Napi::Value { return Napi::Number::New(env, *sum); });
}

Napi::Value ModelWrap::adamw(const Napi::CallbackInfo& info) {
  Model& m = idle(info.Env());
  const Napi::Object input = object_argument(info, 0, "step");
  AdamWStep step;
  step.learning_rate = static_cast<float>(number_field(input, "learningRate"));
  step.beta1 = static_cast<float>(number_field(input, "beta1"));
  step.beta2 = static_cast<float>(number_field(input, "beta2"));
  step.eps = static_cast<float>(number_field(input, "eps"));
  step.gradient_scale = static_cast<float>(number_field(input, "gradientScale"));
  step.step = int_field(input, "step");
  const float decay = static_cast<float>(number_field(input, "weightDecay"));
  return start(
      info, {}, [&m, step, decay] { m.adamw(step, decay); }, [](Napi::Env env) { return env.Undefined(); });
}

void ModelWrap::dispose(const Napi::CallbackInfo& info) {
  expect(info.Env(), !busy_, "dispose while a call is in flight");
  release(info.Env());
}

}  // namespace dn::addon
