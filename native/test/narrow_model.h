// What tests of models with narrow weights (bf16, int8) share: a batch, the same parameters in two models,
// and the distance of their results.
#pragma once

#include <cmath>
#include <vector>

#include "core/model.h"
#include "test/model_logits.h"
#include "test/product_reference.h"

namespace dn::test::narrow {

using inference::forward_logits;

inline Batch one_sequence(int64_t T, int32_t vocab, uint64_t seed) {
  products::Numbers numbers(seed);
  Batch batch;
  for (int64_t i = 0; i < T; ++i) {
    batch.ids.push_back(static_cast<int32_t>(numbers.between(0, vocab - 1)));
    batch.positions.push_back(static_cast<int32_t>(i));
  }
  Sequence sequence;
  sequence.end = T;
  batch.sequences.push_back(sequence);
  return batch;
}

// The same values in a model that may hold them in another type.
inline void copy_parameters(Model& to, Model& from) {
  std::vector<float> values;
  for (size_t i = 0; i < from.parameters().size(); ++i) {
    values.resize(static_cast<size_t>(from.parameters()[i].count));
    from.get_parameter(i, values.data());
    to.set_parameter(i, values.data());
  }
}

// Root mean square of the difference over that of the reference.
inline double relative_error(const std::vector<float>& got, const std::vector<float>& expected) {
  double error = 0, size = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    const double d = static_cast<double>(got[i]) - static_cast<double>(expected[i]);
    error += d * d;
    size += static_cast<double>(expected[i]) * static_cast<double>(expected[i]);
  }
  return std::sqrt(error / size);
}

}  // namespace dn::test::narrow
