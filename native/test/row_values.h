// What the tests of row and element ops share: the instruction sets that have such kernels, values, tensors
// of them, and comparison of bits.
#pragma once

#include <limits>
#include <vector>

#include "core/rng.h"
#include "cpu/ops.h"
#include "test/instruction_sets.h"
#include "test/same_bits.h"

namespace dn::test::rows {

using namespace dn::cpu;

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

inline std::vector<Isa> isas() { return instruction_sets(Isa::kAvx512); }

using Floats = std::vector<float>;

// Uniform in [-2, 2).
inline Floats random_values(int64_t n, uint64_t seed) {
  Floats x(static_cast<size_t>(n));
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(4 * uniform(seed, Stream::kInit, 0, i) - 2);
  return x;
}

inline Tensor tensor(Floats& x, int64_t rows, int64_t cols) {
  return Tensor(x.data(), Dtype::kF32, rows, cols);
}

using test::same_bits;

}  // namespace dn::test::rows
