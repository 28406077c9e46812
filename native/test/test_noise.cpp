// The forward process: rows, targets and weights on hand-written examples, what is given and what is drawn,
// draws that do not depend on micro-batching, and bad input. The statistics of the draws are in
// test_noise_statistics.cpp, objectives with blocks and the spindle schedule in test_noise_schedules.cpp.
#include <algorithm>
#include <cmath>
#include <map>
#include <utility>
#include <vector>

#include "core/error.h"
#include "core/noise.h"
#include "core/rng.h"
#include "test/check.h"
#include "test/noise_batches.h"

using namespace dn;
using dn::test::CleanTokens;
using dn::test::noise_options;
using Bits = std::vector<uint8_t>;
using Rows = std::vector<int64_t>;
using Ids = std::vector<int32_t>;
using Weights = std::vector<float>;

DN_TEST(noise_shifted_rows_by_hand) {
  CleanTokens clean({{10, 11, 12, 13}, {20, 21, 22}});
  clean.mask = {1, 0, 1, 1, 0, 1, 1};
  clean.t = {0.5, 0.25};
  NoiseOptions options = noise_options();
  const NoisyBatch noisy = corrupt(clean.view(), options);
  CHECK((noisy.batch.ids == Ids{50, 11, 50, 50, 20, 50, 50}));
  CHECK((noisy.batch.positions == Ids{0, 1, 2, 3, 0, 1, 2}) && noisy.batch.mask_positions.empty());
  CHECK((noisy.rows.rows ==
         Rows{1, 2, 4, 5}));  // token 0 of the first sequence is masked, but predicted by no row
  CHECK((noisy.rows.targets == Ids{12, 13, 21, 22}));
  CHECK((noisy.rows.weights == Weights{2, 2, 4, 4}));
  CHECK(noisy.mask == clean.mask && noisy.t == clean.t);
  CHECK(noisy.predictable == 5 && noisy.denominator == 5);
  CHECK(noisy.batch.sequences.size() == 2 && noisy.batch.sequences[1].begin == 4 &&
        noisy.batch.sequences[1].end == 7);
  CHECK(noisy.batch.sequences[1].k_len == 3 && noisy.batch.sequences[1].mask.kind == MaskKind::kFull);

  options.shift = false;
  options.weighted = false;
  options.mask.kind = MaskKind::kAnnealed;
  const NoisyBatch aligned = corrupt(clean.view(), options);
  CHECK((aligned.rows.rows == Rows{0, 2, 3, 5, 6}));
  CHECK((aligned.rows.targets == Ids{10, 12, 13, 21, 22}));
  CHECK((aligned.rows.weights == Weights{1, 1, 1, 1, 1}));
  CHECK(aligned.predictable == 7 && aligned.denominator == 7);
  CHECK(aligned.batch.sequences[0].mask.kind == MaskKind::kAnnealed);
}

DN_TEST(noise_denominators_and_answer_weights) {
  // A prompt of two and an answer of three; a sequence that is all prompt; one without a prompt.
  CleanTokens clean({{1, 2, 3, 4, 5}, {6, 7}, {8, 9, 10}});
  clean.maskable = {0, 0, 1, 1, 1, 0, 0, 1, 1, 1};
  clean.mask = {0, 0, 1, 0, 1, 0, 0, 1, 1, 0};
  clean.t = {0.5, 0.5, 0.1};
  NoiseOptions options = noise_options();
  NoisyBatch noisy = corrupt(clean.view(), options);
  CHECK((noisy.rows.rows == Rows{1, 3, 7}) && (noisy.rows.targets == Ids{3, 5, 9}));
  CHECK(noisy.predictable == 5 && noisy.denominator == 5);
  CHECK((noisy.rows.weights == Weights{2, 2, 10}));
  options.normalise = Normalise::kMasked;
  noisy = corrupt(clean.view(), options);
  CHECK(noisy.denominator == 3 && (noisy.rows.weights == Weights{2, 2, 10}));
  options.normalise = Normalise::kAnswer;
  noisy = corrupt(clean.view(), options);
  CHECK(noisy.denominator == 2);  // the sequence without an answer does not count
  CHECK((noisy.rows.weights == Weights{static_cast<float>(2 / 3.0), static_cast<float>(2 / 3.0), 5}));

  std::fill(clean.mask.begin(), clean.mask.end(), 0);
  for (const auto& [normalise, denominator] : std::map<Normalise, double>{
           {Normalise::kTokens, 5}, {Normalise::kMasked, 0}, {Normalise::kAnswer, 2}}) {
    options.normalise = normalise;
    noisy = corrupt(clean.view(), options);
    CHECK(noisy.rows.rows.empty() && noisy.rows.targets.empty() && noisy.rows.weights.empty());
    CHECK(noisy.denominator == denominator);
    CHECK(noisy.batch.ids == clean.ids);
  }
}

