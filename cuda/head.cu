// Cross-entropy with its gradient in place, and the statistics and the draw of a denoising step. Semantics
// and order of filters as in native/cpu/head_row.cpp; sums of probabilities are in double, in tiles of
// kTileIds, so that equal logits draw equal tokens on both devices.

#include "cuda/draw.cuh"

namespace dn::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;
constexpr int kPerLane = static_cast<int>(kTileIds) / kWarp;
constexpr int kCuts = 15;  // thresholds tried in one pass over a row

template <typename T>
DN_KERNEL(kThreads)
cross_entropy_kernel(CrossEntropyCall p) {
  double* const scratch = shared_memory<double>();
  float* const logits = p.logits + block_x() * p.stride;
  const int thread = thread_index();
  const int32_t target = p.targets[block_x()];
  const float target_logit = logits[target];

  float max = -INFINITY, sum = 0;
  for (int64_t i = thread; i < p.V; i += kThreads) {
    const float x = logits[i];
    if (x > max) {
      sum *= expf(max - x);
      max = x;
    }
    sum += expf(x - max);
  }
  // A NaN in the row makes its thread's sum NaN, and with it the loss and the gradients.
  float row_max = warp_max(max);
  float* const maxima = reinterpret_cast<float*>(scratch + kWarps);
  if (thread % kWarp == 0) maxima[thread / kWarp] = row_max;
  sync_block();
  for (int w = 0; w < kWarps; ++w) row_max = fmaxf(row_max, maxima[w]);
  const double scaled =
      max == -INFINITY ? static_cast<double>(sum) : static_cast<double>(sum * expf(max - row_max));
  const double total = block_sum(scaled, scratch);
  if (thread == 0)
    p.losses[block_x()] = static_cast<float>(log(total) - (static_cast<double>(target_logit) - row_max));
  if (!p.gradients) return;

  // Gradients replace the logits from the front: a step reads its logits, waits, and writes where every logit
  // has been read.
  const float weight = p.weights[block_x()], factor = static_cast<float>(weight / total);
  T* const gradients = reinterpret_cast<T*>(logits);
  const int64_t padded = (p.V + 7) / 8 * 8;
  for (int64_t begin = 0; begin < padded; begin += kThreads) {
    const int64_t i = begin + thread;
    float g = 0;
    if (i < p.V) {
      g = factor * expf(logits[i] - row_max);
      if (i == target) g -= weight;
    }
    sync_block();
    if (i < padded) gradients[i] = from_float<T>(g);
  }
}

