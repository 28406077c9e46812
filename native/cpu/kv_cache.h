// How a layer of a key-value cache lies in the CPU's memory: blocks of kKeyBlock positions; of each block,
// for every head, its keys as attention multiplies them, transposed in groups, (kKeyBlock / kKeyGroup, HS,
// kKeyGroup), and then its values (kKeyBlock, HS). A head's part of a block is one stretch of memory that
// attention reads from one end to the other, and so is that of a thread's heads: the hardware follows, which
// it does not across rows of all heads, and no token transposes the keys of those before it again.
#pragma once

#include <cstdint>

#include "core/tensor.h"
#include "cpu/attention_kernels.h"
#include "cpu/ops.h"

namespace dn::cpu {

// Numbers of a layer's cache for so many positions of C channels: whole blocks.
inline int64_t kv_cache_floats(int64_t capacity, int64_t C) {
  return (capacity + kKeyBlock - 1) / kKeyBlock * kKeyBlock * 2 * C;
}

// Where a head's part of the block that holds `position` begins.
inline int64_t kv_cache_place(int64_t position, int64_t head, int64_t NH, int64_t HS) {
  return (position / kKeyBlock * NH + head) * 2 * HS * kKeyBlock;
}

// A head's block of keys and values from position k0 on, a multiple of kKeyBlock; `count` of them are there.
inline KeyRows cached_keys(const float* cache, int64_t k0, int64_t count, int64_t head, int64_t NH,
                           int64_t HS) {
  const float* const k = cache + kv_cache_place(k0, head, NH, HS);
  return KeyRows{k, k + HS * kKeyBlock, HS, count, true};
}

}  // namespace dn::cpu
