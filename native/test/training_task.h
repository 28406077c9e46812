// What tests of training share: a batch with losses at some of its rows, and a model's gradients, weights and
// moments as arrays.
#pragma once

#include <cmath>
#include <string>
#include <vector>

#include "core/model.h"
#include "test/check.h"
#include "test/naive_gpt2.h"
#include "test/same_bits.h"

namespace dn::test {

using Floats = std::vector<float>;
using State = std::vector<Floats>;  // one array a parameter

inline Floats sized(const Model& model, size_t index) {
  return Floats(static_cast<size_t>(model.parameters()[index].count));
}

inline State gradients(Model& model) {
  State state;
  for (size_t i = 0; i < model.parameters().size(); ++i) {
    state.push_back(sized(model, i));
    model.get_gradient(i, state.back().data());
  }
  return state;
}

inline State weights(Model& model) {
  State state;
  for (size_t i = 0; i < model.parameters().size(); ++i) {
    state.push_back(sized(model, i));
    model.get_parameter(i, state.back().data());
  }
  return state;
}

inline State moments(Model& model, Model::Moment which) {
  State state;
  for (size_t i = 0; i < model.parameters().size(); ++i) {
    state.push_back(sized(model, i));
    model.get_moment(i, which, state.back().data());
  }
  return state;
}

using test::same_bits;

inline void check_same_bits(const Model& model, const State& a, const State& b, const char* what) {
  for (size_t i = 0; i < a.size(); ++i) {
    CHECK_MSG(same_bits(a[i], b[i]), std::string(what) + ": " + model.parameters()[i].name + " differs");
  }
}

// Two ragged sequences; every second row is asked for, with weights as of different diffusion times.
struct Task {
  Batch batch;
  LossRows rows;
};

inline Task make_task(const ModelConfig& config, const AttentionMask& mask, uint64_t seed, int32_t first = 12,
                      int32_t second = 5) {
  Task task;
  Numbers numbers(seed);
  append_sequence(task.batch, numbers, first, config.vocab, mask);
  if (second > 0) append_sequence(task.batch, numbers, second, config.vocab, mask);
  double_positions(task.batch);
  for (int64_t n = 0; n < static_cast<int64_t>(task.batch.ids.size()); n += 2) {
    task.rows.rows.push_back(n);
    task.rows.targets.push_back(numbers.below(config.vocab));
    task.rows.weights.push_back(n < first ? 1.75f : 0.5f);
  }
  return task;
}

inline Floats run(Model& model, const Task& task, const TrainingOptions& options = {}) {
  Floats losses(task.rows.rows.size());
  model.loss_and_gradients(task.batch, task.rows, options, losses.data());
  return losses;
}

inline double root_sum_of_squares(const Floats& values) {
  double sum = 0;
  for (const float x : values) sum += static_cast<double>(x) * x;
  return std::sqrt(sum);
}

}  // namespace dn::test
