// Cross-entropy with its gradient in place, and the statistics and the draw of a denoising step. Semantics
// and order of filters as in native/cpu/head_row.cpp; sums of probabilities are in double, in tiles of
// kTileIds, so that equal logits draw equal tokens on both devices.

#include "cuda/common.cuh"
#include "cuda/head.h"

namespace dn::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;
constexpr float kMinExponent = -87.0f;  // below, a probability counts as zero
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

// The best two logits seen so far; the smallest id among equals.
struct Best {
  float value = -INFINITY, second = -INFINITY;
  int32_t id = 0x7FFFFFFF;
};
DN_DEVICE void consider(Best* best, float x, int32_t id) {
  if (x > best->value || (x == best->value && id < best->id)) {
    best->second = best->value;
    best->value = x;
    best->id = id;
  } else if (x > best->second) {
    best->second = x;
  }
}
DN_DEVICE void merge(Best* best, float value, float second, int32_t id) {
  const float least = best->value < value ? best->value : value;
  const float seconds = best->second > second ? best->second : second;
  if (value > best->value || (value == best->value && id < best->id)) {
    best->value = value;
    best->id = id;
  }
  best->second = least > seconds ? least : seconds;
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
    return z < kMinExponent || x < threshold ? 0.0f : expf(z);
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

DN_DEVICE int first_lane(bool yes, int lane) {
  int first = yes ? lane : kWarp;
  DN_UNROLL
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    const int other = shuffle_xor(first, mask);
    first = other < first ? other : first;
  }
  return first;
}
DN_DEVICE int last_lane(bool yes, int lane) {
  int last = yes ? lane : -1;
  DN_UNROLL
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    const int other = shuffle_xor(last, mask);
    last = other > last ? other : last;
  }
  return last;
}

// One warp: every lane owns `count` neighbouring items from `first` on. Returns the first item whose running
// sum exceeds target (the last one with mass when rounding leaves target past the end), and in *below the sum
// before it.
template <typename Mass>
DN_DEVICE int64_t find_item(const Mass& mass, int64_t first, int64_t count, double target, double* below) {
  const int lane = thread_index() % kWarp;
  double own = 0;
  for (int64_t i = first; i < first + count; ++i) own += mass(i);
  double sum = own;  // inclusive over lanes
  DN_UNROLL
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const double other = shuffle(sum, lane >= distance ? lane - distance : lane);
    if (lane >= distance) sum += other;
  }
  double before = shuffle(sum, lane > 0 ? lane - 1 : 0);
  if (lane == 0) before = 0;
  if (*below > 0) before += *below, sum += *below;
  const int hit = first_lane(own > 0 && target < sum, lane), last = last_lane(own > 0, lane);
  const int owner = hit < kWarp ? hit : last;
  int64_t item = first;
  double running = before, below_item = before;
  for (int64_t i = first; i < first + count; ++i) {
    const double m = mass(i);
    if (m > 0) {
      item = i;
      below_item = running;
    }
    running += m;
    if (m > 0 && target < running) break;
  }
  *below = shuffle(below_item, owner);
  return shuffle(item, owner);
}

DN_KERNEL(kThreads) denoise_kernel(DenoiseCall p) {
  double* const scratch = shared_memory<double>();  // kWarps
  float* const best_values = reinterpret_cast<float*>(scratch + kWarps);
  float* const best_seconds = best_values + kWarps;
  int32_t* const best_ids = reinterpret_cast<int32_t*>(best_seconds + kWarps);
  if (beyond(p.live, block_x())) return;
  const DenoiseRow options = p.rows[block_x()];
  float* const logits = p.logits + options.row * p.stride;
  const float* const guide = options.guide_row >= 0 ? p.logits + options.guide_row * p.stride : nullptr;
  const int thread = thread_index(), warp = thread / kWarp, lane = thread % kWarp;
  const int64_t V = p.V;
  const int64_t tiles = head_tiles(V);
  double* const tile_mass = p.tile_mass + block_x() * tiles;
  DenoiseResult& result = p.results[block_x()];

  // Guidance, the banned id, the best two, and whether all is finite.
  Best best;
  int32_t bad = 0x7FFFFFFF;
  for (int64_t i = thread; i < V; i += kThreads) {
    float x = logits[i];
    if (guide) x = guide[i] + (options.guidance + 1) * (x - guide[i]);
    if (!(fabsf(x) < INFINITY) && bad == 0x7FFFFFFF) {
      bad = static_cast<int32_t>(i);
    }
    if (i == options.banned && bad == 0x7FFFFFFF) x = -INFINITY;
    if (guide || i == options.banned) logits[i] = x;
    if (i != options.banned) consider(&best, x, static_cast<int32_t>(i));
  }
  DN_UNROLL
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    const float value = shuffle_xor(best.value, mask), second = shuffle_xor(best.second, mask);
    const int32_t id = shuffle_xor(best.id, mask), other = shuffle_xor(bad, mask);
    merge(&best, value, second, id);
    bad = other < bad ? other : bad;
  }
  if (lane == 0) {
    best_values[warp] = best.value;
    best_seconds[warp] = best.second;
    best_ids[warp] = best.id;
    scratch[warp] = static_cast<double>(bad);
  }
  sync_block();
  best = Best();
  for (int w = 0; w < kWarps; ++w) {
    merge(&best, best_values[w], best_seconds[w], best_ids[w]);
    const int32_t other = static_cast<int32_t>(scratch[w]);
    bad = other < bad ? other : bad;
  }
  sync_block();
  if (bad != 0x7FFFFFFF) {
    if (thread == 0) {
      result.not_finite = bad;
      result.value = logits[bad];
    }
    return;
  }

  Row row{logits, V, best.value, 1.0f, -INFINITY};
  double moment = 0;
  const double total = sum_tiles(row, tile_mass, &moment, scratch), log_total = log(total);
  for (int64_t w = thread; w < p.watch_count; w += kThreads) {
    const double exponent = static_cast<double>(logits[p.watch[w]]) - static_cast<double>(best.value);
    p.watched[block_x() * p.watch_count + w] = static_cast<float>(exp(exponent) / total);
  }

  int64_t drawn = best.id;
  if (options.temperature > 0) {
    double mass = total;
    if (options.temperature != 1) {
      row.scale = fminf(1 / options.temperature, 3.402823466e38f);
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
  const double best_value = static_cast<double>(best.value);
  const double entropy = log_total - moment / total;
  DenoiseStats& stats = result.stats;
  stats.best = best.id;
  stats.drawn = static_cast<int32_t>(drawn);
  stats.probability = static_cast<float>(1 / total);
  stats.margin = static_cast<float>(-expm1(static_cast<double>(best.second) - best_value) / total);
  stats.entropy = static_cast<float>(entropy > 0 ? entropy : 0.0);
  stats.drawn_log_prob = static_cast<float>(static_cast<double>(logits[drawn]) - best_value - log_total);
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
         kWarps * (sizeof(double) + 2 * sizeof(float) + sizeof(int32_t)), stream, call);
}

}  // namespace dn::cuda
