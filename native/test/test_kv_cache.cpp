// How keys and values lie in a cache: every piece of a sequence, however it is cut and whoever writes it,
// comes to the same places, and to no others.

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "cpu/kv_cache.h"
#include "test/attention_batch.h"
#include "test/check.h"
#include "test/same_bits.h"

namespace dn::test::attention {
namespace {

constexpr int64_t kHeads = 12, kHead = 64, kChannels = kHeads * kHead;

Tensor rows_of(std::vector<float>& kv) {
  const int64_t C = 2 * kChannels;
  return Tensor(kv.data(), Dtype::kF32, static_cast<int64_t>(kv.size()) / C, C);
}

// Number d of a head's key at a position, as the kernels find it.
float key_at(const std::vector<float>& cache, int64_t position, int64_t head, int64_t d) {
  const int64_t place = position % kKeyBlock;
  const KeyRows rows = cached_keys(cache.data(), position - place, 1, head, kHeads, kHead);
  return rows.k[place / kKeyGroup * kHead * kKeyGroup + d * kKeyGroup + place % kKeyGroup];
}

float value_at(const std::vector<float>& cache, int64_t position, int64_t head, int64_t d) {
  const int64_t place = position % kKeyBlock;
  const KeyRows rows = cached_keys(cache.data(), position - place, 1, head, kHeads, kHead);
  return rows.v[place * rows.stride + d];
}

}  // namespace

// Long enough for several threads; every number has one place.
DN_TEST(kv_cache_has_a_place_for_every_number) {
  const int64_t T = 150;
  std::vector<float> kv(static_cast<size_t>(T * 2 * kChannels));
  for (size_t i = 0; i < kv.size(); ++i) kv[i] = static_cast<float>(i);
  std::vector<float> cache(static_cast<size_t>(kv_cache_floats(T, kChannels)), kNan);
  CHECK(cache.size() == 192u * 2 * kChannels);
  kv_cache_write({3, Isa::kPortable}, cache.data(), 0, rows_of(kv), kHeads);
  int64_t wrong = 0;
  for (int64_t t = 0; t < T; ++t) {
    for (int64_t c = 0; c < kChannels; ++c) {
      const size_t i = static_cast<size_t>(t * 2 * kChannels + c);
      wrong += key_at(cache, t, c / kHead, c % kHead) != kv[i];
      wrong += value_at(cache, t, c / kHead, c % kHead) != kv[i + kChannels];
    }
  }
  CHECK_MSG(wrong == 0, std::to_string(wrong) + " numbers are not where they are read");
  int64_t written = 0;
  for (const float x : cache) written += !std::isnan(x);
  CHECK(written == T * 2 * kChannels);
}

DN_TEST(kv_cache_pieces_come_to_the_same_places) {
  const int64_t T = 150;
  std::vector<float> kv = random_values(T * 2 * kChannels, 1);
  std::vector<float> whole(static_cast<size_t>(kv_cache_floats(T, kChannels)), kNan);
  kv_cache_write({1, Isa::kPortable}, whole.data(), 0, rows_of(kv), kHeads);
  for (const int64_t piece : {1, 5, 16, 63, 64, 100}) {
    std::vector<float> cache(whole.size(), kNan);
    for (int64_t t = T; t > 0;) {  // the last one first
      const int64_t begin = std::max<int64_t>(0, t - piece);
      kv_cache_write({2, Isa::kPortable}, cache.data(), begin, rows_of(kv).slice(begin, t - begin), kHeads);
      t = begin;
    }
    CHECK_MSG(same_bits(cache, whole), "pieces of " + std::to_string(piece));
  }
}

// A block decoder writes its rows anew: they alone change.
DN_TEST(kv_cache_rows_are_overwritten_alone) {
  std::vector<float> kv = random_values(130 * 2 * kChannels, 2), other = random_values(20 * 2 * kChannels, 3);
  std::vector<float> cache(static_cast<size_t>(kv_cache_floats(130, kChannels)), 0.0f), expected = cache;
  kv_cache_write({1, Isa::kPortable}, cache.data(), 0, rows_of(kv), kHeads);
  kv_cache_write({1, Isa::kPortable}, cache.data(), 55, rows_of(other), kHeads);
  std::copy(other.begin(), other.end(), kv.begin() + 55 * 2 * kChannels);
  kv_cache_write({1, Isa::kPortable}, expected.data(), 0, rows_of(kv), kHeads);
  CHECK(same_bits(cache, expected));
}

}  // namespace dn::test::attention
