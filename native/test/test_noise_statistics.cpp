// The forward process as a distribution: times, and the exact oracles of masked diffusion (enumerated
// likelihood bound, E[(1/t) |M| / N] = 1, uniformity of exact counts).
#include <algorithm>
#include <cmath>
#include <map>
#include <string>
#include <vector>

#include "core/noise.h"
#include "core/rng.h"
#include "test/check.h"
#include "test/noise_batches.h"

namespace {

using namespace dn;
using dn::test::CleanTokens;
using dn::test::Moments;
using dn::test::noise_options;
using Ids = std::vector<int32_t>;

// An arbitrary "cross-entropy" of token i when the set S (bits) is masked.
double fake_loss(uint32_t S, int i) {
  return 1.0 + 3.0 * uniform(99, Stream::kData, S, static_cast<uint64_t>(i));
}

}  // namespace

DN_TEST(noise_times_have_their_distribution) {
  const CleanTokens clean(std::vector<Ids>(64, Ids{1, 2}));
  NoiseOptions options = noise_options();
  options.t_min = 0.3;
  options.t_max = 0.8;
  Moments t;
  double least = 1, most = 0;
  for (options.step = 0; options.step < 500; ++options.step) {
    for (const double value : corrupt(clean.view(), options).t) {
      t.add(value);
      least = std::min(least, value);
      most = std::max(most, value);
    }
  }
  CHECK(least >= 0.3 && least < 0.301 && most <= 0.8 && most > 0.799);
  CHECK_MSG(t.within(0.55, 3), "mean time " + std::to_string(t.mean()));
  CHECK(std::fabs(t.variance() - 0.25 / 12) < 5e-4);

  options.time_sampler = TimeSampler::kStratified;
  double first_sum = 0;
  for (options.step = 0; options.step < 100; ++options.step) {
    std::vector<int> cells(64, 0);
    const NoisyBatch noisy = corrupt(clean.view(), options);
    for (const double value : noisy.t) ++cells[static_cast<size_t>(std::min(63.0, (value - 0.3) / 0.5 * 64))];
    CHECK_MSG(cells == std::vector<int>(64, 1), "not one time per stratum");
    first_sum += noisy.t[0];
  }
  CHECK(std::fabs(first_sum / 100 - 0.55) < 0.05);  // each single time is still uniform
}

// Uniform predictions cost ln V per token, so a step's loss is ln V exactly in expectation: E[(1/t) |M| / N]
// = 1.
DN_TEST(noise_weights_have_mean_one) {
  const CleanTokens clean(std::vector<Ids>(64, Ids{1, 2, 3, 4, 5, 6, 7, 8, 9}));
  NoiseOptions options = noise_options();
  for (const bool shift : {true, false}) {
    for (const TimeSampler sampler :
         {TimeSampler::kUniform, TimeSampler::kStratified, TimeSampler::kExactCount}) {
      options.shift = shift;
      options.time_sampler = sampler;
      for (const Normalise normalise : {Normalise::kTokens, Normalise::kAnswer}) {
        options.normalise = normalise;
        Moments ratio;
        for (options.step = 0; options.step < 400; ++options.step) {
          const NoisyBatch noisy = corrupt(clean.view(), options);
          double sum = 0;
          for (const float weight : noisy.rows.weights) sum += weight;
          ratio.add(sum / noisy.denominator);
        }
        // With exact counts every step gives exactly 1.
        CHECK_MSG(
            sampler == TimeSampler::kExactCount ? std::fabs(ratio.mean() - 1) < 1e-5 : ratio.within(1, 3),
            "mean weight " + std::to_string(ratio.mean()));
      }
    }
  }
}

// The bound enumerated over all masks, sum_S w(|S|) sum_{i in S} loss_i(S) with w(k) = (k-1)! (L-k)! / L!,
// against Monte Carlo with every sampler: the Bernoulli and the exact-count form estimate the same number.
DN_TEST(noise_estimates_the_enumerated_bound) {
  constexpr int L = 5;
  double exact = 0;
  for (uint32_t S = 1; S < (1u << L); ++S) {
    int k = 0;
    for (int i = 0; i < L; ++i) k += (S >> i) & 1;
    const double w = std::tgamma(k) * std::tgamma(L - k + 1) / std::tgamma(L + 1);
    for (int i = 0; i < L; ++i) exact += ((S >> i) & 1) != 0 ? w * fake_loss(S, i) : 0;
  }
  const CleanTokens clean(std::vector<Ids>(256, Ids{0, 1, 2, 3, 4}));
  NoiseOptions options = noise_options();
  options.shift = false;
  options.t_min = 1e-6;
  for (const TimeSampler sampler :
       {TimeSampler::kUniform, TimeSampler::kStratified, TimeSampler::kExactCount}) {
    options.time_sampler = sampler;
    Moments estimate;
    for (options.step = 0; options.step < 200; ++options.step) {
      const NoisyBatch noisy = corrupt(clean.view(), options);
      double sum = 0;
      for (size_t r = 0; r < noisy.rows.rows.size(); ++r) {
        const int64_t s = noisy.rows.rows[r] / L;
        uint32_t S = 0;
        for (int i = 0; i < L; ++i) S |= static_cast<uint32_t>(noisy.mask[s * L + i]) << i;
        sum += noisy.rows.weights[r] * fake_loss(S, noisy.rows.targets[r]);
      }
      estimate.add(sum / 256);
    }
    CHECK_MSG(estimate.within(exact, 3),
              "estimate " + std::to_string(estimate.mean()) + ", enumerated " + std::to_string(exact));
  }
}

DN_TEST(noise_exact_counts_are_uniform) {
  // Four predictable tokens among six: token 0 has no row under the shift, token 2 belongs to a prompt.
  CleanTokens clean(std::vector<Ids>(1000, Ids{1, 2, 3, 4, 5, 6}));
  for (int s = 0; s < 1000; ++s) clean.maskable.insert(clean.maskable.end(), {1, 1, 0, 1, 1, 1});
  NoiseOptions options = noise_options();
  options.time_sampler = TimeSampler::kExactCount;
  std::map<uint32_t, int> subsets;
  for (options.step = 0; options.step < 30; ++options.step) {
    const NoisyBatch noisy = corrupt(clean.view(), options);
    size_t row = 0;
    for (int64_t s = 0; s < 1000; ++s) {
      uint32_t S = 0;
      int m = 0;
      for (int i = 0; i < 6; ++i) {
        S |= static_cast<uint32_t>(noisy.mask[s * 6 + i]) << i;
        m += noisy.mask[s * 6 + i];
      }
      ++subsets[S];
      CHECK((S & 0b000101) == 0 && m >= 1 && noisy.t[s] == m / 4.0);
      for (int j = 0; j < m; ++j) CHECK(noisy.rows.weights[row++] == static_cast<float>(4.0 / m));
    }
    CHECK(row == noisy.rows.rows.size());
  }
  // 1/4 for each size, spread evenly over the subsets of that size. 14 degrees of freedom: 36.1 is the 0.1 %
  // point.
  const double choose[5] = {1, 4, 6, 4, 1};
  double chi_square = 0;
  CHECK(subsets.size() == 15);
  for (const auto& [S, count] : subsets) {
    int m = 0;
    for (int i = 0; i < 6; ++i) m += (S >> i) & 1;
    const double expected = 30000 / (4 * choose[m]);
    chi_square += (count - expected) * (count - expected) / expected;
  }
  CHECK_MSG(chi_square < 36.1, "chi-square " + std::to_string(chi_square));
}
