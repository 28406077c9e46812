// Block diffusion (rows of the doubled sequence, one time per block, clipped schedules) and the spindle
// schedule (mask probability and weight against the definition and its numerical derivative).
#include <algorithm>
#include <cmath>
#include <string>

#include "core/error.h"
#include "core/noise.h"
#include "test/noise_batches.h"

namespace {

using namespace dn;
using dn::test::CleanTokens;
using dn::test::Moments;
using dn::test::noise_options;
using Rows = std::vector<int64_t>;
using Ids = std::vector<int32_t>;
using Weights = std::vector<float>;

NoiseOptions block_options(int32_t block) {
  NoiseOptions options = noise_options();
  options.objective = Objective::kBlockDiffusion;
  options.block = block;
  return options;
}

// The probability that a token of information H is still visible at time t, straight from the definition.
double keep_probability(double t, double lambda, double mean, double H) {
  const double abar = 1 - t - lambda * std::sin(std::acos(-1.0) * t) * (1 - mean / H);
  return std::min(1.0, std::max(0.0, abar));
}

}  // namespace

DN_TEST(noise_block_diffusion_rows_by_hand) {
  // Blocks {10 11} {12 13} {14} and {20 21} {22}. Packed: noisy 0-4, clean 5-9; noisy 10-12, clean 13-15.
  CleanTokens clean({{10, 11, 12, 13, 14}, {20, 21, 22}});
  clean.mask = {1, 1, 1, 1, 1, 0, 1, 1};
  clean.t = {0.5, 0.25};
  NoiseOptions options = block_options(2);
  const NoisyBatch noisy = corrupt(clean.view(), options);
  CHECK((noisy.batch.ids == Ids{50, 50, 50, 50, 50, 10, 11, 12, 13, 14, 20, 50, 50, 20, 21, 22}));
  CHECK((noisy.batch.positions == Ids{0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2}));
  CHECK((noisy.batch.mask_positions == Ids{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 3, 4, 5}));
  const Sequence& second = noisy.batch.sequences[1];
  CHECK(second.begin == 10 && second.end == 16 && second.k_len == 6);
  CHECK(second.mask.kind == MaskKind::kBlockDiffusion && second.mask.half == 3 && second.mask.block == 2);
  // 11 from noisy row 0; 12 from the clean 11 (row 6); 13 from noisy row 2; 14 from the clean 13 (row 8); ...
  CHECK((noisy.rows.rows == Rows{0, 6, 2, 8, 10, 14}));
  CHECK((noisy.rows.targets == Ids{11, 12, 13, 14, 21, 22}));
  CHECK((noisy.rows.weights == Weights{2, 2, 2, 2, 4, 4}));
  CHECK((noisy.t == std::vector<double>{0.5, 0.5, 0.5, 0.25, 0.25}));
  CHECK(noisy.mask == clean.mask && noisy.predictable == 6 && noisy.denominator == 6);

  options.shift = false;
  const NoisyBatch aligned = corrupt(clean.view(), options);
  CHECK((aligned.rows.rows == Rows{0, 1, 2, 3, 4, 11, 12}));
  CHECK((aligned.rows.targets == Ids{10, 11, 12, 13, 14, 21, 22}) && aligned.predictable == 8);
}

// No loss row may see its answer: visible clean tokens lie before the target's block, and the noisy target is
// masked.
DN_TEST(noise_block_diffusion_leaks_nothing) {
  const CleanTokens clean({{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11}, {12, 13, 14}});
  for (const int32_t block : {1, 2, 3, 4, 11, 20}) {
    for (const bool shift : {true, false}) {
      NoiseOptions options = block_options(block);
      options.shift = shift;
      int64_t rows = 0;
      for (options.step = 0; options.step < 20; ++options.step) {
        const NoisyBatch noisy = corrupt(clean.view(), options);
        for (size_t r = 0; r < noisy.rows.rows.size(); ++r, ++rows) {
          const int64_t row = noisy.rows.rows[r];
          const Sequence& sequence = noisy.batch.sequences[row >= noisy.batch.sequences[1].begin ? 1 : 0];
          const int32_t first =
              noisy.batch.ids[sequence.begin + sequence.mask.half];  // clean tokens count up from here
          const int32_t i = noisy.rows.targets[r] - first;
          const int32_t q = noisy.batch.mask_positions[row];
          CHECK(noisy.batch.ids[sequence.begin + i] == options.mask_id);
          for (int32_t k = 0; k < sequence.k_len; ++k) {
            if (!visible(sequence.mask, q, k)) continue;
            if (k >= sequence.mask.half) CHECK((k - sequence.mask.half) / block < i / block);
          }
          // Everything before the block is seen, which is what decoding with a cache offers.
          for (int32_t k = 0; k < i / block * block; ++k)
            CHECK(visible(sequence.mask, q, sequence.mask.half + k));
        }
      }
      CHECK(rows > 50);
    }
  }
}

