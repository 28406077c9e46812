// What tests of the head share: hidden states and an embedding with their logits in fp64, the vocabularies
// and instruction sets to try them with, and comparison of bits.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "core/backend.h"
#include "core/rng.h"
#include "cpu/isa.h"
#include "test/check.h"
#include "test/instruction_sets.h"
#include "test/same_bits.h"

namespace dn::test::head {

using cpu::Isa;

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

using test::instruction_sets;

// Under the sanitizers only the fastest kernels meet a real vocabulary; what is special to the others is in
// the tails of small ones.
inline bool is_left_out(Isa isa, int64_t V) {
  return dn::test::kSanitized && V == 50257 && isa != cpu::detected_isa();
}

// n numbers, uniform in (-scale, scale).
inline std::vector<float> noise(int64_t n, float scale, uint64_t seed) {
  std::vector<float> x(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) {
    x[static_cast<size_t>(i)] =
        scale * static_cast<float>(2 * uniform(seed, Stream::kInit, 0, static_cast<uint64_t>(i)) - 1);
  }
  return x;
}

inline Tensor tensor(std::vector<float>& x, int64_t cols) {
  return Tensor(x.data(), Dtype::kF32, static_cast<int64_t>(x.size()) / cols, cols);
}

// hidden (N, C) and wte (V, C) whose logits have a standard deviation of about 2.
struct Problem {
  int64_t N, C, V;
  std::vector<float> hidden, wte;

  Problem(int64_t n, int64_t c, int64_t v, uint64_t seed = 7)
      : N(n),
        C(c),
        V(v),
        hidden(noise(n * c, 3.0f, seed)),
        wte(noise(v * c, 2.0f / std::sqrt(static_cast<float>(c)), seed + 1)) {}

  Weight weight() const {
    Weight w;
    w.data = wte.data();
    w.order = WeightOrder::kOutIn;
    w.K = C;
    w.N = V;
    return w;
  }
  Tensor inputs() { return tensor(hidden, C); }
  std::vector<double> logits(int64_t row) const {
    std::vector<double> l(static_cast<size_t>(V));
    for (int64_t v = 0; v < V; ++v) {
      double sum = 0;
      for (int64_t c = 0; c < C; ++c)
        sum += static_cast<double>(hidden[row * C + c]) * static_cast<double>(wte[v * C + c]);
      l[static_cast<size_t>(v)] = sum;
    }
    return l;
  }
};

inline std::vector<double> softmax(const std::vector<double>& logits) {
  const double max = *std::max_element(logits.begin(), logits.end());
  std::vector<double> p;
  double total = 0;
  for (const double l : logits) total += std::exp(l - max);
  for (const double l : logits) p.push_back(std::exp(l - max) / total);
  return p;
}

using test::same_bits;

const int64_t kVocabularies[] = {1, 2, 17, 257, 1000, 50257};

inline std::string label(const char* what, Isa isa, int64_t V) {
  return std::string(what) + ", " + cpu::isa_name(isa) + ", V = " + std::to_string(V);
}

}  // namespace dn::test::head
