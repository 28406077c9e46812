// What the tests of the whole model share: a small model, batches and targets for it.
#pragma once

#include <cmath>
#include <string>
#include <vector>

#include "core/model.h"
#include "cuda/test/support.h"

namespace dn::cuda_test {

const ModelConfig kConfig{2, 2, 32, 80, 97};

inline Batch make_batch(const std::vector<int64_t>& lengths) {
  Batch batch;
  for (const int64_t T : lengths) {
    Sequence s;
    s.begin = static_cast<int64_t>(batch.ids.size());
    s.end = s.begin + T;
    s.mask.kind = MaskKind::kFull;
    for (int64_t t = 0; t < T; ++t) {
      batch.ids.push_back(static_cast<int32_t>((batch.ids.size() * 37 + 11) % 97));
      batch.positions.push_back(static_cast<int32_t>(t));
    }
    batch.sequences.push_back(s);
  }
  batch.sequences.back().mask.kind = MaskKind::kAnnealed;
  batch.sequences.back().mask.threshold = annealing_threshold(0.5);
  return batch;
}

inline LossRows make_rows(int64_t N) {
  LossRows rows;
  for (int64_t n = 0; n < N; n += 2) {
    rows.rows.push_back(N - 1 - n);
    rows.targets.push_back(static_cast<int32_t>(n * 5 % 97));
    rows.weights.push_back(1.0f + 0.1f * static_cast<float>(n % 3));
  }
  return rows;
}

inline std::vector<float> parameter(Model& model, size_t i) {
  std::vector<float> values(idx(model.parameters()[i].count));
  model.get_parameter(i, values.data());
  return values;
}

// One step of AdamW with a clipped gradient; the mean loss before it.
inline double train_step(Model& model, const Batch& batch, const LossRows& rows, int64_t step) {
  std::vector<float> losses(rows.rows.size());
  model.zero_gradients();
  model.loss_and_gradients(batch, rows, {}, losses.data());
  AdamWStep adamw;
  adamw.learning_rate = 3e-3f;
  adamw.step = step;
  adamw.gradient_scale = static_cast<float>(1 / (1 + std::sqrt(model.gradient_sum_of_squares())));
  model.adamw(adamw, 0.1f);
  double sum = 0;
  for (const float x : losses) sum += static_cast<double>(x);
  return sum / static_cast<double>(losses.size());
}

// Larger weights than GPT-2's at the start, so that attention is not flat and every gradient matters.
inline void fill(Model& model) {
  for (size_t i = 0; i < model.parameters().size(); ++i) {
    const Parameter& p = model.parameters()[i];
    std::vector<float> values = random_values(p.count, 100 + i, p.is_matrix ? 0.15f : 0.1f);
    if (p.name.find("ln") != std::string::npos && p.name.find("weight") != std::string::npos)
      for (float& x : values) x += 1;
    model.set_parameter(i, values.data());
  }
}

}  // namespace dn::cuda_test
