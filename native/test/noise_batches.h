// What the noise tests share: a batch that owns its arrays, default options, and the moments of a Monte Carlo
// estimate.
#pragma once

#include <cmath>
#include <vector>

#include "core/noise.h"
#include "test/check.h"

namespace dn::test {

struct CleanTokens {
  std::vector<int32_t> ids;
  std::vector<int64_t> offsets{0};
  std::vector<uint8_t> maskable, mask;  // empty: not given
  std::vector<double> t;

  explicit CleanTokens(const std::vector<std::vector<int32_t>>& sequences) {
    for (const auto& sequence : sequences) {
      ids.insert(ids.end(), sequence.begin(), sequence.end());
      offsets.push_back(static_cast<int64_t>(ids.size()));
    }
  }

  CleanBatch view() const {
    CleanBatch batch;
    batch.ids = ids.data();
    batch.offsets = offsets.data();
    batch.S = static_cast<int64_t>(offsets.size()) - 1;
    batch.maskable = maskable.empty() ? nullptr : maskable.data();
    batch.mask = mask.empty() ? nullptr : mask.data();
    batch.t = t.empty() ? nullptr : t.data();
    return batch;
  }
};

inline NoiseOptions noise_options() {
  NoiseOptions options;
  options.mask_id = 50;
  options.seed = 12345;
  return options;
}

struct Moments {
  double n = 0, sum = 0, squares = 0;
  void add(double x) {
    n += 1;
    sum += x;
    squares += x * x;
  }
  double mean() const { return sum / n; }
  double variance() const { return squares / n - mean() * mean(); }
  // The mean lies within so many standard errors of `expected`.
  bool within(double expected, double errors) const {
    return std::fabs(mean() - expected) <= errors * std::sqrt(variance() / n);
  }
};

}  // namespace dn::test
