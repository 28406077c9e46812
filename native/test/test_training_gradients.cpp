// The numbers of training: losses and every gradient against finite differences of the naive model in double,
// sums of gradients, AdamW against a naive one, and bf16 near fp32.

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "core/model.h"
#include "test/check.h"
#include "test/training_task.h"

using namespace dn;
using namespace dn::test;

namespace {

double central_difference(NaiveGpt2& naive, const Task& task, size_t index, const Doubles& direction) {
  constexpr double kStep = 1e-5;
  const Doubles kept = naive.p[index];
  for (size_t e = 0; e < kept.size(); ++e) naive.p[index][e] = kept[e] + kStep * direction[e];
  const double above = naive.weighted_loss(task.batch, task.rows);
  for (size_t e = 0; e < kept.size(); ++e) naive.p[index][e] = kept[e] - kStep * direction[e];
  const double below = naive.weighted_loss(task.batch, task.rows);
  naive.p[index] = kept;
  return (above - below) / (2 * kStep);
}

}  // namespace

DN_TEST(training_losses_match_naive) {
  for (const int32_t channels : {16, 20}) {
    const NaiveGpt2 naive = random_weights(tiny_config(channels, channels == 16 ? 11 : 37), 1);
    const auto model = make_model(naive);
    for (const NamedMask& named : all_masks()) {
      const Task task = make_task(naive.config, named.mask, 31);
      const Doubles expected = naive.losses(task.batch, task.rows);
      const int64_t R = static_cast<int64_t>(expected.size());
      Floats packed(expected.size()), plain(expected.size());
      model->loss(task.batch, task.rows, {}, packed.data());
      CHECK_CLOSE(packed.data(), expected.data(), R, 2e-4, named.name);
      model->begin_training();
      model->loss(task.batch, task.rows, {}, plain.data());
      CHECK_MSG(same_bits(packed, plain), named.name);
      CHECK_MSG(same_bits(packed, run(*model, task)), named.name);
      model->end_training();
    }
  }
}

// Every element of every parameter, on a short batch.
DN_TEST(training_every_gradient_matches_finite_differences) {
  NaiveGpt2 naive = random_weights(tiny_config(), 2);
  const auto model = make_model(naive);
  const Task task = make_task(naive.config, all_masks()[0].mask, 32, 4, 2);
  model->begin_training();
  run(*model, task);
  const State got = gradients(*model);
  for (size_t i = 0; i < got.size(); ++i) {
    Doubles expected(got[i].size()), direction(got[i].size(), 0.0);
    double largest = 0;
    for (size_t e = 0; e < expected.size(); ++e) {
      direction[e] = 1;
      expected[e] = central_difference(naive, task, i, direction);
      direction[e] = 0;
      largest = std::max(largest, std::fabs(expected[e]));
    }
    CHECK_CLOSE(got[i].data(), expected.data(), static_cast<int64_t>(expected.size()), 1e-4 * largest + 1e-6,
                model->parameters()[i].name);
  }
}

// All masks at their full length: two random directions through every parameter, so that each element counts.
DN_TEST(training_gradients_of_all_masks_match_finite_differences) {
  for (const int32_t channels : {16, 20}) {
    NaiveGpt2 naive = random_weights(tiny_config(channels, channels == 16 ? 11 : 37), 3);
    const auto model = make_model(naive);
    model->begin_training();
    for (const NamedMask& named : all_masks()) {
      const Task task = make_task(naive.config, named.mask, 33);
      model->zero_gradients();
      run(*model, task);
      const State got = gradients(*model);
      Numbers numbers(34);
      for (size_t i = 0; i < got.size(); ++i) {
        for (int repeat = 0; repeat < 2; ++repeat) {
          Doubles direction(got[i].size());
          double along = 0;
          for (size_t e = 0; e < direction.size(); ++e) {
            direction[e] = numbers.normal();
            along += direction[e] * static_cast<double>(got[i][e]);
          }
          const double expected = central_difference(naive, task, i, direction);
          CHECK_MSG(std::fabs(along - expected) <= 1e-4 * root_sum_of_squares(got[i]) + 1e-5,
                    std::string(named.name) + ", " + model->parameters()[i].name + ": " +
                        std::to_string(along) + " against " + std::to_string(expected));
        }
      }
    }
  }
}

