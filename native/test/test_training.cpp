// What training must not change a bit (recompute, threads, a saved and restored state), how it begins and
// alternates with inference, what it passes on and allocates, and what it refuses. Its numbers are in
// test_training_gradients.cpp, the rows that have a loss in test_training_rows.cpp.

#include <cmath>
#include <limits>
#include <memory>
#include <string>

#include "core/error.h"
#include "core/model.h"
#include "test/check.h"
#include "test/proxy_backend.h"
#include "test/training_task.h"

using namespace dn;
using namespace dn::test;

DN_TEST(training_recompute_equals_saved) {
  ModelConfig config = tiny_config(20, 37);
  config.layers = 4;
  const NaiveGpt2 naive = random_weights(config, 6);
  const auto saved = make_model(naive), recomputed = make_model(naive);
  saved->begin_training();
  recomputed->begin_training();
  TrainingOptions options;
  options.recompute = true;
  for (const NamedMask& named : all_masks()) {
    const Task task = make_task(naive.config, named.mask, 38);
    CHECK_MSG(same_bits(run(*saved, task), run(*recomputed, task, options)), named.name);
    check_same_bits(*saved, gradients(*saved), gradients(*recomputed), named.name);
  }
  CHECK(recomputed->memory().workspace < saved->memory().workspace / 2);
}

DN_TEST(training_threads_change_nothing) {
  const NaiveGpt2 naive = random_weights(tiny_config(20, 37), 7);
  const Task task = make_task(naive.config, all_masks()[2].mask, 39);
  State expected, expected_weights;
  for (const int threads : {1, 2, 8}) {
    const auto model = make_model(naive, threads);
    model->begin_training();
    run(*model, task);
    const State got = gradients(*model);
    AdamWStep step;
    step.learning_rate = 0.01f;
    model->adamw(step, 0.1f);
    if (threads == 1) {
      expected = got;
      expected_weights = weights(*model);
    }
    check_same_bits(*model, got, expected, "gradient");
    check_same_bits(*model, weights(*model), expected_weights, "weight");
  }
}

DN_TEST(training_continues_from_a_saved_state) {
  const NaiveGpt2 naive = random_weights(tiny_config(20, 37), 9);
  const auto original = make_model(naive);
  original->begin_training();
  const auto train = [](Model& model, int64_t from, int64_t to) {
    for (int64_t step = from; step < to; ++step) {
      model.zero_gradients();
      run(model, make_task(model.config(), all_masks()[0].mask, static_cast<uint64_t>(50 + step)));
      AdamWStep s;
      s.learning_rate = 0.02f;
      s.step = step;
      model.adamw(s, 0.1f);
    }
  };
  train(*original, 1, 4);
  const State saved = weights(*original), m = moments(*original, Model::Moment::kFirst),
              v = moments(*original, Model::Moment::kSecond);
  train(*original, 4, 7);

  Model resumed(make_cpu_backend(1), naive.config);
  resumed.begin_training();
  for (size_t i = 0; i < saved.size(); ++i) {
    resumed.set_parameter(i, saved[i].data());
    resumed.set_moment(i, Model::Moment::kFirst, m[i].data());
    resumed.set_moment(i, Model::Moment::kSecond, v[i].data());
  }
  train(resumed, 4, 7);
  check_same_bits(resumed, weights(*original), weights(resumed), "weight");
  check_same_bits(resumed, moments(*original, Model::Moment::kFirst), moments(resumed, Model::Moment::kFirst),
                  "m");
  check_same_bits(resumed, moments(*original, Model::Moment::kSecond),
                  moments(resumed, Model::Moment::kSecond), "v");
}

