// The forward process. A span is the unit that shares one time t: a sequence, or a block of one for block
// diffusion.
#include "core/noise.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "core/error.h"
#include "core/rng.h"

namespace dn {

namespace {

constexpr double kPi = 3.14159265358979323846;
constexpr double kSmallestProbability = 1e-3;  // spindle: below it a token stays visible

[[noreturn]] void misuse(const std::string& what) { throw Error(Code::kArgument, what); }

std::string sequence_name(int64_t s) { return "sequence " + std::to_string(s); }

// Tokens [begin, end) of sequence s that share one time. All token numbers count within the sequence.
struct Span {
  int64_t s;       // number in this batch
  int64_t offset;  // packed row of the sequence's first token
  uint64_t g;      // number in the whole step
  int64_t begin, end;
  int64_t block, blocks;
};

constexpr uint8_t kAlwaysMasked = 2;  // of CleanBatch::maskable

bool is_maskable(const CleanBatch& clean, int64_t n) {
  return clean.maskable == nullptr || clean.maskable[n] != 0;
}

// Not where the mask is given, which then says everything.
bool is_always_masked(const CleanBatch& clean, int64_t n) {
  return clean.mask == nullptr && clean.maskable != nullptr && clean.maskable[n] == kAlwaysMasked;
}

// Under the shift no row predicts a sequence's first token.
bool is_predictable(const CleanBatch& clean, const NoiseOptions& options, const Span& span, int64_t i) {
  return (i > 0 || !options.shift) && is_maskable(clean, span.offset + i);
}

void validate_options(const NoiseOptions& options) {
  if (options.objective == Objective::kAutoregressive) {
    if (!options.shift) misuse("the autoregressive objective predicts the next token; shift must be on");
    return;
  }
  if (options.mask_id < 0) misuse("mask_id is " + std::to_string(options.mask_id) + ", expected a token id");
  if (!(options.t_min > 0 && options.t_min <= options.t_max && options.t_max <= 1)) {
    misuse("t_min = " + std::to_string(options.t_min) + ", t_max = " + std::to_string(options.t_max) +
           ", expected 0 < t_min <= t_max <= 1");
  }
  if (options.objective == Objective::kBlockDiffusion && options.block < 1) {
    misuse("block is " + std::to_string(options.block) + ", expected at least 1 token");
  }
  if (!options.spindle_information.empty()) {
    if (!std::isfinite(options.spindle_lambda)) misuse("the spindle's lambda is not a finite number");
    if (options.time_sampler == TimeSampler::kExactCount) {
      misuse(
          "the spindle schedule gives every token its own probability; exact counts cannot be combined with "
          "it");
    }
  }
}

void validate_tokens(const CleanBatch& clean, const NoiseOptions& options, int64_t s) {
  const int64_t begin = clean.offsets[s], end = clean.offsets[s + 1];
  if (end <= begin) misuse(sequence_name(s) + " is empty, expected at least one token");
  const int64_t most = options.objective == Objective::kBlockDiffusion ? INT32_MAX / 2 : INT32_MAX;
  if (end - begin > most)
    misuse(sequence_name(s) + " has " + std::to_string(end - begin) + " tokens, too many");
  const bool spindle = !options.spindle_information.empty();
  const int64_t V = static_cast<int64_t>(options.spindle_information.size());
  for (int64_t n = begin; n < end; ++n) {
    const auto here = [&] { return "token " + std::to_string(n - begin) + " of " + sequence_name(s); };
    const int32_t id = clean.ids[n];
    if (id < 0) misuse(here() + " has the id " + std::to_string(id) + ", expected 0 or more");
    if (options.time_sampler == TimeSampler::kExactCount && clean.t == nullptr &&
        is_always_masked(clean, n)) {
      misuse(here() + " is always masked, which exact counts do not allow");
    }
    if (clean.mask != nullptr && clean.mask[n] != 0 && !is_maskable(clean, n)) {
      misuse(here() + " is masked by the given mask but not maskable");
    }
    if (spindle && id >= V) {
      misuse(here() + " has the id " + std::to_string(id) + "; the spindle information has " +
             std::to_string(V) + " entries");
    }
    if (spindle && !(options.spindle_information[id] > 0 && std::isfinite(options.spindle_information[id]))) {
      misuse("the spindle information of id " + std::to_string(id) + " is " +
             std::to_string(options.spindle_information[id]) + ", expected a positive number of nats");
    }
  }
}

void validate(const CleanBatch& clean, const NoiseOptions& options) {
  validate_options(options);
  if (clean.S < 1 || clean.ids == nullptr || clean.offsets == nullptr) misuse("the batch has no sequences");
  if (clean.offsets[0] != 0)
    misuse("offsets begin with " + std::to_string(clean.offsets[0]) + ", expected 0");
  const int64_t step_sequences = clean.step_sequences == 0 ? clean.S : clean.step_sequences;
  if (clean.first_sequence < 0 || clean.first_sequence + clean.S > INT64_C(0xFFFFFFFF)) {
    misuse("first_sequence is " + std::to_string(clean.first_sequence) + ", expected 0 to 2^32 - S");
  }
  if (clean.step_sequences != 0 && clean.first_sequence + clean.S > step_sequences) {
    misuse("sequences " + std::to_string(clean.first_sequence) + " to " +
           std::to_string(clean.first_sequence + clean.S - 1) + " do not lie in a step of " +
           std::to_string(step_sequences));
  }
  const bool autoregressive = options.objective == Objective::kAutoregressive;
  if (autoregressive && (clean.mask != nullptr || clean.t != nullptr)) {
    misuse("the autoregressive objective masks nothing; mask and t must not be given");
  }
  if (clean.mask != nullptr && clean.t == nullptr && !options.spindle_information.empty()) {
    misuse("a mask without t has no weights under the spindle schedule; give t as well");
  }
  for (int64_t s = 0; s < clean.S; ++s) {
    validate_tokens(clean, options, s);
    if (clean.t != nullptr && !(clean.t[s] > 0 && clean.t[s] <= 1)) {
      misuse("t of " + sequence_name(s) + " is " + std::to_string(clean.t[s]) + ", expected 0 < t <= 1");
    }
  }
}

// Uniform and stratified times. Stratified: one u per step, and span number x of n equal ones takes (u + x /
// n) mod 1; the blocks of a sequence divide its n-th part evenly, which is the rule of BD3-LM when all have
// equally many.
double draw_time(const CleanBatch& clean, const NoiseOptions& options, const Span& span) {
  double u;
  if (options.time_sampler == TimeSampler::kStratified) {
    const double n = static_cast<double>(clean.step_sequences == 0 ? clean.S : clean.step_sequences);
    // Without step_sequences the step is this batch, whatever the number of its first sequence.
    const double g = static_cast<double>(clean.step_sequences == 0 ? static_cast<uint64_t>(span.s) : span.g);
    const double place = (g + static_cast<double>(span.block) / static_cast<double>(span.blocks)) / n;
    u = uniform(options.seed, Stream::kTime, options.step, 0) + place;
    u -= std::floor(u);
  } else {
    u = uniform(options.seed, Stream::kTime, options.step,
                (static_cast<uint64_t>(span.block) << 32) | span.g);
  }
  return std::min(options.t_min + (options.t_max - options.t_min) * u, options.t_max);
}

// Masks exactly m ~ uniform{1..M} of the span's M predictable tokens, those with the m smallest random keys;
// returns t = m / M. Without any such token nothing is masked and t is 1.
double mask_exact_count(const CleanBatch& clean, const NoiseOptions& options, const Span& span,
                        uint8_t* mask) {
  struct Key {
    uint64_t key;
    int64_t i;
    bool operator<(const Key& other) const { return key != other.key ? key < other.key : i < other.i; }
  };
  std::vector<Key> keys;
  for (int64_t i = span.begin; i < span.end; ++i) {
    if (!is_predictable(clean, options, span, i)) continue;
    const Philox4 r =
        philox(options.seed, Stream::kCount, options.step, (span.g << 32) | static_cast<uint64_t>(i));
    keys.push_back({(static_cast<uint64_t>(r.v[0]) << 32) | r.v[1], i});
  }
  if (keys.empty()) return 1;
  const double M = static_cast<double>(keys.size());
  const uint64_t index = (span.g << 32) | (UINT64_C(0x80000000) + static_cast<uint64_t>(span.block));
  const double u = uniform(options.seed, Stream::kCount, options.step, index);
  const int64_t m = std::min(static_cast<int64_t>(keys.size()), 1 + static_cast<int64_t>(u * M));
  std::nth_element(keys.begin(), keys.begin() + (m - 1), keys.end());
  for (int64_t j = 0; j < m; ++j) mask[span.offset + keys[j].i] = 1;
  return static_cast<double>(m) / M;
}

// The masked fraction of the span's predictable tokens; 1 when none is masked, where no weight is asked for.
double masked_fraction(const CleanBatch& clean, const NoiseOptions& options, const Span& span,
                       const uint8_t* mask) {
  int64_t predictable = 0, masked = 0;
  for (int64_t i = span.begin; i < span.end; ++i) {
    if (!is_predictable(clean, options, span, i)) continue;
    ++predictable;
    masked += mask[span.offset + i];
  }
  return masked == 0 ? 1 : static_cast<double>(masked) / static_cast<double>(predictable);
}

// Mask probability p and loss weight p' / p of a token at time t under the linear schedule, or the spindle
// one with c = lambda (1 - mean H / H_i): p = t + c sin(pi t), p' = 1 + c pi cos(pi t). For c > 0 p is
// concave with p(1) = 1, for c < 0 convex with p(0) = 0, so p' < 0 only where p is clamped and no weight is
// negative.
struct Rate {
  double p, weight;
};

Rate spindle_rate(double t, double c) {
  const double p = t + c * std::sin(kPi * t);
  const double dp = std::max(0.0, 1 + c * kPi * std::cos(kPi * t));
  if (p >= 1) return {1, t < 1 ? 0 : dp};
  if (p < kSmallestProbability) return {0, 0};
  return {p, dp / p};
}

double mean_information(const CleanBatch& clean, const NoiseOptions& options, const Span& span) {
  double sum = 0;
  int64_t count = 0;
  for (int64_t i = span.begin; i < span.end; ++i) {
    if (!is_maskable(clean, span.offset + i)) continue;
    sum += options.spindle_information[clean.ids[span.offset + i]];
    ++count;
  }
  return count == 0 ? 0 : sum / static_cast<double>(count);
}

// Draws (or takes over) the span's mask; fills weights (of the whole packed batch) where a token is masked.
// Returns t.
double corrupt_span(const CleanBatch& clean, const NoiseOptions& options, const Span& span, uint8_t* mask,
                    double* weights) {
  const bool spindle = !options.spindle_information.empty();
  const bool exact =
      options.time_sampler == TimeSampler::kExactCount && clean.t == nullptr && clean.mask == nullptr;
  if (clean.mask != nullptr) {
    for (int64_t i = span.begin; i < span.end; ++i) mask[span.offset + i] = clean.mask[span.offset + i] != 0;
  }
  const double t = clean.t != nullptr      ? clean.t[span.s]
                   : clean.mask != nullptr ? masked_fraction(clean, options, span, mask)
                   : exact                 ? mask_exact_count(clean, options, span, mask)
                                           : draw_time(clean, options, span);
  const bool drawn = clean.t == nullptr && clean.mask == nullptr && !exact;
  const bool all_mask_limit = options.objective == Objective::kBlockDiffusion && drawn && options.t_min > 0.5;
  const double mean = spindle ? mean_information(clean, options, span) : 0;
  for (int64_t i = span.begin; i < span.end; ++i) {
    const int64_t n = span.offset + i;
    if (!is_maskable(clean, n)) continue;
    if (is_always_masked(clean, n)) {
      mask[n] = 1;
      weights[n] = 1;
      continue;
    }
    Rate rate{t, all_mask_limit ? 1 : 1 / t};
    if (spindle) {
      rate = spindle_rate(t, options.spindle_lambda * (1 - mean / options.spindle_information[clean.ids[n]]));
    }
    if (clean.mask == nullptr && !exact) {
      const uint64_t index = (span.g << 32) | static_cast<uint64_t>(i);
      mask[n] = uniform(options.seed, Stream::kMask, options.step, index) < rate.p;
    }
    weights[n] = options.weighted ? rate.weight : 1;
  }
  return t;
}

// Appends sequence s to the batch: its (corrupted) tokens, and for block diffusion the clean copy behind
// them.
void append_tokens(const CleanBatch& clean, const NoiseOptions& options, int64_t s, NoisyBatch* noisy) {
  Batch& batch = noisy->batch;
  const int64_t begin = clean.offsets[s];
  const int32_t T = static_cast<int32_t>(clean.offsets[s + 1] - begin);
  const bool doubled = options.objective == Objective::kBlockDiffusion;
  Sequence sequence;
  sequence.begin = static_cast<int64_t>(batch.ids.size());
  for (int32_t i = 0; i < T; ++i) {
    batch.ids.push_back(noisy->mask[begin + i] != 0 ? options.mask_id : clean.ids[begin + i]);
    batch.positions.push_back(i);
  }
  if (doubled) {
    batch.ids.insert(batch.ids.end(), clean.ids + begin, clean.ids + begin + T);
    for (int32_t i = 0; i < T; ++i) batch.positions.push_back(i);
    for (int32_t i = 0; i < 2 * T; ++i) batch.mask_positions.push_back(i);
  }
  sequence.end = static_cast<int64_t>(batch.ids.size());
  sequence.k_len = static_cast<int32_t>(sequence.end - sequence.begin);
  if (doubled) {
    sequence.mask.kind = MaskKind::kBlockDiffusion;
    sequence.mask.block = options.block;
    sequence.mask.half = T;
  } else if (options.objective == Objective::kAutoregressive) {
    sequence.mask.kind = MaskKind::kCausal;
  } else {
    sequence.mask = options.mask;
  }
  batch.sequences.push_back(sequence);
}

// The row, within its sequence in the batch, that predicts token i of a sequence of T.
int64_t predicting_row(const NoiseOptions& options, int64_t i, int64_t T) {
  if (!options.shift) return i;
  const bool first_of_block = options.objective == Objective::kBlockDiffusion && i % options.block == 0;
  return first_of_block ? T + i - 1 : i - 1;
}

}  // namespace

NoisyBatch corrupt(const CleanBatch& clean, const NoiseOptions& options) {
  validate(clean, options);
  const bool autoregressive = options.objective == Objective::kAutoregressive;
  const int64_t N = clean.offsets[clean.S];
  NoisyBatch noisy;
  noisy.mask.assign(static_cast<size_t>(N), 0);
  std::vector<double> weights(static_cast<size_t>(N), 1.0);
  int64_t answers = 0;
  for (int64_t s = 0; s < clean.S; ++s) {
    const int64_t T = clean.offsets[s + 1] - clean.offsets[s];
    const int64_t block = options.objective == Objective::kBlockDiffusion ? options.block : T;
    Span span{s, clean.offsets[s],       static_cast<uint64_t>(clean.first_sequence + s), 0, 0,
              0, (T + block - 1) / block};
    for (; span.block < span.blocks && !autoregressive; ++span.block) {
      span.begin = span.block * block;
      span.end = std::min(T, span.begin + block);
      noisy.t.push_back(corrupt_span(clean, options, span, noisy.mask.data(), weights.data()));
    }
    append_tokens(clean, options, s, &noisy);

    int64_t predictable = 0;
    for (int64_t i = 0; i < T; ++i) predictable += is_predictable(clean, options, span, i);
    noisy.predictable += predictable;
    answers += predictable > 0;
    const int64_t first_row = noisy.batch.sequences.back().begin;
    const double share = options.normalise == Normalise::kAnswer ? static_cast<double>(predictable) : 1.0;
    for (int64_t i = 0; i < T; ++i) {
      const int64_t n = span.offset + i;
      if (!is_predictable(clean, options, span, i) || (!autoregressive && noisy.mask[n] == 0)) continue;
      noisy.rows.rows.push_back(first_row + predicting_row(options, i, T));
      noisy.rows.targets.push_back(clean.ids[n]);
      noisy.rows.weights.push_back(static_cast<float>(weights[n] / share));
    }
  }
  switch (options.normalise) {
    case Normalise::kTokens: noisy.denominator = static_cast<double>(noisy.predictable); break;
    case Normalise::kMasked: noisy.denominator = static_cast<double>(noisy.rows.rows.size()); break;
    case Normalise::kAnswer: noisy.denominator = static_cast<double>(answers); break;
  }
  return noisy;
}

}  // namespace dn
