// The first kernel of the fused head: a tensor-core product whose blocks hold the logits of some rows and one
// tile of 256 ids in registers, and leave a TilePart per row: the best two, the sums of a softmax, and the
// weights that the draw needs. Every logit is one sum over k in ascending order and every sum over ids has an
// order of its own: a row's parts do not depend on the rows around it.

#include "cuda/draw.cuh"
#include "cuda/head_fused.cuh"
#include "cuda/tile.cuh"

namespace dn::cuda {
namespace {

constexpr int kSlice = 32;  // k per stage
constexpr int kStages = 4;
constexpr int kWarpRows = 32;            // a warp: 32 rows, a quarter of the tile
constexpr int kPairs = kQuarterIds / 8;  // n-tiles of the tensor core: 8 ids, 2 of them in a lane

// Blocks of 64 or 128 rows; either way 16 warps fill the registers of a multiprocessor.
template <int kRows>
struct Block {
  static constexpr int kThreads = kRows / kWarpRows * kQuarters * kWarp;
  static constexpr int kResident = 16 * kWarp / kThreads;
  static constexpr int kStageElements = (kRows + kIds) * kSlice;
  static constexpr size_t kSharedBytes = size_t{kStages} * kStageElements * sizeof(bf16);
  static_assert(kThreads == kRows * (kSlice / kChunk), "a thread copies one chunk of one row per stage");
  static_assert(kFusedRows % kRows == 0, "blocks do not cross launches");
};

// A warp's part of a TilePart: one quarter of the tile.
struct QuarterPart {
  float best_logit, second;
  int32_t best_id;
  float sum, moment, draw;
};

// Four neighbouring lanes hold the columns of a row.
template <typename T>
DN_DEVICE T quad_sum(T x) {
  x += shuffle_xor(x, 1);
  return x + shuffle_xor(x, 2);
}

// first: the launch's first row of the list.
template <int kRows>
DN_KERNEL(Block<kRows>::kThreads, Block<kRows>::kResident)
head_tiles_kernel(FusedDenoiseCall p, int64_t first) {
  constexpr int kThreads = Block<kRows>::kThreads;
  const int64_t live = live_rows(p), block_row = first + static_cast<int64_t>(block_x()) * kRows;
  if (block_row >= live) return;
  bf16* const stages = shared_memory<bf16>();
  const int thread = thread_index(), warp = thread / kWarp, lane = thread % kWarp;
  const int quarter = warp % kQuarters, warp_row = warp / kQuarters * kWarpRows;
  const int64_t tile = block_y(), tile_begin = tile * kTileIds;
  const int slices = static_cast<int>((p.C + kSlice - 1) / kSlice);

  // The hidden state that this thread copies from; rows beyond the list become zeros.
  const int copied = thread / (kSlice / kChunk), chunk = thread % (kSlice / kChunk);
  const bool listed = block_row + copied < live;
  const bf16* source = static_cast<const bf16*>(p.hidden);
  if (listed) {
    // The mistake: one row late, as a list that begins at 1 would be.
    const int64_t late = DN_PLANTED(13) && block_row + copied + 1 < live ? 1 : 0;
    source += p.rows[block_row + copied + late].row * p.hidden_stride;
  }
  const auto load = [&](int slice) {
    bf16* const a = stages + slice % kStages * Block<kRows>::kStageElements;
    const int64_t k = static_cast<int64_t>(slice) * kSlice + chunk * kChunk;
    const bool valid = listed && k < p.C;
    copy_async16(a + tile_offset<kSlice>(copied, chunk), valid ? source + k : source, valid);
    load_tile<kIds, kSlice, kThreads>(a + kRows * kSlice, static_cast<const bf16*>(p.wte), p.wte_stride,
                                      tile_begin, p.V, static_cast<int64_t>(slice) * kSlice, p.C, thread);
  };
  for (int slice = 0; slice < kStages - 1; ++slice) {
    if (slice < slices) load(slice);
    commit_copies();
  }

  float c[2][kPairs][4];
  DN_UNROLL
  for (int i = 0; i < 2; ++i) {
    DN_UNROLL
    for (int j = 0; j < kPairs; ++j) {
      DN_UNROLL
      for (int e = 0; e < 4; ++e) c[i][j][e] = 0;
    }
  }
  for (int slice = 0; slice < slices; ++slice) {
    if (DN_PLANTED(12)) {
      wait_copies<kStages - 1>();  // one group too few
    } else {
      wait_copies<kStages - 2>();
    }
    // Everybody has this slice, and has finished with the one before it, whose place is loaded next.
    sync_block();
    if (slice + kStages - 1 < slices) load(slice + kStages - 1);
    commit_copies();
    const bf16* const a = stages + slice % kStages * Block<kRows>::kStageElements;
    const bf16* const b = a + kRows * kSlice;
    DN_UNROLL
    for (int kk = 0; kk < kSlice / 16; ++kk) {
      uint32_t fa[2][4];
      DN_UNROLL
      for (int i = 0; i < 2; ++i) load_a<kSlice>(fa[i], a, warp_row + i * 16, kk * 2, lane);
      DN_UNROLL
      for (int j = 0; j < kPairs; j += 2) {
        uint32_t fb[4];
        load_b<kSlice>(fb, b, quarter * kQuarterIds + j * 8, kk * 2, lane);
        DN_UNROLL
        for (int i = 0; i < 2; ++i) {
          mma_bf16(c[i][j], fa[i], fb[0], fb[1]);
          mma_bf16(c[i][j + 1], fa[i], fb[2], fb[3]);
        }
      }
    }
  }
  wait_copies<0>();
  sync_block();  // the stages' memory now holds what warps tell each other

  float* const maxima = shared_memory<float>();  // (kQuarters, kRows)
  QuarterPart* const parts = reinterpret_cast<QuarterPart*>(maxima + kQuarters * kRows);
  // c[.][j][e] is the logit of id first_id + 8 j + e % 2.
  const int first_id = static_cast<int>(tile_begin) + quarter * kQuarterIds + lane % 4 * 2;
  const int ids = static_cast<int>(p.V) - first_id;
  const auto own_bit = [](int distance) {  // from first_id; 0: another lane's, or no id
    const bool own = distance >= 0 && distance < kQuarterIds && (distance & 7) < 2;
    return own ? 1u << (distance / 8 * 2 + (distance & 1)) : 0u;
  };
  const auto row_of = [&](int i, int half) { return warp_row + i * 16 + half * 8 + lane / 4; };

  // A row of a lane: 16 logits. What must not be drawn is left out, then the best two are found.
  DN_UNROLL
  for (int i = 0; i < 2; ++i) {
    DN_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int row = row_of(i, half);
      // Bit 2 j + e: the id of c[.][j][e] is banned. One register, where two ids would spill.
      uint32_t banned = 0;
      if (block_row + row < live) {
        const DenoiseRow& options = p.rows[block_row + row];
        banned = own_bit(options.banned - first_id) | own_bit(options.banned_end - first_id);
      }
      float not_finite = 0;  // 0, or NaN
      Best best;
      DN_UNROLL
      for (int j = 0; j < kPairs; ++j) {
        DN_UNROLL
        for (int e = 0; e < 2; ++e) {
          float& x = c[i][j][2 * half + e];
          not_finite += x * 0.0f;
          if ((8 * j + e >= ids && !DN_PLANTED(11)) || (banned >> (2 * j + e) & 1)) x = -INFINITY;
          consider(&best, x, 8 * j + e);
        }
      }
      if (best.id != kNoId) best.id += first_id;
      DN_UNROLL
      for (int mask = 1; mask < 4; mask *= 2) {
        const float value = shuffle_xor(best.value, mask), second = shuffle_xor(best.second, mask);
        const int32_t id = shuffle_xor(best.id, mask);
        merge(&best, value, second, id);
      }
      not_finite = quad_sum(not_finite);
      if (lane % 4 != 0) continue;
      maxima[quarter * kRows + row] = best.value;
      QuarterPart& part = parts[quarter * kRows + row];
      part.best_logit = best.value;
      part.second = best.second;
      part.best_id = best.id;
      part.sum = not_finite;
    }
  }
  sync_block();

