// Head + denoise without logits in memory. head_tiles.cu leaves a TilePart per row and tile of ids;
// head_finish_kernel, a block per row, merges the parts in a fixed order, picks tile and quarter of the draw
// from their weights, and computes the 64 logits of that quarter once more, by the same instruction in the
// same order, so to the same bits.

#include "cuda/draw.cuh"
#include "cuda/head_fused.cuh"
#include "cuda/tile.cuh"

namespace dn::cuda {
namespace {

constexpr int kFinishThreads = 256;
constexpr int kFinishWarps = kFinishThreads / kWarp;
constexpr int kFinishResident = 2;

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
    launch_head_tiles(call, first, rows, multiprocessors, stream);
    launch(head_finish_kernel, Grid{static_cast<unsigned>(rows)}, kFinishThreads,
           sizeof(FinishShared) + static_cast<size_t>(tiles) * sizeof(double), stream, call, first);
  }
}

}  // namespace dn::cuda
