// What the head's kernels share for a row's statistics and its draw: the best two logits, and the inverse CDF
// over tiles of ids and over the ids of a tile. Sums of probabilities are in double.
#pragma once

#include "core/rng.h"
#include "cuda/common.cuh"
#include "cuda/head.h"

namespace dn::cuda {

constexpr float kMinExponent = -87.0f;  // below, a probability counts as zero
constexpr int32_t kNoId = 0x7FFFFFFF;   // above all ids

DN_DEVICE bool is_banned(const DenoiseRow& row, int64_t id) {
  return id == row.banned || id == row.banned_end;
}

// A probability before it is divided by the total. Not a number stays one.
DN_DEVICE float mass_of(float exponent) { return exponent < kMinExponent ? 0.0f : expf(exponent); }

// What a draw multiplies exponents with; capped, so that the best keeps the exponent 0 and never 0 * inf.
DN_DEVICE float draw_scale(float temperature) {
  return temperature > 0 ? fminf(1 / temperature, 3.402823466e38f) : 1.0f;
}

// The best two logits seen so far; the smallest id among equals.
struct Best {
  float value = -INFINITY, second = -INFINITY;
  int32_t id = kNoId;
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
  if (value > best->value || (value == best->value && id < best->id && !DN_PLANTED(15))) {
    best->value = value;
    best->id = id;
  }
  // The mistakes: ties go to whoever is asked, and the loser of the two best is forgotten.
  best->second = least > seconds && !DN_PLANTED(14) ? least : seconds;
}

// What a warp tells the others about its best two and its least id of some kind.
struct WarpBest {
  float value, second;
  int32_t id, least;
};
// The block's best two and its least `least`, in every thread. scratch: shared, one per warp. All threads
// must call.
DN_DEVICE void block_best(Best* best, int32_t* least, WarpBest* scratch) {
  const int warps = block_threads() / kWarp, thread = thread_index();
  DN_UNROLL
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    const float value = shuffle_xor(best->value, mask), second = shuffle_xor(best->second, mask);
    const int32_t id = shuffle_xor(best->id, mask), other = shuffle_xor(*least, mask);
    merge(best, value, second, id);
    *least = other < *least ? other : *least;
  }
  if (thread % kWarp == 0) scratch[thread / kWarp] = {best->value, best->second, best->id, *least};
  sync_block();
  *best = Best();
  for (int w = 0; w < warps; ++w) {
    merge(best, scratch[w].value, scratch[w].second, scratch[w].id);
    *least = scratch[w].least < *least ? scratch[w].least : *least;
  }
  sync_block();
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

// The statistics of a row, all but the draw and the divergence, which is the host's, from sums over exponents
// relative to the best logit.
DN_DEVICE void set_statistics(DenoiseStats* stats, const Best& best, double total, double moment) {
  const double entropy = log(total) - moment / total;
  stats->best = best.id;
  stats->probability = static_cast<float>(1 / total);
  stats->margin =
      static_cast<float>(-expm1(static_cast<double>(best.second) - static_cast<double>(best.value)) / total);
  stats->entropy = static_cast<float>(entropy > 0 ? entropy : 0.0);
  stats->divergence = 0;
}
DN_DEVICE void set_draw(DenoiseStats* stats, int64_t drawn, float logit, const Best& best, double total) {
  stats->drawn = static_cast<int32_t>(drawn);
  stats->drawn_log_prob =
      static_cast<float>(static_cast<double>(logit) - static_cast<double>(best.value) - log(total));
}

}  // namespace dn::cuda
