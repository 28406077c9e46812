// The forward process of masked diffusion: which tokens of a batch are masked, and what each masked one
// weighs in the loss. Also builds the plain next-token batch of the autoregressive objective, so that both
// train with the same code. Formulas: docs/numerics.md, Objective.
//
// Every draw is a function of (seed, step, number of the sequence within the step, token), never of the
// micro-batch:
//   time of sequence g           kTime,  index g; of its block b: index (b << 32) | g
//   time of a stratified step    kTime,  index 0, one u for the step
//   mask bit of token i          kMask,  index (g << 32) | i, masked when uniform < t
//   exact count: the number      kCount, index (g << 32) | 2^31 + b;  the key of token i: index (g << 32) | i
#pragma once

#include <cstdint>
#include <vector>

#include "core/model.h"

namespace dn {

enum class Objective : uint8_t { kDiffusion, kAutoregressive, kBlockDiffusion };
enum class TimeSampler : uint8_t { kUniform, kStratified, kExactCount };
// What the weighted sum of a step is divided by (the caller divides: numerators and denominators add over
// micro-batches).
enum class Normalise : uint8_t { kTokens, kMasked, kAnswer };

struct NoiseOptions {
  Objective objective = Objective::kDiffusion;
  TimeSampler time_sampler = TimeSampler::kUniform;
  Normalise normalise = Normalise::kTokens;
  bool weighted = true;  // weight 1/t (the NELBO); false: 1 (MaskGIT)
  bool shift = true;     // network row i predicts token i + 1
  int32_t mask_id = -1;
  // t = (t_max - t_min) u + t_min with 0 < t_min <= t_max <= 1. kExactCount does not use them.
  double t_min = 1e-3;
  double t_max = 1.0;
  int32_t block = 0;  // kBlockDiffusion: tokens per block, one t per block
  uint64_t seed = 0;
  uint32_t step = 0;
  AttentionMask mask;  // of every sequence (kBlockDiffusion and kAutoregressive set their own)
  // Spindle schedule (DiffusionBERT): keep probability abar_i(t) = 1 - t - lambda sin(pi t)(1 - mean_j H_j /
  // H_i), clamped to [0, 1]; the mean is over the maskable tokens of the sequence (of the block). Weight
  // -abar' / (1 - abar). Where abar is clamped to 0 it is constant: the token is masked and weighs 0. Where
  // the mask probability is below 1e-3 the token stays visible, as the floor of t does for the linear
  // schedule; it bounds the weight. Empty: off.
  std::vector<float> spindle_information;  // (V) H of each token id, in nats
  double spindle_lambda = 0;
};

// Clean sequences, packed. maskable: (N) of 0/1, or 2 for a token that is always masked and weighs 1, since
// its mask says nothing of t; may be null (all 1). mask: (N) of 0/1, may be null (drawn here). t: (S), may be
// null. Nothing that is given is drawn: with t alone each token is masked with probability t, whatever the
// time sampler; with mask alone t is the masked fraction of the predictable tokens (the weight of the
// exact-count form). For kBlockDiffusion a given t holds for every block of its sequence. kAutoregressive
// takes neither. Exact counts do not go with tokens that are always masked.
struct CleanBatch {
  const int32_t* ids = nullptr;
  const int64_t* offsets = nullptr;  // (S + 1), from 0; no sequence is empty
  int64_t S = 0;
  const uint8_t* maskable = nullptr;
  const uint8_t* mask = nullptr;
  const double* t = nullptr;
  // Number of the first sequence within the whole step: micro-batching changes no draw.
  int64_t first_sequence = 0;
  int64_t step_sequences = 0;  // sequences in the whole step, for stratified times; 0: S
};

struct NoisyBatch {
  Batch batch;    // corrupted tokens
  LossRows rows;  // one per masked, predictable token; weights hold 1/t (and 1/answer length for kAnswer)
  std::vector<uint8_t> mask;  // (N) as drawn or given
  std::vector<double> t;      // (S), or one per block, sequence after sequence; kAutoregressive: empty
  // What kTokens, kMasked or kAnswer contributes: predictable maskable tokens, loss rows, or sequences with a
  // predictable maskable token. 0 when there is none: the caller sums over micro-batches and skips a step
  // whose sum is 0.
  double denominator = 0;
  int64_t predictable = 0;  // maskable tokens that some row predicts
};

// kDiffusion: rows i - 1 (shift) or i predict each masked i. kAutoregressive: row i - 1 predicts each
// maskable i >= 1. kBlockDiffusion: the batch holds [x_t ; x_0] per sequence (twice the tokens); token i
// inside a block is predicted by the noisy copy's row i - 1 (shift) or i, a block's first token under the
// shift by the clean copy's row i - 1. With kBlockDiffusion and t_min > 0.5 the linear weight 1/t becomes 1
// (the all-mask limit of clipped schedules). Under the shift token 0 of a sequence is never predicted:
// Bernoulli masks may hide it in the input, exact counts do not. Throws Error(kArgument) for options out of
// range, empty sequences, negative ids, t outside (0, 1], and a given mask on a token that is not maskable.
// Ids beyond the vocabulary are the model's to refuse.
NoisyBatch corrupt(const CleanBatch& clean, const NoiseOptions& options);

}  // namespace dn
