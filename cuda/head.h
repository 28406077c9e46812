// The head on the device. head.cu takes rows of fp32 logits that backend_head.cu brings chunk by chunk, a
// block per row. head_tiles.cu and head_fused.cu project and denoise at once, for rows without guide and
// filters: their logits stay in registers.
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
  const DenoiseRow* rows = nullptr;  // row and guide_row, less first_row, are rows of `logits`
  int64_t first_row = 0;
  int64_t R = 0;
  LiveRows live;                // of `rows`: the results of the others are left as they are
  bool filtered_only = false;   // rows that need no logits are left as they are too
  double* tile_mass = nullptr;  // scratch (R, head_tiles(V))
  const int32_t* watch = nullptr;
  int64_t watch_count = 0;
  float* watched = nullptr;  // (R, watch_count)
  DenoiseResult* results = nullptr;
};
void denoise(const DenoiseCall& call, Stream stream);

// What the fused head keeps of a row's logits in one tile of ids, the banned id and those beyond V left out.
// Exponents are relative to the best logit of the tile.
constexpr int kQuarters = 4;
struct TilePart {
  float best_logit = 0, second = 0;  // -inf where there are no such ids
  int32_t best_id = 0;
  float sum = 0;                         // of exp(x - best); NaN when a logit is not finite
  float moment = 0;                      // of exp(x - best) (x - best)
  float draw[kQuarters] = {0, 0, 0, 0};  // of exp((x - best) / temperature), by quarters of the tile
};

// Rows that go through the fused head in one launch: bounds the scratch to 56 MiB at V = 50257.
constexpr int64_t kFusedRows = 8192;
constexpr int64_t kFusedMultiple = 8;

struct FusedDenoiseCall {
  const void* hidden = nullptr;  // bf16 (any number, C)
  int64_t hidden_stride = 0;
  const void* wte = nullptr;  // bf16 (V, C)
  int64_t wte_stride = 0;
  int64_t V = 0, C = 0;
  const DenoiseRow* rows = nullptr;  // of `hidden`; guides and filters are not looked at
  int64_t R = 0;                     // 0: nothing is launched
  LiveRows live;                     // of `rows`: the results of the others are left as they are
  TilePart* parts = nullptr;         // scratch (min(R, kFusedRows), head_tiles(V))
  const int32_t* watch = nullptr;
  int64_t watch_count = 0;
  float* watched = nullptr;  // (R, watch_count)
  DenoiseResult* results = nullptr;
};
// Whether there are matrices whose rows can be copied 16 bytes at a time: C and the strides are multiples of
// kFusedMultiple.
bool fused_denoise_fits(const FusedDenoiseCall& call);
void fused_denoise(const FusedDenoiseCall& call, int multiprocessors, Stream stream);

}  // namespace dn::cuda
