// Writing keys and values into a cache, see kv_cache.h.

#include "cpu/kv_cache.h"

#include <algorithm>
#include <cstring>

#include "cpu/thread_pool.h"

namespace dn::cpu {
namespace {

constexpr int64_t kAlone = 64 << 10;  // fewer numbers are written by the caller alone

}  // namespace

void kv_cache_write(const Cpu& cpu, float* cache, int64_t position, Tensor kv, int64_t NH) {
  const int64_t C = kv.cols / 2, HS = C / NH;
  parallel_near(kv.rows * C < kAlone ? 1 : cpu.threads, NH, [&](int64_t head, int) {
    // Neighbours of one group of keys at a time.
    for (int64_t row = 0, count = 0; row < kv.rows; row += count) {
      const int64_t place = (position + row) % kKeyBlock, column = place % kKeyGroup;
      count = std::min(kv.rows - row, kKeyGroup - column);
      float* const block = cache + kv_cache_place(position + row, head, NH, HS);
      float* const k = block + (place - column) * HS + column;
      float* const v = block + (kKeyBlock + place) * HS;
      const float* const from = kv.f32(row) + head * HS;
      for (int64_t d = 0; d < HS; ++d) {
        for (int64_t j = 0; j < count; ++j) k[d * kKeyGroup + j] = from[j * kv.stride + d];
      }
      for (int64_t j = 0; j < count; ++j)
        std::memcpy(v + j * HS, from + j * kv.stride + C, static_cast<size_t>(HS) * sizeof(float));
    }
  });
}

}  // namespace dn::cpu
