// The denoising loop's own kernels: which rows a step looks at, and what is decided from their statistics.
// All state lies on the device, so that a step can be replayed; backend_loop.cu lays it out and drives it.
#pragma once

#include <cstdint>

#include "core/denoise_loop.h"
#include "cuda/attention.h"
#include "cuda/head.h"
#include "cuda/runtime.h"

namespace dn::cuda {

// What a step does with the rows it looks at.
enum class LoopCommit : uint8_t { kNone, kAll, kRanked };

// One sequence. The counters of its LoopSequence (step, block_step, initial_open, window_begin) advance.
struct LoopItem {
  LoopSequence sequence;
  int32_t rows = 0;     // looked at in this step
  int32_t planned = 0;  // kConfidence: how many to commit
  LoopCommit commit = LoopCommit::kNone;
};

struct LoopCounters {
  int32_t rows = 0;      // looked at in this step, all sequences together
  int32_t tokens = 0;    // N, or 0 once nothing is open any more
  int32_t steps = 0;     // begun in this call
  int32_t N = 0;         // packed tokens
  int32_t log_rows = 0;  // from one step to the next in the log: the open positions at the call's beginning
};

// The first row of a sequence whose logits were not finite.
struct LoopFailure {
  int32_t id = -1;  // -1: none
  int32_t position = 0;
  float value = 0;
};

struct LoopCall {
  int64_t S = 0;
  LoopItem* items = nullptr;  // (S)
  LoopCounters* counters = nullptr;
  const LoopWindow* windows = nullptr;
  int32_t* ids = nullptr;   // (N)
  uint8_t* open = nullptr;  // (N)
  // Scratch (N), from the beginning of each sequence on: positions looked at, and their random keys or, by
  // rank, the least probabilities.
  int32_t* chosen = nullptr;
  double* keys = nullptr;
  // The rows of this step, sequence after sequence (R).
  int64_t* rows = nullptr;             // packed
  int32_t* query_positions = nullptr;  // in their sequence
  DenoiseRow* draws = nullptr;
  AttentionItem* listed = nullptr;  // (S)
  DenoiseResult* results = nullptr;
  float* scores = nullptr;  // scratch
  int32_t* order = nullptr;
  LoopFailure* failures = nullptr;  // (S)
  LoopEvent* events = nullptr;      // (steps, S)
  LoopRow* log = nullptr;           // (steps, log_rows)
};

void choose_rows(const LoopCall& call, Stream stream);
void decide_rows(const LoopCall& call, Stream stream);

}  // namespace dn::cuda