DN_TEST(noise_given_parts_are_not_drawn) {
  CleanTokens clean({{1, 2, 3, 4, 5, 6}});
  clean.mask = {1, 1, 0, 1, 0, 1};
  NoiseOptions options = noise_options();
  NoisyBatch noisy = corrupt(clean.view(), options);  // mask alone: 3 of 5 predictable tokens
  CHECK(noisy.mask == clean.mask && noisy.t[0] == 3.0 / 5);
  CHECK((noisy.rows.weights == Weights(3, static_cast<float>(5.0 / 3))));
  clean.mask.clear();
  for (const TimeSampler sampler :
       {TimeSampler::kUniform, TimeSampler::kStratified, TimeSampler::kExactCount}) {
    options.time_sampler = sampler;
    clean.t = {1.0};
    noisy = corrupt(clean.view(), options);
    CHECK(noisy.t[0] == 1.0 && noisy.mask == Bits(6, 1));
    clean.t = {0.3};
    for (uint32_t step = 0; step < 20; ++step) {
      options.step = step;
      noisy = corrupt(clean.view(), options);
      CHECK(noisy.t[0] == 0.3);
      for (uint64_t i = 0; i < 6; ++i) {
        CHECK(noisy.mask[i] == (uniform(options.seed, Stream::kMask, step, i) < 0.3 ? 1 : 0));
      }
    }
  }
}

// Tokens that are always masked: at every t, with weight 1, beside others that are drawn as ever.
DN_TEST(noise_always_masked_tokens) {
  CleanTokens clean({{1, 2, 3, 4, 5, 6}});
  clean.maskable = {0, 1, 1, 1, 2, 2};
  NoiseOptions options = noise_options();
  options.t_min = options.t_max = 0.25;
  int64_t drawn = 0;
  for (options.step = 0; options.step < 400; ++options.step) {
    const NoisyBatch noisy = corrupt(clean.view(), options);
    CHECK(noisy.mask[0] == 0 && noisy.mask[4] == 1 && noisy.mask[5] == 1);
    CHECK(noisy.predictable == 5 && noisy.denominator == 5);
    const size_t R = noisy.rows.rows.size();
    CHECK(R >= 2);
    if (R < 2) return;
    CHECK((noisy.rows.targets[R - 2] == 5 && noisy.rows.targets[R - 1] == 6));
    for (size_t r = 0; r < R; ++r) CHECK(noisy.rows.weights[r] == (r + 2 < R ? 4.0f : 1.0f));
    drawn += static_cast<int64_t>(R) - 2;
  }
  CHECK(std::abs(static_cast<double>(drawn) / (3 * 400) - 0.25) < 0.05);

  clean.mask = {0, 1, 0, 0, 0, 1};  // given: it says everything
  clean.t = {0.25};
  const NoisyBatch given = corrupt(clean.view(), options);
  CHECK(given.mask == clean.mask && (given.rows.weights == Weights{4, 4}));

  clean.mask.clear();
  clean.t.clear();
  options.time_sampler = TimeSampler::kExactCount;
  options.t_min = 1e-3;
  options.t_max = 1;
  CHECK_THROWS(corrupt(clean.view(), options), Code::kArgument, "always masked");
}

DN_TEST(noise_autoregressive_rows) {
  CleanTokens clean({{10, 11, 12, 13}, {20}, {30, 31}});
  clean.maskable = {1, 0, 1, 1, 1, 1, 1};
  NoiseOptions options = noise_options();
  options.objective = Objective::kAutoregressive;
  options.mask_id = -1;
  NoisyBatch noisy = corrupt(clean.view(), options);
  CHECK(noisy.batch.ids == clean.ids && noisy.mask == Bits(7, 0) && noisy.t.empty());
  CHECK((noisy.rows.rows == Rows{1, 2, 5}) && (noisy.rows.targets == Ids{12, 13, 31}));
  CHECK((noisy.rows.weights == Weights{1, 1, 1}) && noisy.denominator == 3);
  for (const Sequence& sequence : noisy.batch.sequences) CHECK(sequence.mask.kind == MaskKind::kCausal);
  options.normalise = Normalise::kAnswer;
  noisy = corrupt(clean.view(), options);
  CHECK((noisy.rows.weights == Weights{0.5f, 0.5f, 1}) && noisy.denominator == 2);
  options.shift = false;
  CHECK_THROWS(corrupt(clean.view(), options), Code::kArgument, "shift must be on");
  options.shift = true;
  clean.t = {0.5, 0.5, 0.5};
  CHECK_THROWS(corrupt(clean.view(), options), Code::kArgument, "mask and t must not be given");
}

DN_TEST(noise_prompt_is_never_masked) {
  CleanTokens clean(std::vector<Ids>(40, Ids{1, 2, 3, 4, 5, 6, 7, 8}));
  for (size_t n = 0; n < clean.ids.size(); ++n) clean.maskable.push_back(n % 8 >= n / 8 % 9);
  NoiseOptions options = noise_options();
  for (const TimeSampler sampler :
       {TimeSampler::kUniform, TimeSampler::kStratified, TimeSampler::kExactCount}) {
    options.time_sampler = sampler;
    int64_t masked = 0;
    for (options.step = 0; options.step < 50; ++options.step) {
      const NoisyBatch noisy = corrupt(clean.view(), options);
      for (size_t n = 0; n < clean.ids.size(); ++n) {
        CHECK(noisy.mask[n] <= clean.maskable[n]);
        CHECK(noisy.batch.ids[n] == (noisy.mask[n] != 0 ? options.mask_id : clean.ids[n]));
        masked += noisy.mask[n];
      }
    }
    CHECK(masked > 1000);
  }
}

