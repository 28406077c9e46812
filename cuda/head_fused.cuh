// What the two kernels of the fused head share: how ids are grouped, the rows that count, and the launch of
// the first kernel (head_tiles.cu), whose parts the second one (head_fused.cu) merges.
#pragma once

#include "cuda/common.cuh"
#include "cuda/head.h"

namespace dn::cuda {

constexpr int kIds = static_cast<int>(kTileIds);
constexpr int kQuarterIds = kIds / kQuarters;

DN_DEVICE int64_t live_rows(const FusedDenoiseCall& p) {
  if (!p.live.count) return p.R;
  const int64_t count = *p.live.count - p.live.first;
  return count < p.R ? count : p.R;
}

// The parts of rows [first, first + rows) of the list, at the beginning of call.parts.
void launch_head_tiles(const FusedDenoiseCall& call, int64_t first, int64_t rows, int multiprocessors,
                       Stream stream);

}  // namespace dn::cuda
