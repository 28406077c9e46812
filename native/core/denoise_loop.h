// A denoising loop that stays on the device: a call carries several steps, and between them the device itself
// decides which rows are looked at, which positions are committed and with which tokens. For the samplers
// whose decisions are simple functions of one sequence's rows; lib/samplers defines them, and what is decided
// here is what is decided there, to the token. What every step looked at and did comes back as a log.
//
// Model::denoise_steps drives the network and issues a step's ops; a DeviceLoop holds the state, repeats the
// step and keeps the log.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "core/backend.h"

namespace dn {

enum class LoopSampler : uint8_t { kAncestral, kConfidence, kThreshold, kFactor, kEntropyBound };
// Of kConfidence: what is ranked, and how many tokens a step commits (kEven: n div steps, the remainder
// first; kLinear: floor(n (steps - j) / steps) stay open after step j).
enum class LoopScore : uint8_t { kProbability, kMargin, kEntropy, kRandom };
enum class LoopPlan : uint8_t { kEven, kLinear };

// Positions [begin, end) of a sequence, whose open ones are filled before those of the next window.
struct LoopWindow {
  int32_t begin = 0;
  int32_t end = 0;
  int32_t steps = 0;  // 0: no bound (kThreshold, kFactor, kEntropyBound)
};

// One sequence: position i is packed row begin + i and is predicted by row begin + i - shift.
struct LoopSequence {
  int64_t begin = 0;
  int64_t end = 0;
  AttentionMask mask;  // kFull or kBlockCausal
  LoopSampler sampler = LoopSampler::kConfidence;
  LoopScore score = LoopScore::kProbability;
  LoopPlan plan = LoopPlan::kEven;
  double parameter = 0;  // kThreshold: tau, kFactor: f, kEntropyBound: gamma in nats
  float temperature = 1;
  float top_p = 1;
  int32_t top_k = 0;
  int32_t banned = -1;  // as in DenoiseRow
  int32_t banned_end = -1;
  uint64_t seed = 0;
  int32_t shift = 0;         // 0 or 1
  uint32_t step = 0;         // counter of the next forward
  int32_t block_step = 0;    // steps spent in the first window
  int32_t initial_open = 0;  // open positions when the first window began; unused at its first step
  int32_t window_begin = 0;  // its windows: [window_begin, window_end) of LoopRequest::windows
  int32_t window_end = 0;

  // How its rows are sampled; which, and at what step, the device decides.
  DenoiseRow draw() const {
    DenoiseRow row;
    row.temperature = temperature;
    row.top_p = top_p;
    row.top_k = top_k;
    row.banned = banned;
    row.banned_end = banned_end;
    row.seed = seed;
    return row;
  }
};

// A step of every sequence is one forward pass; a sequence without open positions in its windows has none
// left and waits for the others.
struct LoopRequest {
  std::vector<int32_t> ids;   // (N)
  std::vector<uint8_t> open;  // (N) 1: may be filled
  std::vector<LoopSequence> sequences;
  std::vector<LoopWindow> windows;
  int32_t steps = 1;  // 1 to kMostLoopSteps
};
constexpr int32_t kMostLoopSteps = 64;

// A row that a step looked at.
struct LoopRow {
  DenoiseStats stats;
  int32_t position = 0;   // in its sequence
  int32_t committed = 0;  // 1: `drawn` was written there
};
// A step of one sequence: its rows are [begin, end) of LoopLog::rows, by position. None: it was finished.
struct LoopEvent {
  uint32_t step = 0;
  int32_t begin = 0;
  int32_t end = 0;
};
struct LoopLog {
  std::vector<LoopEvent> events;  // (steps, S)
  std::vector<LoopRow> rows;
};

class DeviceLoop {
 public:
  virtual ~DeviceLoop() = default;

  // The shape that a call is run in: what is captured is kept for a few shapes, so N, S and R are rounded up.
  virtual StepShape rounded(const StepShape& shape) const = 0;
  // Sends a checked request to the device. `activations`: where the steps leave theirs; a captured step
  // belongs to that place.
  virtual void begin(const LoopRequest& request, const StepShape& rounded, const void* activations) = 0;
  // Does what `issue` issues so many times: one forward pass, from embed() to decide(). With graphs it is
  // called at most twice; the rest is replayed.
  virtual void run(int32_t steps, const std::function<void()>& issue) = 0;
  // Waits and brings the log. Throws Error(kDiverged) when logits were not finite.
  virtual void finish(LoopLog* log) = 0;

  // The ops of a step whose lists the device holds; the others are the backend's. Tensors have the rounded
  // number of rows, of which the first so many count.
  // Chooses the rows of this step; out (N, C) = wte[id] + wpe[position].
  virtual void embed(Tensor out, const Weight& wte, Tensor wpe) = 0;
  // dst (R, C) = the chosen rows of src; the ops that follow are over them.
  virtual void gather(Tensor dst, Tensor src) = 0;
  // Backend::attention_forward of all rows, or of the chosen ones.
  virtual void attention(Tensor out, Tensor q, Tensor kv, bool listed, int64_t NH) = 0;
  // Statistics of the chosen rows, decisions, the log, and the state of the next step.
  virtual void decide(Tensor hidden, const Weight& wte) = 0;

  // Off: every step is issued anew. For comparisons.
  virtual void use_graphs(bool on) = 0;
};

}  // namespace dn
