// Head + denoise without logits in memory. head_tiles_kernel is a tensor-core product whose blocks hold the
// logits of some rows and one tile of 256 ids in registers, and leave a TilePart per row: the best two, the
// sums of a softmax, and the weights that the draw needs. head_finish_kernel, a block per row, merges the
// parts in a fixed order, picks tile and quarter of the draw from their weights, and computes the 64 logits
// of that quarter once more, by the same instruction in the same order, so to the same bits. Every logit is
// one sum over k in ascending order and every sum over ids has an order of its own: a row's results do not
// depend on the rows around it.

#include "cuda/draw.cuh"
#include "cuda/head.h"
#include "cuda/tile.cuh"

namespace dn::cuda {
namespace {

constexpr int kIds = static_cast<int>(kTileIds);
constexpr int kQuarterIds = kIds / kQuarters;
constexpr int kSlice = 32;  // k per stage
constexpr int kStages = 4;
constexpr int kWarpRows = 32;            // a warp: 32 rows, a quarter of the tile
constexpr int kPairs = kQuarterIds / 8;  // n-tiles of the tensor core: 8 ids, 2 of them in a lane
constexpr int kFinishThreads = 256;
constexpr int kFinishWarps = kFinishThreads / kWarp;
constexpr int kFinishResident = 2;

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

DN_DEVICE int64_t live_rows(const FusedDenoiseCall& p) {
  if (!p.live.count) return p.R;
  const int64_t count = *p.live.count - p.live.first;
  return count < p.R ? count : p.R;
}

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

// One warp: logits[0, 8) of 8 ids for one hidden state, which is the first of the tensor core's 16 rows; the
// others are zero. Lanes 4 i to 4 i + 3 name id i; beyond V its logit is 0.
DN_DEVICE void eight_logits(float* logits, const FusedDenoiseCall& p, const bf16* hidden, int64_t id) {
  const int lane = thread_index() % kWarp, group = lane / 4, pair = lane % 4 * 2;
  const bool real = id < p.V;
  const bf16* const weights = static_cast<const bf16*>(p.wte) + (real ? id : 0) * p.wte_stride;
  const auto two = [](const bf16* x, bool valid) {
    return valid ? *reinterpret_cast<const uint32_t*>(x) : 0u;
  };
  float c[4] = {0, 0, 0, 0};
  for (int64_t k = pair; k < p.C; k += 16) {
    const bool whole = k + kChunk < p.C;
    const uint32_t a[4] = {two(hidden + k, group == 0), 0, two(hidden + k + kChunk, group == 0 && whole), 0};
    mma_bf16(c, a, two(weights + k, real), two(weights + k + kChunk, real && whole));
  }
  if (group == 0) {
    logits[pair] = c[0];
    logits[pair + 1] = c[1];
  }
}

struct FinishShared {
  double scratch[kFinishWarps];
  WarpBest best[kFinishWarps];
  int64_t drawn_from;  // the first id of the quarter that is drawn from
  double below;        // mass before it
  float logits[kIds];
};

DN_KERNEL(kFinishThreads, kFinishResident) head_finish_kernel(FusedDenoiseCall p, int64_t first) {
  const int64_t r = first + block_x();
  if (r >= live_rows(p)) return;
  FinishShared& shared = *shared_memory<FinishShared>();
  double* const tile_mass = reinterpret_cast<double*>(&shared + 1);
  const int thread = thread_index(), warp = thread / kWarp, lane = thread % kWarp;
  const DenoiseRow options = p.rows[r];
  const int64_t tiles = head_tiles(p.V);
  const TilePart* const parts = p.parts + block_x() * tiles;
  DenoiseResult& result = p.results[r];
  const bf16* const hidden = static_cast<const bf16*>(p.hidden) + options.row * p.hidden_stride;
  const auto compute_logits = [&](int64_t begin, int ids) {
    for (int i = warp * 8; i < ids; i += kFinishWarps * 8)
      eight_logits(shared.logits + i, p, hidden, begin + i + lane / 4);
    sync_block();
  };

  Best best;
  int32_t bad_tile = kNoId;
  for (int64_t t = thread; t < tiles; t += kFinishThreads) {
    merge(&best, parts[t].best_logit, parts[t].second, parts[t].best_id);
    if (!(fabsf(parts[t].sum) < INFINITY) && bad_tile == kNoId) bad_tile = static_cast<int32_t>(t);
  }
  block_best(&best, &bad_tile, shared.best);
  if (bad_tile != kNoId) {
    const int64_t begin = bad_tile * kTileIds;
    compute_logits(begin, kIds);
    if (thread == 0) {
      int i = 0;
      while (i < kIds - 1 && fabsf(shared.logits[i]) < INFINITY) ++i;
      result.not_finite = static_cast<int32_t>(begin) + i;
      result.value = shared.logits[i];
    }
    return;
  }

  double sum = 0, moment = 0;
  for (int64_t t = thread; t < tiles; t += kFinishThreads) {
    const float exponent = parts[t].best_logit - best.value, factor = mass_of(exponent);
    if (!(factor > 0)) continue;
    sum += static_cast<double>(parts[t].sum) * static_cast<double>(factor);
    moment += (static_cast<double>(parts[t].moment) +
               static_cast<double>(parts[t].sum) * static_cast<double>(exponent)) *
              static_cast<double>(factor);
  }
  const double total = block_sum(sum, shared.scratch);
  moment = block_sum(moment, shared.scratch);
  for (int64_t w = warp * 8; w < p.watch_count; w += kFinishWarps * 8) {
    float* const eight = shared.logits + warp * 8;
    eight_logits(eight, p, hidden, w + lane / 4 < p.watch_count ? p.watch[w + lane / 4] : p.V);
    sync_warp();
    if (lane < 8 && w + lane < p.watch_count) {
      const double exponent = static_cast<double>(eight[lane]) - static_cast<double>(best.value);
      p.watched[r * p.watch_count + w + lane] =
          is_banned(options, p.watch[w + lane]) ? 0.0f : static_cast<float>(exp(exponent) / total);
    }
    sync_warp();
  }
  if (thread == 0) {
    set_statistics(&result.stats, best, total, moment);
    set_draw(&result.stats, best.id, best.value, best, total);
    result.not_finite = -1;
  }
  if (!(options.temperature > 0)) return;

  const float scale = draw_scale(options.temperature);
  const auto quarter_mass = [&](int64_t t, int64_t q) {
    return static_cast<double>(parts[t].draw[q]) *
           static_cast<double>(mass_of((parts[t].best_logit - best.value) * scale));
  };
  double mass = 0;
  for (int64_t t = thread; t < tiles; t += kFinishThreads) {
    double of_tile = 0;
    DN_UNROLL
    for (int q = 0; q < kQuarters; ++q) of_tile += quarter_mass(t, q);
    tile_mass[t] = of_tile;
    mass += of_tile;
  }
  mass = block_sum(mass, shared.scratch);
  const double target = uniform(options.seed, dn::Stream::kDraw, options.step, options.position) * mass;
  if (warp == 0) {
    const int64_t per_lane = (tiles + kWarp - 1) / kWarp, begin = lane * per_lane;
    const int64_t own = begin >= tiles ? 0 : (tiles - begin < per_lane ? tiles - begin : per_lane);
    double below = 0;
    const int64_t tile = find_item([&](int64_t t) { return tile_mass[t]; }, begin, own, target, &below);
    const int64_t quarter = find_item([&](int64_t q) { return quarter_mass(tile, q); }, lane,
                                      lane < kQuarters ? 1 : 0, target, &below);
    if (lane == 0) {
      shared.drawn_from = tile * kTileIds + quarter * kQuarterIds;
      shared.below = below;
    }
  }
  sync_block();
  const int64_t begin = shared.drawn_from;
  compute_logits(begin, kQuarterIds);
  if (warp != 0) return;
  const auto item_mass = [&](int64_t i) {
    const bool out = begin + i >= p.V || is_banned(options, begin + i);
    return out ? 0.0 : static_cast<double>(mass_of((shared.logits[i] - best.value) * scale));
  };
  double below = shared.below;
  const int64_t item = find_item(item_mass, lane * 2, 2, target, &below);
  // Where rounding leaves a quarter without mass, which the last one of all may be, the best stays drawn.
  if (lane == 0 && item_mass(item) > 0)
    set_draw(&result.stats, begin + item, shared.logits[item], best, total);
}

template <int kRows>
void launch_tiles(const FusedDenoiseCall& call, int64_t first, int64_t rows, Stream stream) {
  const Grid grid{blocks_of(rows, kRows), static_cast<unsigned>(head_tiles(call.V))};
  launch(head_tiles_kernel<kRows>, grid, Block<kRows>::kThreads, Block<kRows>::kSharedBytes, stream, call,
         first);
}

}  // namespace

bool fused_denoise_fits(const FusedDenoiseCall& call) {
  const auto aligned = [](const void* p, int64_t stride) {
    return stride % kChunk == 0 && reinterpret_cast<uintptr_t>(p) % 16 == 0;
  };
  return call.wte && call.C % kChunk == 0 && aligned(call.hidden, call.hidden_stride) &&
         aligned(call.wte, call.wte_stride);
}

void fused_denoise(const FusedDenoiseCall& call, int multiprocessors, Stream stream) {
  const int64_t tiles = head_tiles(call.V);
  for (int64_t first = 0; first < call.R; first += kFusedRows) {
    const int64_t rows = call.R - first < kFusedRows ? call.R - first : kFusedRows;
    // Blocks next to each other share a tile of ids, which is read from memory once.
    const bool small = rows <= 64 || tiles * blocks_of(rows, 128) < multiprocessors;
    small ? launch_tiles<64>(call, first, rows, stream) : launch_tiles<128>(call, first, rows, stream);
    launch(head_finish_kernel, Grid{static_cast<unsigned>(rows)}, kFinishThreads,
           sizeof(FinishShared) + static_cast<size_t>(tiles) * sizeof(double), stream, call, first);
  }
}

}  // namespace dn::cuda
