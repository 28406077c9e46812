// What tests of int8 share: numbers, a weight in plain order with scales, aligned memory, and the
// quantisation of a row and the product in integers, written once more.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "core/backend.h"
#include "test/same_bits.h"

namespace dn::test::int8 {

class Numbers {
 public:
  explicit Numbers(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u + 1) {}
  uint64_t next() {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return state_;
  }
  std::vector<float> floats(int64_t n, float scale = 1) {
    std::vector<float> v(static_cast<size_t>(n));
    for (float& x : v)
      x = scale * static_cast<float>(static_cast<double>(next() >> 11) / (uint64_t{1} << 52) - 1.0);
    return v;
  }
  // -127 .. 127; one in eight an extreme, where saturating instructions would be found out.
  int8_t int8() {
    const uint64_t bits = next() >> 20;
    if (bits % 8 == 0) return bits % 16 == 0 ? 127 : -127;
    return static_cast<int8_t>(static_cast<int64_t>(bits / 8 % 255) - 127);
  }

 private:
  uint64_t state_;
};

// A weight in plain order with scales of its own.
struct Plain {
  std::vector<int8_t> values;
  std::vector<float> scales;
  Int8Matrix matrix;

  Plain(WeightOrder order, int64_t K, int64_t N) : values(static_cast<size_t>(K * N)) {
    scales.resize(static_cast<size_t>(N));
    matrix = {values.data(), scales.data(), order, K, N};
  }
  Plain(const Plain&) = delete;
  int8_t at(int64_t k, int64_t n) const {
    return values[static_cast<size_t>(matrix.order == WeightOrder::kOutIn ? n * matrix.K + k
                                                                          : k * matrix.N + n)];
  }
};

inline void fill(Plain& w, Numbers& numbers) {
  for (int8_t& v : w.values) v = numbers.int8();
  for (float& s : w.scales) s = 1e-3f + static_cast<float>(numbers.next() % 1000) * 1e-5f;
}

struct Aligned {
  explicit Aligned(int64_t bytes) : storage(static_cast<size_t>(bytes) + 64, 0x55) {}
  void* data() {
    return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(storage.data()) + 63) / 64 * 64);
  }
  std::vector<uint8_t> storage;
};

// The rule of cpu/gemm_int8_kernels.h, written again: q and the scale of a row.
inline float quantised(const float* x, int64_t K, std::vector<int32_t>* q) {
  float most = 0;
  for (int64_t k = 0; k < K; ++k) most = std::max(most, std::fabs(x[k]));
  q->assign(static_cast<size_t>(K), 0);
  if (most < 0x1p-100f) return 0;
  const float inverse = 127.0f / most;
  for (int64_t k = 0; k < K; ++k)
    (*q)[static_cast<size_t>(k)] = static_cast<int32_t>(std::nearbyint(x[k] * inverse));
  return most / 127.0f;
}

inline std::vector<float> reference(const std::vector<float>& a, const Plain& w, int64_t M) {
  const int64_t K = w.matrix.K, N = w.matrix.N;
  std::vector<float> c(static_cast<size_t>(M * N));
  std::vector<int32_t> q;
  for (int64_t m = 0; m < M; ++m) {
    const float scale = quantised(a.data() + m * K, K, &q);
    for (int64_t n = 0; n < N; ++n) {
      int64_t sum = 0;
      for (int64_t k = 0; k < K; ++k) sum += static_cast<int64_t>(q[static_cast<size_t>(k)]) * w.at(k, n);
      c[static_cast<size_t>(m * N + n)] =
          static_cast<float>(static_cast<int32_t>(sum)) * scale * w.scales[static_cast<size_t>(n)];
    }
  }
  return c;
}

using test::same_bits;

}  // namespace dn::test::int8