DN_TEST(noise_block_diffusion_times) {
  const CleanTokens clean(std::vector<Ids>(8, Ids{1, 2, 3, 4, 5, 6, 7, 8}));
  NoiseOptions options = block_options(2);
  // Four blocks in each of eight sequences: stratified times fall one in each of 32 strata.
  options.time_sampler = TimeSampler::kStratified;
  options.t_min = 1e-9;
  NoisyBatch noisy = corrupt(clean.view(), options);
  std::vector<int> cells(32, 0);
  for (const double t : noisy.t) ++cells[static_cast<size_t>(std::min(31.0, t * 32))];
  CHECK(cells == std::vector<int>(32, 1));

  options.time_sampler = TimeSampler::kUniform;
  options.t_min = 0.3;
  noisy = corrupt(clean.view(), options);
  CHECK(noisy.t.size() == 32 && noisy.t[0] != noisy.t[1]);
  size_t row = 0;
  for (size_t n = 0; n < 64; ++n) {
    if (noisy.mask[n] == 0 || n % 8 == 0) continue;
    CHECK(noisy.rows.weights[row++] == static_cast<float>(1 / noisy.t[n / 2]));
  }
  CHECK(row == noisy.rows.rows.size() && row > 10);

  // Clipped to heavy masking, the weight is the all-mask limit; ordinary diffusion keeps 1/t.
  options.t_min = 0.51;
  for (const float weight : corrupt(clean.view(), options).rows.weights) CHECK(weight == 1.0f);
  options.objective = Objective::kDiffusion;
  for (const float weight : corrupt(clean.view(), options).rows.weights) CHECK(weight > 1.0f);

  options.objective = Objective::kBlockDiffusion;
  options.time_sampler = TimeSampler::kExactCount;
  noisy = corrupt(clean.view(), options);
  for (size_t b = 0; b < 32; ++b) {
    const int predictable = b % 4 == 0 ? 1 : 2, masked = noisy.mask[2 * b] + noisy.mask[2 * b + 1];
    CHECK(masked >= 1 && noisy.t[b] == static_cast<double>(masked) / predictable);
  }
}

DN_TEST(noise_spindle_matches_its_definition) {
  // Information per id; all five tokens are maskable, so the mean is over them.
  CleanTokens clean(std::vector<Ids>(400, Ids{0, 1, 2, 3, 4}));
  NoiseOptions options = noise_options();
  options.shift = false;
  options.spindle_information = {1.0f, 2.0f, 4.0f, 8.0f, 12.0f};
  const double mean = 27.0 / 5;
  for (const double lambda : {0.0, 0.1, 0.3, 0.7}) {
    options.spindle_lambda = lambda;
    for (const double t : {0.05, 0.2, 0.41, 0.5, 0.77, 0.95, 1.0}) {
      clean.t.assign(400, t);
      int64_t masked[5] = {0, 0, 0, 0, 0};
      for (int repeat = 0; repeat < 10; ++repeat, ++options.step) {  // fresh draws for every case
        const NoisyBatch noisy = corrupt(clean.view(), options);
        for (size_t n = 0; n < noisy.mask.size(); ++n) masked[n % 5] += noisy.mask[n];
        for (size_t r = 0; r < noisy.rows.rows.size(); ++r) {
          const double H = options.spindle_information[noisy.rows.targets[r]];
          const auto keep = [&](double x) { return keep_probability(x, lambda, mean, H); };
          const double h = 1e-6;
          const double slope = t < 1 ? (keep(t + h) - keep(t - h)) / (2 * h) : (keep(1) - keep(1 - h)) / h;
          const double expected = -slope / (1 - keep(t));
          CHECK_MSG(std::fabs(noisy.rows.weights[r] - expected) < 1e-4 * (1 + expected),
                    "weight " + std::to_string(noisy.rows.weights[r]) + ", expected " +
                        std::to_string(expected) + " at t = " + std::to_string(t) +
                        ", H = " + std::to_string(H));
        }
      }
      for (int i = 0; i < 5; ++i) {
        const double p = 1 - keep_probability(t, lambda, mean, options.spindle_information[i]);
        const double error = 4 * std::sqrt(p * (1 - p) / 4000);
        CHECK_MSG(std::fabs(static_cast<double>(masked[i]) / 4000 - p) <= error,
                  "masked " + std::to_string(masked[i]) + " of 4000, probability " + std::to_string(p));
      }
    }
  }
}

