// Masks inside the attention kernels. Every kind but kMatrix is one or two ranges of keys per query, found
// once per row with its integer divisions; inside the loops a key is compared with four numbers. kAnnealed
// adds random bits beyond the ranges, kMatrix a look-up.
#pragma once

#include "cuda/attention.h"
#include "cuda/common.cuh"

namespace dn::cuda {

DN_DEVICE int at_most(int x, int limit) { return x < limit ? x : limit; }

// The keys that a query at position q sees for certain.
DN_DEVICE Spans spans_of(const AttentionMask& mask, int q, int k_len) {
  const int last = DN_PLANTED(4) ? (k_len + kKeyTile - 1) / kKeyTile * kKeyTile : k_len;
  switch (mask.kind) {
    case MaskKind::kFull: return {0, last, 0, 0};
    case MaskKind::kCausal:
    case MaskKind::kAnnealed: return {0, at_most(q + 1, k_len), 0, 0};
    case MaskKind::kBlockCausal: return {0, at_most((q / mask.block + 1) * mask.block, k_len), 0, 0};
    case MaskKind::kBlockDiffusion: {
      const int half = mask.half, block = mask.block;
      if (q >= half)
        return {at_most(half, k_len), at_most(half + ((q - half) / block + 1) * block, k_len), 0, 0};
      const int b = q / block;
      return {at_most(b * block, k_len), at_most(at_most((b + 1) * block, half), k_len), at_most(half, k_len),
              at_most(half + b * block, k_len)};
    }
    case MaskKind::kMatrix: break;
  }
  return {0, 0, 0, 0};
}

// A tile of queries with nothing to do: lists that were captured have room for more than there is.
DN_DEVICE bool is_idle(const AttentionCall& call, const AttentionItem& item, const AttentionTile& tile) {
  return tile.first >= item.q_end - item.q_begin || beyond(call.live, item.q_begin + tile.first);
}

// Whether keys beyond the spans may be seen too.
DN_DEVICE bool is_open(const AttentionMask& mask) {
  return mask.kind == MaskKind::kAnnealed || mask.kind == MaskKind::kMatrix;
}

DN_DEVICE bool in_spans(const Spans& s, int k) {
  return (k >= s.begin0 && k < s.end0) || (k >= s.begin1 && k < s.end1);
}

// The random word of key k, which annealed_bit compares: chosen without indexing, which would put the four on
// the stack.
DN_DEVICE uint32_t annealed_word(const AttentionMask& mask, int q, int k) {
  const uint64_t index =
      (static_cast<uint64_t>(static_cast<uint32_t>(q)) << 32) | (static_cast<uint32_t>(k) >> 2);
  const Philox4 r = philox(mask.seed, dn::Stream::kAnneal, mask.step, index);
  const uint32_t low = k & 1 ? r.v[1] : r.v[0], high = k & 1 ? r.v[3] : r.v[2];
  return k & 2 ? high : low;
}

DN_DEVICE bool sees(const AttentionMask& mask, const Spans& s, int q, int k, int k_len) {
  if (in_spans(s, k)) return true;
  if (!is_open(mask) || k >= k_len) return false;
  if (mask.kind == MaskKind::kMatrix)
    return mask.matrix[static_cast<int64_t>(q) * mask.matrix_width + k] != 0;
  return annealed_word(mask, q, k) < mask.threshold;
}

// Bit 0: q sees k; bit 1: q sees k + 1. k is even, so that one draw of random numbers answers for both.
DN_DEVICE int sees_pair(const AttentionMask& mask, const Spans& s, int q, int k, int k_len) {
  int bits = (in_spans(s, k) ? 1 : 0) | (in_spans(s, k + 1) ? 2 : 0);
  if (bits == 3 || !is_open(mask)) return bits;
  if (mask.kind == MaskKind::kMatrix) {
    return (sees(mask, s, q, k, k_len) ? 1 : 0) | (sees(mask, s, q, k + 1, k_len) ? 2 : 0);
  }
  if (k >= k_len) return bits;
  const uint64_t index =
      (static_cast<uint64_t>(static_cast<uint32_t>(q)) << 32) | (static_cast<uint32_t>(k) >> 2);
  const Philox4 r = philox(mask.seed, dn::Stream::kAnneal, mask.step, index);
  const uint32_t first = k & 2 ? r.v[2] : r.v[0], second = k & 2 ? r.v[3] : r.v[1];
  if (first < mask.threshold) bits |= 1;
  if (second < mask.threshold && k + 1 < k_len) bits |= 2;
  return bits;
}

// Keys and values of a sequence, from its first key on.
template <typename T>
struct KeysValues {
  const T* k;
  const T* v;
  int64_t stride;
  DN_DEVICE KeysValues(const AttentionCall& call, const AttentionItem& item, int64_t column) {
    stride = item.k ? call.cache_stride : call.kv_stride;
    const int64_t offset = (item.k ? 0 : item.kv_begin * stride) + column;
    k = static_cast<const T*>(item.k ? item.k : call.k) + offset;
    v = static_cast<const T*>(item.k ? item.v : call.v) + offset;
  }
};

// The tiles of keys that a tile of queries has to visit, in ascending order.
struct KeyTiles {
  int first0, count0, first1, count;
  DN_DEVICE explicit KeyTiles(const Spans& s) {
    first0 = s.begin0 / kKeyTile;
    count0 = s.end0 > s.begin0 ? (s.end0 + kKeyTile - 1) / kKeyTile - first0 : 0;
    first1 = s.begin1 / kKeyTile;
    if (count0 > 0 && first1 < first0 + count0) first1 = first0 + count0;
    const int end1 = s.end1 > s.begin1 ? (s.end1 + kKeyTile - 1) / kKeyTile : 0;
    count = count0 + (end1 > first1 ? end1 - first1 : 0);
  }
  DN_DEVICE int operator[](int i) const { return i < count0 ? first0 + i : first1 + i - count0; }
};

DN_DEVICE bool may_see(const Spans& s, int k_begin, int k_end) {
  return (s.begin0 < k_end && s.end0 > k_begin) || (s.begin1 < k_end && s.end1 > k_begin);
}

}  // namespace dn::cuda
