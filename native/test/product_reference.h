// What the tests of matrix products share: operands, the product in fp64 and as a plain fp32 loop, and the
// error that is allowed against them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "cpu/ops.h"
#include "test/check.h"
#include "test/instruction_sets.h"
#include "test/same_bits.h"

namespace dn::test::products {

using namespace dn::cpu;

constexpr double kEps = 1.0 / (1 << 23);

// Uniform numbers in [-1, 1), the same on every run.
class Numbers {
 public:
  explicit Numbers(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u + 1) {}
  uint64_t next() {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return state_;
  }
  int64_t between(int64_t low, int64_t high) {
    return low + static_cast<int64_t>((next() >> 20) % static_cast<uint64_t>(high - low + 1));
  }
  std::vector<float> vector(int64_t n) {
    std::vector<float> v(static_cast<size_t>(n));
    for (float& x : v) x = static_cast<float>(static_cast<double>(next() >> 11) / (uint64_t{1} << 52) - 1.0);
    return v;
  }

 private:
  uint64_t state_;
};

inline std::vector<Isa> isas() { return instruction_sets(); }

inline Tensor matrix(std::vector<float>& v, int64_t rows, int64_t cols) {
  return Tensor(v.data(), Dtype::kF32, rows, cols);
}

inline Weight weight(const std::vector<float>& v, WeightOrder order, int64_t K, int64_t N,
                     bool packed = false) {
  Weight w;
  w.data = v.data();
  w.order = order;
  w.packed = packed;
  w.K = K;
  w.N = N;
  return w;
}

template <typename T>
std::vector<T> transposed(const std::vector<T>& v, int64_t rows, int64_t cols) {
  std::vector<T> t(v.size());
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < cols; ++c)
      t[static_cast<size_t>(c * rows + r)] = v[static_cast<size_t>(r * cols + c)];
  }
  return t;
}

inline float to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  bits = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u;
  std::memcpy(&x, &bits, 4);
  return x;
}

// c (M, N) = a (M, K) b (K, N), in fp64 and as a plain fp32 loop.
struct Reference {
  std::vector<double> exact;
  std::vector<float> naive;
};

inline Reference reference(const std::vector<float>& a, const std::vector<float>& b, int64_t M, int64_t N,
                           int64_t K) {
  Reference ref{std::vector<double>(static_cast<size_t>(M * N)),
                std::vector<float>(static_cast<size_t>(M * N))};
  for (int64_t m = 0; m < M; ++m) {
    double* exact = ref.exact.data() + m * N;
    float* naive = ref.naive.data() + m * N;
    for (int64_t k = 0; k < K; ++k) {
      const float x = a[static_cast<size_t>(m * K + k)];
      const float* row = b.data() + k * N;
      for (int64_t n = 0; n < N; ++n) {
        exact[n] += static_cast<double>(x) * row[n];
        naive[n] += x * row[n];
      }
    }
  }
  return ref;
}

inline Reference transposed(const Reference& ref, int64_t rows, int64_t cols) {
  return {transposed(ref.exact, rows, cols), transposed(ref.naive, rows, cols)};
}

inline double worst(const std::vector<double>& exact, const float* got) {
  return max_difference(exact.data(), got, static_cast<int64_t>(exact.size())).max;
}

inline double scale(const std::vector<double>& exact) {
  double s = 0;
  for (const double x : exact) s = std::max(s, std::fabs(x));
  return s;
}

// The error may be twice that of the plain loop, and a rounding of the largest element.
inline void check_product(const Reference& ref, const std::vector<float>& got, const std::string& what) {
  const double allowed = 2 * worst(ref.exact, ref.naive.data()) + kEps * scale(ref.exact);
  CHECK_CLOSE(ref.exact.data(), got.data(), static_cast<int64_t>(got.size()), allowed, what);
}

using test::same_bits;

inline std::string label(Isa isa, int64_t M, int64_t N, int64_t K) {
  return std::string(isa_name(isa)) + " M=" + std::to_string(M) + " N=" + std::to_string(N) +
         " K=" + std::to_string(K);
}

}  // namespace dn::test::products
