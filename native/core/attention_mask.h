// Who attends to whom, as a pure function of integers: visible(mask, q, k). No T x T array is ever stored
// (except kMatrix, which a user hands in for study); forward and backward, CPU and CUDA regenerate the same
// bits.
#pragma once

#include <cstdint>

#include "core/portability.h"
#include "core/rng.h"

namespace dn {

enum class MaskKind : uint8_t {
  kFull,            // every pair
  kCausal,          // k <= q
  kAnnealed,        // k <= q, or a random bit that is 1 with probability `ratio` (docs/numerics.md)
  kBlockCausal,     // k / block <= q / block
  kBlockDiffusion,  // the doubled sequence [x_t ; x_0], each half `half` long
  kMatrix,          // matrix[q * matrix_width + k] != 0
};

struct AttentionMask {
  MaskKind kind = MaskKind::kFull;
  int32_t block = 1;       // kBlockCausal, kBlockDiffusion: tokens per block
  int32_t half = 0;        // kBlockDiffusion: length of one copy
  uint32_t threshold = 0;  // kAnnealed: ratio as a 32-bit fraction, see annealing_threshold
  uint32_t step = 0;       // kAnnealed: training step; one draw per step, shared by batch, heads and layers
  uint64_t seed = 0;       // kAnnealed
  const uint8_t* matrix = nullptr;  // kMatrix: (T, T), not owned
  int32_t matrix_width = 0;
};

// ratio in [0, 1] to the threshold compared with a 32-bit draw; ratio 1 is expressed by kFull.
inline uint32_t annealing_threshold(double ratio) {
  if (ratio <= 0) return 0;
  if (ratio >= 1) return 0xFFFFFFFFu;
  return static_cast<uint32_t>(ratio * 4294967296.0);
}

// One Philox call yields the bits of four neighbouring keys: counter index = (q, k / 4), word = k % 4.
DN_HD inline bool annealed_bit(const AttentionMask& mask, int32_t q, int32_t k) {
  const uint64_t index =
      (static_cast<uint64_t>(static_cast<uint32_t>(q)) << 32) | (static_cast<uint32_t>(k) >> 2);
  return philox(mask.seed, Stream::kAnneal, mask.step, index).v[k & 3] < mask.threshold;
}

// q and k are positions inside the sequence (for kBlockDiffusion, inside the doubled one).
DN_HD inline bool visible(const AttentionMask& mask, int32_t q, int32_t k) {
  switch (mask.kind) {
    case MaskKind::kFull: return true;
    case MaskKind::kCausal: return k <= q;
    case MaskKind::kAnnealed: return k <= q || annealed_bit(mask, q, k);
    case MaskKind::kBlockCausal: return k / mask.block <= q / mask.block;
    case MaskKind::kBlockDiffusion: {
      const bool q_clean = q >= mask.half, k_clean = k >= mask.half;
      const int32_t bq = (q_clean ? q - mask.half : q) / mask.block;
      const int32_t bk = (k_clean ? k - mask.half : k) / mask.block;
      if (q_clean) return k_clean && bq >= bk;
      return k_clean ? bq > bk : bq == bk;
    }
    case MaskKind::kMatrix: return mask.matrix[static_cast<int64_t>(q) * mask.matrix_width + k] != 0;
  }
  return false;
}

}  // namespace dn