DN_TEST(noise_does_not_depend_on_micro_batches) {
  std::vector<Ids> sequences;
  for (int s = 0; s < 9; ++s) sequences.push_back(Ids(static_cast<size_t>(3 + 2 * s), s));
  const CleanTokens clean(sequences);
  NoiseOptions options = noise_options();
  options.step = 7;
  options.block = 4;
  for (const Objective objective : {Objective::kDiffusion, Objective::kBlockDiffusion}) {
    for (const TimeSampler sampler :
         {TimeSampler::kUniform, TimeSampler::kStratified, TimeSampler::kExactCount}) {
      options.objective = objective;
      options.time_sampler = sampler;
      const NoisyBatch whole = corrupt(clean.view(), options);
      Bits mask;
      std::vector<double> t;
      Weights weights;
      double denominator = 0;
      for (const auto& [first, last] : {std::pair<int, int>{0, 1}, {1, 6}, {6, 9}}) {
        const CleanTokens part(std::vector<Ids>(sequences.begin() + first, sequences.begin() + last));
        CleanBatch view = part.view();
        view.first_sequence = first;
        view.step_sequences = 9;
        const NoisyBatch noisy = corrupt(view, options);
        mask.insert(mask.end(), noisy.mask.begin(), noisy.mask.end());
        t.insert(t.end(), noisy.t.begin(), noisy.t.end());
        weights.insert(weights.end(), noisy.rows.weights.begin(), noisy.rows.weights.end());
        denominator += noisy.denominator;
      }
      CHECK(mask == whole.mask && t == whole.t && weights == whole.rows.weights &&
            denominator == whole.denominator);
      NoiseOptions other = options;
      other.step = 8;
      CHECK(corrupt(clean.view(), other).mask != whole.mask);
      other = options;
      other.seed += 1;
      CHECK(corrupt(clean.view(), other).mask != whole.mask);
    }
  }
}

DN_TEST(noise_refuses_bad_input) {
  const CleanTokens good({{1, 2, 3}, {4, 5}});
  const auto with = [](auto change) {
    NoiseOptions options = noise_options();
    change(options);
    return options;
  };
  const auto refuses = [&](const NoiseOptions& options, const char* part) {
    CHECK_THROWS(corrupt(good.view(), options), Code::kArgument, part);
  };
  refuses(with([](NoiseOptions& o) { o.mask_id = -1; }), "mask_id is -1");
  refuses(with([](NoiseOptions& o) { o.t_min = 0; }), "expected 0 < t_min <= t_max <= 1");
  refuses(with([](NoiseOptions& o) { o.t_min = 0.6, o.t_max = 0.5; }), "t_min = 0.600000, t_max = 0.500000");
  refuses(with([](NoiseOptions& o) { o.t_max = 1.01; }), "t_max = 1.01");
  refuses(with([](NoiseOptions& o) { o.t_min = NAN; }), "t_min = nan");
  refuses(with([](NoiseOptions& o) { o.objective = Objective::kBlockDiffusion; }), "block is 0");

  const NoiseOptions options = noise_options();
  CHECK_THROWS(corrupt(CleanBatch(), options), Code::kArgument, "no sequences");
  CHECK_THROWS(corrupt(CleanTokens({{1}, {}}).view(), options), Code::kArgument, "sequence 1 is empty");
  CHECK_THROWS(corrupt(CleanTokens({{1, 2}, {3, -4}}).view(), options), Code::kArgument,
               "token 1 of sequence 1 has the id -4");
  CleanTokens clean = good;
  clean.offsets[0] = 1;
  CHECK_THROWS(corrupt(clean.view(), options), Code::kArgument, "offsets begin with 1");
  for (const double t : {0.0, -0.5, 1.5, static_cast<double>(NAN)}) {
    clean = good;
    clean.t = {0.5, t};
    CHECK_THROWS(corrupt(clean.view(), options), Code::kArgument, "t of sequence 1 is");
  }
  clean = good;
  clean.maskable = {1, 1, 1, 0, 1};
  clean.mask = {0, 0, 0, 1, 0};
  CHECK_THROWS(corrupt(clean.view(), options), Code::kArgument,
               "token 0 of sequence 1 is masked by the given mask");
  CleanBatch view = good.view();
  view.first_sequence = -1;
  CHECK_THROWS(corrupt(view, options), Code::kArgument, "first_sequence is -1");
  view.first_sequence = 3;
  view.step_sequences = 4;
  CHECK_THROWS(corrupt(view, options), Code::kArgument, "do not lie in a step of 4");
}