DN_TEST(training_gradients_add_up) {
  const NaiveGpt2 naive = random_weights(tiny_config(20, 37), 4);
  const auto model = make_model(naive);
  model->begin_training();
  const Task a = make_task(naive.config, all_masks()[0].mask, 35),
             b = make_task(naive.config, all_masks()[1].mask, 36);
  run(*model, a);
  const State first = gradients(*model);
  model->zero_gradients();
  CHECK(model->gradient_sum_of_squares() == 0);
  run(*model, a);
  model->zero_gradients();
  for (const Floats& g : gradients(*model)) CHECK(root_sum_of_squares(g) == 0);
  run(*model, a);
  model->zero_gradients();
  const State before = weights(*model);
  model->adamw(AdamWStep{0.1f}, 0);
  check_same_bits(*model, weights(*model), before, "weight after a step along nothing");
  run(*model, b);
  const State second = gradients(*model);
  model->zero_gradients();
  run(*model, a);
  run(*model, b);
  const State both = gradients(*model);
  double sum = 0;
  for (size_t i = 0; i < both.size(); ++i) {
    Floats expected = first[i];
    for (size_t e = 0; e < expected.size(); ++e) expected[e] += second[i][e];
    CHECK_CLOSE(both[i].data(), expected.data(), static_cast<int64_t>(expected.size()),
                1e-5 * (root_sum_of_squares(first[i]) + root_sum_of_squares(second[i])) + 1e-6,
                model->parameters()[i].name);
    for (const float g : both[i]) sum += static_cast<double>(g) * g;
  }
  CHECK(std::fabs(model->gradient_sum_of_squares() / sum - 1) < 1e-10);
}

DN_TEST(training_ten_adamw_steps_match_naive) {
  const NaiveGpt2 naive = random_weights(tiny_config(20, 37), 5);
  const auto model = make_model(naive);
  model->begin_training();
  std::vector<Doubles> p = naive.p, m, v;
  for (const Doubles& x : p) {
    m.emplace_back(x.size(), 0.0);
    v.emplace_back(x.size(), 0.0);
  }
  const double lr = 0.01, beta1 = 0.9, beta2 = 0.95, eps = 1e-3, decay = 0.1, scale = 0.25;
  double first_loss = 0, last_loss = 0;
  for (int64_t step = 1; step <= 10; ++step) {
    const Task task = make_task(naive.config, all_masks()[0].mask, 37);
    model->zero_gradients();
    last_loss = 0;
    for (const float loss : run(*model, task)) last_loss += loss;
    if (step == 1) first_loss = last_loss;
    const State g = gradients(*model);
    AdamWStep s;
    s.learning_rate = static_cast<float>(lr);
    s.beta1 = static_cast<float>(beta1);
    s.beta2 = static_cast<float>(beta2);
    s.eps = static_cast<float>(eps);
    s.gradient_scale = static_cast<float>(scale);
    s.step = step;
    model->adamw(s, static_cast<float>(decay));
    for (size_t i = 0; i < p.size(); ++i) {
      const bool decays = model->parameters()[i].shape.size() == 2;  // wte and wpe too
      for (size_t e = 0; e < p[i].size(); ++e) {
        const double x = static_cast<double>(g[i][e]) * scale;
        m[i][e] = beta1 * m[i][e] + (1 - beta1) * x;
        v[i][e] = beta2 * v[i][e] + (1 - beta2) * x * x;
        const double m_hat = m[i][e] / (1 - std::pow(beta1, static_cast<double>(step)));
        const double v_hat = v[i][e] / (1 - std::pow(beta2, static_cast<double>(step)));
        p[i][e] -= lr * (m_hat / (std::sqrt(v_hat) + eps) + (decays ? decay * p[i][e] : 0));
      }
    }
  }
  CHECK_MSG(last_loss < first_loss,
            "loss went from " + std::to_string(first_loss) + " to " + std::to_string(last_loss));
  const State got = weights(*model);
  const State got_m = moments(*model, Model::Moment::kFirst), got_v = moments(*model, Model::Moment::kSecond);
  for (size_t i = 0; i < p.size(); ++i) {
    const int64_t n = static_cast<int64_t>(p[i].size());
    CHECK_CLOSE(got[i].data(), p[i].data(), n, 5e-6, model->parameters()[i].name);
    CHECK_CLOSE(got_m[i].data(), m[i].data(), n, 1e-5, model->parameters()[i].name + " (first moment)");
    CHECK_CLOSE(got_v[i].data(), v[i].data(), n, 1e-4, model->parameters()[i].name + " (second moment)");
  }
}

// Reduced precision may round, but must stay near: bf16 keeps 8 bits.
DN_TEST(training_bf16_stays_near) {
  const NaiveGpt2 naive = random_weights(tiny_config(20, 37), 12);
  const auto exact = make_model(naive), rounded = make_model(naive);
  exact->begin_training();
  rounded->begin_training();
  TrainingOptions options;
  options.precision = MatmulPrecision::kBF16;
  const Task task = make_task(naive.config, all_masks()[0].mask, 43);
  const Floats a = run(*exact, task), b = run(*rounded, task, options);
  CHECK_CLOSE(b.data(), a.data(), static_cast<int64_t>(a.size()), 0.3, "loss");
  const State da = gradients(*exact), db = gradients(*rounded);
  for (size_t i = 0; i < da.size(); ++i) {
    Floats difference = da[i];
    for (size_t e = 0; e < difference.size(); ++e) difference[e] -= db[i][e];
    if (exact->parameters()[i].name.find("c_attn.bias") != std::string::npos)
      continue;  // a third of it is rounding noise
    CHECK_MSG(root_sum_of_squares(difference) <= 0.1 * root_sum_of_squares(da[i]),
              exact->parameters()[i].name + ": " +
                  std::to_string(root_sum_of_squares(difference) / root_sum_of_squares(da[i])));
  }
}
