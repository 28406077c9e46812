// What tests of the model at inference share: the logits of a forward pass, comparison of bits, and masks.
#pragma once

#include <cstring>
#include <vector>

#include "core/model.h"
#include "test/same_bits.h"

namespace dn::test::inference {

inline std::vector<float> all_logits(Model& model) {
  const int64_t R = model.hidden().rows;
  std::vector<int64_t> rows;
  for (int64_t r = 0; r < R; ++r) rows.push_back(r);
  std::vector<float> out(static_cast<size_t>(R * model.config().vocab));
  model.logits(out.data(), rows.data(), R);
  return out;
}

inline std::vector<float> forward_logits(Model& model, const Batch& batch,
                                         const std::vector<int64_t>& rows = {}) {
  model.forward(batch, rows);
  return all_logits(model);
}

inline bool same_bits(const float* a, const float* b, size_t n) {
  return std::memcmp(a, b, n * sizeof(float)) == 0;
}
using test::same_bits;

inline AttentionMask mask_of(MaskKind kind, int32_t block = 1) {
  AttentionMask mask;
  mask.kind = kind;
  mask.block = block;
  return mask;
}

}  // namespace dn::test::inference
