// What tests of a denoising step's draws share: denoise_row on copies of one row of logits, the distribution
// that a row asks for, and logits and options made up for it.
#pragma once

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "core/backend.h"
#include "core/rng.h"
#include "cpu/head_kernels.h"
#include "test/check.h"
#include "test/instruction_sets.h"

namespace dn::test::sampling {

using cpu::Isa;

inline std::vector<Isa> isas() { return test::instruction_sets(Isa::kAvx512); }

// Drives denoise_row on copies of one row of logits.
class Row {
 public:
  Row(Isa isa, std::vector<float> logits, std::vector<float> guide = {})
      : kernels_(cpu::head_kernels(isa)),
        logits_(std::move(logits)),
        guide_(std::move(guide)),
        scratch_(logits_.size()),
        memory_(static_cast<size_t>(cpu::denoise_workspace_floats(V())) + 16) {
    workspace_ = memory_.data();
    while (reinterpret_cast<uintptr_t>(workspace_) % 64 != 0) ++workspace_;
  }
  int64_t V() const { return static_cast<int64_t>(logits_.size()); }

  DenoiseStats denoise(const DenoiseRow& row) {
    std::copy(logits_.begin(), logits_.end(), scratch_.begin());
    DenoiseStats stats;
    CHECK(denoise_fault(row, V()).empty());
    const int64_t bad =
        cpu::denoise_row(&stats, nullptr, scratch_.data(), guide_.empty() ? nullptr : guide_.data(), V(), row,
                         nullptr, 0, workspace_, kernels_);
    CHECK(bad == -1);
    return stats;
  }
  // Counts of each id over `draws` positions and seeds.
  std::vector<int64_t> counts(DenoiseRow row, int64_t draws) {
    std::vector<int64_t> n(logits_.size(), 0);
    for (int64_t i = 0; i < draws; ++i) {
      row.seed = static_cast<uint64_t>(i / 5000);
      row.step = static_cast<uint32_t>(i / 100 % 50);
      row.position = static_cast<uint32_t>(i % 100);
      ++n[static_cast<size_t>(denoise(row).drawn)];
    }
    return n;
  }

 private:
  const cpu::HeadKernels& kernels_;
  std::vector<float> logits_, guide_, scratch_, memory_;
  float* workspace_ = nullptr;
};

// The distribution that `row` asks for, by sorting, in double (docs/numerics.md, Sampling: temperature,
// nucleus, top-k).
inline std::vector<double> expected_distribution(const std::vector<float>& logits,
                                                 const std::vector<float>& guide, const DenoiseRow& row) {
  const size_t V = logits.size();
  std::vector<double> l(V), p(V);
  std::vector<size_t> order(V);
  for (size_t v = 0; v < V; ++v) {
    l[v] = static_cast<double>(logits[v]);
    if (!guide.empty()) {
      const double u = static_cast<double>(guide[v]);
      l[v] = u + (static_cast<double>(row.guidance) + 1) * (l[v] - u);
    }
    if (static_cast<int64_t>(v) == row.banned) l[v] = -HUGE_VAL;
    order[v] = v;
  }
  std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return l[a] > l[b]; });
  double total = 0;
  for (size_t v = 0; v < V; ++v)
    total += p[v] = std::exp((l[v] - l[order[0]]) / static_cast<double>(row.temperature));
  double preceding = 0, kept = 0;
  for (size_t i = 0; i < V; ++i) {
    double& mass = p[order[i]];
    const bool in_nucleus = row.top_p >= 1 || i == 0 || preceding <= static_cast<double>(row.top_p) * total;
    const bool in_top = row.top_k == 0 || i < static_cast<size_t>(row.top_k) ||
                        l[order[i]] == l[order[static_cast<size_t>(row.top_k) - 1]];
    preceding += mass;
    if (!in_nucleus || !in_top) mass = 0;
    kept += mass;
  }
  for (double& mass : p) mass /= kept;
  return p;
}

// Uneven logits of a row: spread about 4 nats.
inline std::vector<float> made_up_logits(int64_t V, uint64_t seed) {
  std::vector<float> l;
  for (int64_t v = 0; v < V; ++v) {
    l.push_back(static_cast<float>(4 * uniform(seed, Stream::kInit, 1, static_cast<uint64_t>(v)) - 11));
  }
  return l;
}

inline DenoiseRow options(float temperature, float top_p = 1, int32_t top_k = 0, int32_t banned = -1,
                          float guidance = 0) {
  DenoiseRow row;
  row.temperature = temperature;
  row.top_p = top_p;
  row.top_k = top_k;
  row.banned = banned;
  row.guidance = guidance;
  return row;
}

}  // namespace dn::test::sampling
