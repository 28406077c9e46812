// Turns an AttentionMask into what the attention kernels want: one 64-bit word per query and block of 64
// keys, and whether a block is seen by nobody or by everybody, so that most blocks need no mask at all. Never
// a T x T array.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "core/attention_mask.h"
#include "cpu/attention_kernels.h"

namespace dn::cpu {

// The bits of [begin, end) that lie in [k0, k0 + 64).
inline uint64_t range_word(int64_t begin, int64_t end, int64_t k0) {
  const int64_t low = std::max<int64_t>(begin - k0, 0), high = std::min<int64_t>(end - k0, 64);
  if (high <= low) return 0;
  const uint64_t below_high = high == 64 ? ~uint64_t{0} : (uint64_t{1} << high) - 1;
  return below_high & ~((uint64_t{1} << low) - 1);
}

enum class Seen { kNone, kSome, kAll };

// visible() of core/attention_mask.h for some queries of one sequence, a word at a time. Every kind but
// kMatrix is one or two ranges of keys per query, and for kAnnealed random bits beyond the first.
class Visibility {
 public:
  void prepare(const AttentionKernels& kernels, const AttentionMask& mask, int64_t k_len,
               const int32_t* positions, int64_t queries) {
    kernels_ = &kernels;
    mask_ = mask;
    k_len_ = k_len;
    positions_ = positions;
    key_end_ = k_len;
    if (mask.kind == MaskKind::kFull || mask.kind == MaskKind::kMatrix) return;
    ranges_.resize(static_cast<size_t>(queries));
    int64_t last = 0;
    for (int64_t r = 0; r < queries; ++r) {
      const Ranges ranges = ranges_of(positions[r]);
      ranges_[static_cast<size_t>(r)] = ranges;
      last = std::max({last, ranges.end0, ranges.end1});
    }
    if (mask.kind != MaskKind::kAnnealed) key_end_ = std::min(last, k_len);
  }

  // No query sees a key at or beyond this.
  int64_t key_end() const { return key_end_; }

  // Words of the queries [first, first + rows) for the keys [k0, k0 + count), count <= 64. With kAll they may
  // be unset.
  Seen words(int64_t first, int64_t rows, int64_t k0, int64_t count, uint64_t* out) const {
    if (mask_.kind == MaskKind::kFull) return Seen::kAll;
    const uint64_t all = range_word(k0, k0 + count, k0);
    uint64_t any = 0, every = all;
    for (int64_t r = 0; r < rows; ++r) {
      const uint64_t word = word_of(first + r, k0, count) & all;
      out[r] = word;
      any |= word;
      every &= word;
    }
    return any == 0 ? Seen::kNone : every == all ? Seen::kAll : Seen::kSome;
  }

 private:
  struct Ranges {
    int64_t begin0 = 0, end0 = 0, begin1 = 0, end1 = 0;
  };

  Ranges ranges_of(int64_t q) const {
    const int64_t block = mask_.block, half = mask_.half;
    switch (mask_.kind) {
      case MaskKind::kFull:
      case MaskKind::kMatrix: return {0, k_len_, 0, 0};
      case MaskKind::kCausal:
      case MaskKind::kAnnealed: return {0, q + 1, 0, 0};
      case MaskKind::kBlockCausal: return {0, (q / block + 1) * block, 0, 0};
      case MaskKind::kBlockDiffusion: {
        if (q >= half) return {half, half + ((q - half) / block + 1) * block, 0, 0};
        const int64_t b = q / block;
        return {b * block, std::min((b + 1) * block, half), half, half + b * block};
      }
    }
    return {};
  }

  uint64_t word_of(int64_t query, int64_t k0, int64_t count) const {
    const int32_t q = positions_[query];
    if (mask_.kind == MaskKind::kMatrix) {
      const uint8_t* row = mask_.matrix + static_cast<int64_t>(q) * mask_.matrix_width + k0;
      uint64_t word = 0;
      for (int64_t j = 0; j < count; ++j) word |= static_cast<uint64_t>(row[j] != 0) << j;
      return word;
    }
    const Ranges& ranges = ranges_[static_cast<size_t>(query)];
    const uint64_t word =
        range_word(ranges.begin0, ranges.end0, k0) | range_word(ranges.begin1, ranges.end1, k0);
    if (mask_.kind != MaskKind::kAnnealed || word == ~uint64_t{0}) return word;
    return word | kernels_->annealed_word(mask_.seed, static_cast<uint32_t>(Stream::kAnneal), mask_.step,
                                          mask_.threshold, static_cast<uint32_t>(q),
                                          static_cast<uint32_t>(k0));
  }

  const AttentionKernels* kernels_ = nullptr;
  AttentionMask mask_;
  int64_t k_len_ = 0;
  int64_t key_end_ = 0;
  const int32_t* positions_ = nullptr;
  std::vector<Ranges> ranges_;
};

}  // namespace dn::cpu