// Who begins never goes on with what another left behind.
DN_TEST(training_begins_anew) {
  const NaiveGpt2 naive = random_weights(tiny_config(20, 37), 10);
  const auto model = make_model(naive);
  model->begin_training();
  run(*model, make_task(naive.config, all_masks()[1].mask, 41));
  AdamWStep step;
  step.learning_rate = 0.05f;
  model->adamw(step, 0);
  const State trained = weights(*model);
  model->begin_training();
  for (const State& state :
       {moments(*model, Model::Moment::kFirst), moments(*model, Model::Moment::kSecond), gradients(*model)}) {
    for (const Floats& values : state) CHECK(root_sum_of_squares(values) == 0);
  }
  check_same_bits(*model, weights(*model), trained, "weight");
}

// Packing for inference and back loses nothing, also not after training has changed the weights.
DN_TEST(training_alternates_with_inference) {
  const NaiveGpt2 naive = random_weights(tiny_config(20, 37), 10);
  const auto model = make_model(naive);
  const Task task = make_task(naive.config, all_masks()[1].mask, 41);
  model->forward(task.batch, {});
  model->begin_training();
  run(*model, task);
  AdamWStep step;
  step.learning_rate = 0.05f;
  model->adamw(step, 0);
  const State trained = weights(*model);
  model->end_training();
  CHECK(!model->training());
  model->forward(task.batch, {});
  check_same_bits(*model, weights(*model), trained, "weight");
  model->begin_training();  // moments and gradients start at zero again
  for (const State& state :
       {moments(*model, Model::Moment::kFirst), moments(*model, Model::Moment::kSecond), gradients(*model)}) {
    for (const Floats& values : state) CHECK(root_sum_of_squares(values) == 0);
  }
  check_same_bits(*model, weights(*model), trained, "weight");
}

// What to do about it is the training loop's business; hiding it would not be.
DN_TEST(training_passes_nan_on) {
  const NaiveGpt2 naive = random_weights(tiny_config(), 13);
  const auto model = make_model(naive);
  model->begin_training();
  Floats bias(16, std::numeric_limits<float>::quiet_NaN());
  model->set_parameter(model->find_parameter("ln_f.bias"), bias.data());
  const Floats losses = run(*model, make_task(naive.config, all_masks()[0].mask, 44));
  for (const float loss : losses) CHECK(std::isnan(loss));
  CHECK(std::isnan(model->gradient_sum_of_squares()));
}

DN_TEST(training_steps_of_a_known_shape_allocate_nothing) {
  const NaiveGpt2 naive = random_weights(tiny_config(), 14);
  ProxyControl control;
  Model model(std::make_unique<ProxyBackend>(make_cpu_backend(2), &control), naive.config);
  set_weights(model, naive);
  model.begin_training();
  const Task small = make_task(naive.config, all_masks()[0].mask, 45, 5, 0),
             large = make_task(naive.config, all_masks()[0].mask, 46);
  TrainingOptions recompute;
  recompute.recompute = true;
  const auto step = [&](const Task& task, const TrainingOptions& options) {
    model.zero_gradients();
    run(model, task, options);
    model.gradient_sum_of_squares();
    model.adamw({}, 0.1f);
  };
  step(small, {});
  step(large, {});
  const size_t held = model.memory().workspace;
  control.allocations = 0;
  for (const TrainingOptions& options : {TrainingOptions{}, recompute}) {
    step(small, options);
    step(large, options);
  }
  CHECK_MSG(control.allocations == 0, std::to_string(control.allocations) + " allocations");
  CHECK(model.memory().workspace == held);
  model.end_training();
  CHECK(model.memory().workspace == 0);
}