// Each token's weight integrates to 1 over time, since its mask probability goes from 0 to 1, clamped or not.
DN_TEST(noise_spindle_weights_have_mean_one) {
  const CleanTokens clean(std::vector<Ids>(500, Ids{0, 1, 2}));
  NoiseOptions options = noise_options();
  options.shift = false;
  options.time_sampler = TimeSampler::kStratified;
  options.spindle_information = {1.0f, 5.0f, 9.0f};
  for (const double lambda : {0.05, 0.3, 0.9}) {
    options.spindle_lambda = lambda;
    Moments weight[3];
    for (options.step = 0; options.step < 200; ++options.step) {
      double sum[3] = {0, 0, 0};
      const NoisyBatch noisy = corrupt(clean.view(), options);
      for (size_t r = 0; r < noisy.rows.rows.size(); ++r) {
        CHECK(noisy.rows.weights[r] >= 0 && std::isfinite(noisy.rows.weights[r]));
        sum[noisy.rows.targets[r]] += noisy.rows.weights[r];
      }
      for (int i = 0; i < 3; ++i) weight[i].add(sum[i] / 500);
    }
    // 3 standard errors, and the floors at t and p of 1e-3 each.
    for (const Moments& w : weight) {
      CHECK_MSG(std::fabs(w.mean() - 1) < 3 * std::sqrt(w.variance() / w.n) + 5e-3,
                "lambda " + std::to_string(lambda) + ": mean weight " + std::to_string(w.mean()));
    }
  }
}

DN_TEST(noise_spindle_without_strength_is_linear) {
  const CleanTokens clean(std::vector<Ids>(20, Ids{0, 1, 2, 3}));
  NoiseOptions options = noise_options();
  const NoisyBatch linear = corrupt(clean.view(), options);
  options.spindle_information = {1, 2, 3, 4};
  const NoisyBatch spindle = corrupt(clean.view(), options);
  CHECK(linear.mask == spindle.mask && linear.t == spindle.t && linear.rows.weights == spindle.rows.weights);
  options.weighted = false;
  options.spindle_lambda = 0.3;
  for (const float weight : corrupt(clean.view(), options).rows.weights) CHECK(weight == 1.0f);
}

DN_TEST(noise_spindle_refuses_bad_input) {
  CleanTokens clean({{0, 1, 2}});
  NoiseOptions options = noise_options();
  options.spindle_information = {1, 2};
  CHECK_THROWS(corrupt(clean.view(), options), Code::kArgument,
               "token 2 of sequence 0 has the id 2; the spindle information has 2 entries");
  for (const float value : {0.0f, -1.0f, static_cast<float>(NAN), static_cast<float>(INFINITY)}) {
    options.spindle_information = {1, value, 3};
    CHECK_THROWS(corrupt(clean.view(), options), Code::kArgument, "the spindle information of id 1 is");
  }
  options.spindle_information = {1, 2, 3};
  options.spindle_lambda = NAN;
  CHECK_THROWS(corrupt(clean.view(), options), Code::kArgument,
               "the spindle's lambda is not a finite number");
  options.spindle_lambda = 0.3;
  clean.mask = {0, 1, 0};
  CHECK_THROWS(corrupt(clean.view(), options), Code::kArgument, "give t as well");
  options.time_sampler = TimeSampler::kExactCount;
  CHECK_THROWS(corrupt(clean.view(), options), Code::kArgument, "exact counts cannot be combined");
}
