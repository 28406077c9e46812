// What the head does with rows of fp32 logits on the device; a block per row. backend_head.cu brings the
// logits, chunk by chunk.
#pragma once

#include <cstdint>

#include "core/backend.h"
#include "cuda/live.h"
#include "cuda/runtime.h"

namespace dn::cuda {

// The tile of ids that sums of probabilities are grouped in: the upper level of the inverse CDF, the same as
// on the CPU.
constexpr int64_t kTileIds = 256;
DN_HD inline int64_t head_tiles(int64_t V) { return (V + kTileIds - 1) / kTileIds; }

// Elements from one row of logits to the next.
inline int64_t logits_stride(int64_t V) { return (V + 63) / 64 * 64; }

struct CrossEntropyCall {
  float* logits = nullptr;  // (rows, stride), overwritten by the gradients when they are asked for
  int64_t stride = 0;       // a multiple of 8
  int64_t rows = 0;
  int64_t V = 0;
  const int32_t* targets = nullptr;
  const float* weights = nullptr;
  float* losses = nullptr;
  bool gradients = false;
  // Gradients as bf16 (rows of 2 * stride elements) or fp32, zero from V to the next multiple of 8.
  Dtype gradient = Dtype::kBF16;
};
void cross_entropy(const CrossEntropyCall& call, Stream stream);

struct DenoiseResult {
  DenoiseStats stats;
  int32_t not_finite = -1;  // the smallest id whose logit is not finite, -1: none (then stats are set)
  float value = 0;          // that logit
};

struct DenoiseCall {
  float* logits = nullptr;  // (logit rows, stride), overwritten
  int64_t stride = 0;
  int64_t V = 0;
  const DenoiseRow* rows = nullptr;  // row and guide_row are rows of `logits`
  int64_t R = 0;
  double* tile_mass = nullptr;  // scratch (R, head_tiles(V))
  const int32_t* watch = nullptr;
  int64_t watch_count = 0;
  float* watched = nullptr;  // (R, watch_count)
  DenoiseResult* results = nullptr;
  LiveRows live;  // of `rows`
};
void denoise(const DenoiseCall& call, Stream stream);

}  // namespace dn::cuda