DN_TEST(training_rejects_bad_calls) {
  const NaiveGpt2 naive = random_weights(tiny_config(), 15);
  const auto model = make_model(naive);
  const Task good = make_task(naive.config, all_masks()[0].mask, 47);
  Floats out(16 * 64);
  AdamWStep step;
  CHECK_THROWS(run(*model, good), Code::kArgument, "loss_and_gradients: the model is not training");
  CHECK_THROWS(model->zero_gradients(), Code::kArgument, "call begin_training first");
  CHECK_THROWS(model->gradient_sum_of_squares(), Code::kArgument, "call begin_training first");
  CHECK_THROWS(model->adamw(step, 0), Code::kArgument, "call begin_training first");
  CHECK_THROWS(model->get_gradient(0, out.data()), Code::kArgument, "get_gradient");
  CHECK_THROWS(model->get_moment(0, Model::Moment::kFirst, out.data()), Code::kArgument, "get_moment");
  CHECK_THROWS(model->set_moment(0, Model::Moment::kFirst, out.data()), Code::kArgument, "set_moment");
  model->begin_training();
  step.step = 0;
  CHECK_THROWS(model->adamw(step, 0), Code::kArgument, "step is 0");
  const State before = weights(*model);
  const float infinity = std::numeric_limits<float>::infinity(), nan = std::nanf("");
  const auto refused = [&](float AdamWStep::*field, std::initializer_list<float> values, const char* part) {
    for (const float value : values) {
      AdamWStep spoilt;
      spoilt.*field = value;
      CHECK_THROWS(model->adamw(spoilt, 0.1f), Code::kArgument, part);
    }
  };
  refused(&AdamWStep::learning_rate, {infinity, -infinity, nan}, "the learning rate is");
  refused(&AdamWStep::gradient_scale, {infinity, nan}, "the gradients' scale is");
  refused(&AdamWStep::beta1, {-0.1f, 1, nan}, "beta1 is");
  refused(&AdamWStep::beta2, {-0.1f, 1, infinity}, "beta2 is");
  refused(&AdamWStep::eps, {0, -1, infinity, nan}, "eps is");
  CHECK_THROWS(model->adamw(AdamWStep(), infinity), Code::kArgument, "the weight decay is inf in fp32");
  AdamWStep large;
  large.learning_rate = 1e38f;
  CHECK_THROWS(model->adamw(large, 0), Code::kArgument, "divided by 1 - beta1^step is inf");
  large.beta1 = 0;
  CHECK_THROWS(model->adamw(large, 10), Code::kArgument, "times the weight decay is inf");
  check_same_bits(*model, weights(*model), before, "weight");
  const auto changed = [&](void (*change)(Task&)) {
    Task task = good;
    change(task);
    Floats losses(64);
    CHECK_THROWS(model->loss(task.batch, task.rows, {}, losses.data()), Code::kArgument, "");
    model->loss_and_gradients(task.batch, task.rows, {}, losses.data());
  };
  CHECK_THROWS(changed([](Task& t) { t.rows.rows[1] = 17; }), Code::kArgument,
               "row 17 is outside the batch of 17");
  CHECK_THROWS(changed([](Task& t) { t.rows.rows[1] = -1; }), Code::kArgument, "row -1");
  CHECK_THROWS(changed([](Task& t) { t.rows.rows[1] = 0; }), Code::kArgument, "row 0 is listed twice");
  CHECK_THROWS(changed([](Task& t) { t.rows.targets[0] = 11; }), Code::kArgument, "target 11 of row 0");
  CHECK_THROWS(changed([](Task& t) { t.rows.targets[0] = -1; }), Code::kArgument, "target -1 of row 0");
  CHECK_THROWS(changed([](Task& t) { t.rows.weights.pop_back(); }), Code::kArgument,
               "9 targets and 8 weights");
  CHECK_THROWS(changed([](Task& t) { t.batch.ids[0] = 11; }), Code::kArgument, "id 11");
  CHECK(model->gradient_sum_of_squares() == 0);
  KvCache cache(model->backend(), naive.config, 12);
  Task cached = good;
  cached.batch.sequences[0].cache = &cache;
  CHECK_THROWS(run(*model, cached), Code::kArgument, "key-value cache");
  CHECK_THROWS(model->loss(cached.batch, cached.rows, {}, out.data()), Code::kArgument, "key-value cache");
}
