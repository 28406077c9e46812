// What the tests of row and element ops share: the instruction sets that have such kernels, values, tensors
// of them, and comparison of bits.
#pragma once

#include <cstring>
#include <limits>
#include <vector>

#include "core/rng.h"
#include "cpu/ops.h"

namespace dn::test::rows {

using namespace dn::cpu;

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

inline std::vector<Isa> isas() {
  std::vector<Isa> list{Isa::kPortable};
  if (detected_isa() >= Isa::kAvx2) list.push_back(Isa::kAvx2);
  if (detected_isa() >= Isa::kAvx512) list.push_back(Isa::kAvx512);
  return list;
}

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

inline bool same_bits(const Floats& a, const Floats& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

}  // namespace dn::test::rows