// fp32 in the order of unsigned numbers.
DN_DEVICE uint32_t order_of(float x) {
  const uint32_t bits = float_as_uint(x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
DN_DEVICE float value_of(uint32_t order) {
  return uint_as_float(order & 0x80000000u ? order & 0x7FFFFFFFu : ~order);
}

// One row and how its probabilities are computed.
struct Row {
  const float* logits;
  int64_t V;
  float max, scale, threshold;
  DN_DEVICE float mass(int64_t i) const {
    const float x = logits[i], z = (x - max) * scale;
    return x < threshold ? 0.0f : mass_of(z);
  }
};

// tile_mass[t] = mass of tile t, a warp per tile; returns the total. `moment`, when given: sum of mass *
// exponent.
DN_DEVICE double sum_tiles(const Row& row, double* tile_mass, double* moment, double* scratch) {
  const int lane = thread_index() % kWarp;
  const int tiles = static_cast<int>(head_tiles(row.V));
  double total_moment = 0, total = 0;
  for (int t = thread_index() / kWarp; t < tiles; t += kWarps) {
    double sum = 0, tile_moment = 0;
    DN_UNROLL
    for (int j = 0; j < kPerLane; ++j) {
      const int64_t i = t * kTileIds + j * kWarp + lane;
      if (i >= row.V) continue;
      const float mass = row.mass(i);
      sum += static_cast<double>(mass);
      if (mass > 0) tile_moment += static_cast<double>(mass * ((row.logits[i] - row.max) * row.scale));
    }
    sum = warp_sum(sum);
    if (moment) total_moment += warp_sum(tile_moment);
    if (lane == 0) tile_mass[t] = sum;
  }
  sync_block();
  for (int t = thread_index(); t < tiles; t += kThreads) total += tile_mass[t];
  total = block_sum(total, scratch);
  if (moment) *moment = block_sum(lane == 0 ? total_moment : 0.0, scratch);
  return total;
}

// The smallest logit whose strictly greater ones weigh at most `budget`; equal ones stand and fall together.
// Masses are those of the row, or 1 each. Searches the 32 bits of the answer four at a time, every pass a sum
// in a fixed order.
DN_DEVICE float select_threshold(const Row& row, bool count, double budget, double* scratch) {
  uint32_t low = 0;
  for (int shift = 28; shift >= 0; shift -= 4) {
    double above[kCuts];
    DN_UNROLL
    for (int j = 0; j < kCuts; ++j) above[j] = 0;
    for (int64_t i = thread_index(); i < row.V; i += kThreads) {
      const uint32_t order = order_of(row.logits[i]);
      if (order < low) continue;
      const uint32_t digit = (order - low) >> shift;
      if (digit == 0) continue;
      const double mass = count ? 1.0 : static_cast<double>(row.mass(i));
      DN_UNROLL
      for (int j = 0; j < kCuts; ++j) above[j] += digit > static_cast<uint32_t>(j) ? mass : 0.0;
    }
    uint32_t chosen = kCuts;
    DN_UNROLL
    for (int j = kCuts - 1; j >= 0; --j) {
      if (block_sum(above[j], scratch) <= budget) chosen = static_cast<uint32_t>(j);
    }
    low += chosen << shift;
  }
  return value_of(low);
}

// DenoiseRow::needs_logits of a row without a guide.
DN_DEVICE bool is_filtered(const DenoiseRow& row, int64_t V) {
  return row.temperature > 0 && (row.top_p < 1 || (row.top_k > 0 && row.top_k < V));
}

DN_KERNEL(kThreads) denoise_kernel(DenoiseCall p) {
  if (beyond(p.live, block_x())) return;
  double* const scratch = shared_memory<double>();  // kWarps
  WarpBest* const best_scratch = reinterpret_cast<WarpBest*>(scratch + kWarps);
  const DenoiseRow options = p.rows[block_x()];
  if (p.filtered_only && !is_filtered(options, p.V)) return;
  float* const logits = p.logits + (options.row - p.first_row) * p.stride;
  const float* const guide =
      options.guide_row >= 0 ? p.logits + (options.guide_row - p.first_row) * p.stride : nullptr;
  const int thread = thread_index(), warp = thread / kWarp, lane = thread % kWarp;
  const int64_t V = p.V;
  const int64_t tiles = head_tiles(V);
  double* const tile_mass = p.tile_mass + block_x() * tiles;
  DenoiseResult& result = p.results[block_x()];

  // Guidance, the banned ids, the best two, and whether all is finite.
  Best best;
  int32_t bad = kNoId;
  for (int64_t i = thread; i < V; i += kThreads) {
    float x = logits[i];
    if (guide) x = guide[i] + (options.guidance + 1) * (x - guide[i]);
    if (!(fabsf(x) < INFINITY) && bad == kNoId) bad = static_cast<int32_t>(i);
    const bool banned = is_banned(options, i);
    if (banned && bad == kNoId) x = -INFINITY;
    if (guide || banned) logits[i] = x;
    if (!banned) consider(&best, x, static_cast<int32_t>(i));
  }
  block_best(&best, &bad, best_scratch);
  if (bad != kNoId) {
    if (thread == 0) {
      result.not_finite = bad;
      result.value = logits[bad];
    }
    return;
  }

  Row row{logits, V, best.value, 1.0f, -INFINITY};
  double moment = 0;
  const double total = sum_tiles(row, tile_mass, &moment, scratch);
  for (int64_t w = thread; w < p.watch_count; w += kThreads) {
    const double exponent = static_cast<double>(logits[p.watch[w]]) - static_cast<double>(best.value);
    p.watched[block_x() * p.watch_count + w] = static_cast<float>(exp(exponent) / total);
  }

  int64_t drawn = best.id;
  if (options.temperature > 0) {
    double mass = total;
    if (options.temperature != 1) {
      row.scale = draw_scale(options.temperature);
      mass = sum_tiles(row, tile_mass, nullptr, scratch);
    }
    float threshold = -INFINITY;
    if (options.top_p < 1) {
      const double budget = static_cast<double>(options.top_p) * mass;
      threshold = budget < 1 ? best.value : select_threshold(row, false, budget, scratch);
    }
    if (options.top_k > 0 && options.top_k < V)
      threshold =
          fmaxf(threshold, select_threshold(row, true, static_cast<double>(options.top_k - 1), scratch));
    if (threshold > -INFINITY) {
      row.threshold = threshold;
      mass = sum_tiles(row, tile_mass, nullptr, scratch);
    }
    if (warp == 0) {
      const double target = uniform(options.seed, dn::Stream::kDraw, options.step, options.position) * mass;
      const int64_t per_lane = (tiles + kWarp - 1) / kWarp, first = lane * per_lane;
      const int64_t own = first >= tiles ? 0 : (tiles - first < per_lane ? tiles - first : per_lane);
      double below = 0;
      const int64_t tile = find_item([&](int64_t t) { return tile_mass[t]; }, first, own, target, &below);
      const int64_t begin = tile * kTileIds + lane * kPerLane;
      const int64_t items = begin >= V ? 0 : (V - begin < kPerLane ? V - begin : kPerLane);
      drawn = find_item([&](int64_t i) { return static_cast<double>(row.mass(i)); }, begin, items, target,
                        &below);
    }
  }
  if (thread != 0) return;
  set_statistics(&result.stats, best, total, moment);
  set_draw(&result.stats, drawn, logits[drawn], best, total);
  result.not_finite = -1;
}

}  // namespace

void cross_entropy(const CrossEntropyCall& call, Stream stream) {
  const Grid grid{static_cast<unsigned>(call.rows)};
  const size_t shared = kWarps * (sizeof(double) + sizeof(float));
  if (call.gradient == Dtype::kBF16) {
    launch(cross_entropy_kernel<bf16>, grid, kThreads, shared, stream, call);
  } else {
    launch(cross_entropy_kernel<float>, grid, kThreads, shared, stream, call);
  }
}

void denoise(const DenoiseCall& call, Stream stream) {
  launch(denoise_kernel, Grid{static_cast<unsigned>(call.R)}, kThreads,
         kWarps * (sizeof(double) + sizeof(WarpBest)), stream, call);
}

}  // namespace dn::cuda