  DN_UNROLL
  for (int i = 0; i < 2; ++i) {
    DN_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int row = row_of(i, half);
      float max = maxima[row];
      DN_UNROLL
      for (int q = 1; q < kQuarters; ++q) max = fmaxf(max, maxima[q * kRows + row]);
      if (max == -INFINITY) max = 0;  // nothing to draw in this tile: every mass is zero
      const float scale = draw_scale(block_row + row < live ? p.rows[block_row + row].temperature : 0.0f);
      float sum = 0, moment = 0, draw = 0;
      DN_UNROLL
      for (int j = 0; j < kPairs; ++j) {
        DN_UNROLL
        for (int e = 0; e < 2; ++e) {
          const float exponent = c[i][j][2 * half + e] - max, mass = mass_of(exponent);
          sum += mass;
          if (mass > 0) moment += mass * exponent;
        }
      }
      if (scale != 1) {
        DN_UNROLL
        for (int j = 0; j < kPairs; ++j) {
          DN_UNROLL
          for (int e = 0; e < 2; ++e) draw += mass_of((c[i][j][2 * half + e] - max) * scale);
        }
      } else {
        draw = sum;
      }
      sum = quad_sum(sum);
      moment = quad_sum(moment);
      draw = quad_sum(draw);
      if (lane % 4 != 0) continue;
      QuarterPart& part = parts[quarter * kRows + row];
      part.sum += sum;
      part.moment = moment;
      part.draw = draw;
    }
  }
  sync_block();
  if (thread >= kRows || block_row + thread >= live) return;
  Best best;
  TilePart result;
  DN_UNROLL
  for (int q = 0; q < kQuarters; ++q) {
    const QuarterPart part = parts[q * kRows + thread];
    merge(&best, part.best_logit, part.second, part.best_id);
    result.sum += part.sum;
    result.moment += part.moment;
    result.draw[q] = part.draw;
  }
  result.best_logit = best.value;
  result.second = best.second;
  result.best_id = best.id;
  p.parts[(block_row + thread - first) * head_tiles(p.V) + tile] = result;
}

template <int kRows>
void launch_tiles(const FusedDenoiseCall& call, int64_t first, int64_t rows, Stream stream) {
  const Grid grid{blocks_of(rows, kRows), static_cast<unsigned>(head_tiles(call.V))};
  launch(head_tiles_kernel<kRows>, grid, Block<kRows>::kThreads, Block<kRows>::kSharedBytes, stream, call,
         first);
}

}  // namespace

void launch_head_tiles(const FusedDenoiseCall& call, int64_t first, int64_t rows, int multiprocessors,
                       Stream stream) {
  // Blocks next to each other share a tile of ids, which is read from memory once.
  const bool small = rows <= 64 || head_tiles(call.V) * blocks_of(rows, 128) < multiprocessors;
  small ? launch_tiles<64>(call, first, rows, stream) : launch_tiles<128>(call, first, rows, stream);
}

}  // namespace dn::cuda
