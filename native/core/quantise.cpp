// Quantisation of weights in plain order. Loops run along memory and free of branches, so that a compiler
// turns them into whatever vectors the machine has; rounding does not depend on them.

#include "core/quantise.h"

#include <algorithm>
#include <vector>

#include "core/half.h"

namespace dn {
namespace {

constexpr uint32_t kMagnitude = 0x7FFFFFFFu;
constexpr uint32_t kInfinite = 0x7F800000u;

int8_t round_to_int8(float x) {
  return static_cast<int8_t>(float_bits(x + kRoundingShift) - float_bits(kRoundingShift));
}

float scale_of(float most) { return most >= kInt8Least ? most / kInt8Most : 0.0f; }
float inverse_of(float most) { return most >= kInt8Least ? kInt8Most / most : 0.0f; }

}  // namespace

// Magnitudes are compared as integers: the order is that of the numbers, with infinity and NaN above all.
bool quantise(const Int8Matrix& out, const float* values) {
  const int64_t K = out.K, N = out.N;
  std::vector<uint32_t> most(static_cast<size_t>(N), 0u);
  uint32_t overall = 0;
  if (out.order == WeightOrder::kOutIn) {
    for (int64_t n = 0; n < N; ++n) {
      const float* const row = values + n * K;
      uint32_t m = 0;
      for (int64_t k = 0; k < K; ++k) m = std::max(m, float_bits(row[k]) & kMagnitude);
      most[static_cast<size_t>(n)] = m;
      overall = std::max(overall, m);
    }
  } else {
    uint32_t* const m = most.data();
    for (int64_t k = 0; k < K; ++k) {
      const float* const row = values + k * N;
      for (int64_t n = 0; n < N; ++n) m[n] = std::max(m[n], float_bits(row[n]) & kMagnitude);
    }
    for (int64_t n = 0; n < N; ++n) overall = std::max(overall, m[n]);
  }
  if (overall >= kInfinite) return false;

  std::vector<float> inverse(static_cast<size_t>(N));
  for (int64_t n = 0; n < N; ++n) {
    const float largest = bits_float(most[static_cast<size_t>(n)]);
    out.scales[n] = scale_of(largest);
    inverse[static_cast<size_t>(n)] = inverse_of(largest);
  }
  if (out.order == WeightOrder::kOutIn) {
    for (int64_t n = 0; n < N; ++n) {
      const float factor = inverse[static_cast<size_t>(n)];
      const float* const row = values + n * K;
      int8_t* const q = out.values + n * K;
      for (int64_t k = 0; k < K; ++k) q[k] = round_to_int8(row[k] * factor);
    }
  } else {
    const float* const factors = inverse.data();
    for (int64_t k = 0; k < K; ++k) {
      const float* const row = values + k * N;
      int8_t* const q = out.values + k * N;
      for (int64_t n = 0; n < N; ++n) q[n] = round_to_int8(row[n] * factors[n]);
    }
  }
  return true;
}

void dequantise(float* values, const Int8Matrix& matrix) {
  const int64_t K = matrix.K, N = matrix.N;
  const float* const scales = matrix.scales;
  if (matrix.order == WeightOrder::kOutIn) {
    for (int64_t n = 0; n < N; ++n) {
      const int8_t* const q = matrix.values + n * K;
      for (int64_t k = 0; k < K; ++k) values[n * K + k] = static_cast<float>(q[k]) * scales[n];
    }
  } else {
    for (int64_t k = 0; k < K; ++k) {
      const int8_t* const q = matrix.values + k * N;
      for (int64_t n = 0; n < N; ++n) values[k * N + n] = static_cast<float>(q[n]) * scales[n];
    }
  }
}

}  // namespace dn
