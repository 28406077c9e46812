// What the AMX and AVX512_BF16 sources of the matrix product on bf16 tiles share: numbers into parts
// (gemm_kernels.h) and packing. Included after immintrin.h and string.h; everything has
// internal linkage.

#include "cpu/gemm_avx512.inl"

namespace dn::cpu {
namespace {

// Sixteen numbers in three parts: each the upper half of a word, the lower half is not looked at.
struct Parts {
  __m512i at[3];
};

__attribute__((always_inline)) inline Parts split(__m512 x) {
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  const __m512i bits = _mm512_castps_si512(x);
  const __m512 rest = _mm512_sub_ps(x, _mm512_castsi512_ps(_mm512_and_si512(bits, upper)));
  // Half a unit more in magnitude: cut off, that is the nearest.
  const __m512i middle = _mm512_add_epi32(_mm512_castps_si512(rest), _mm512_set1_epi32(0x8000));
  const __m512 last = _mm512_sub_ps(rest, _mm512_castsi512_ps(_mm512_and_si512(middle, upper)));
  return {{bits, middle, _mm512_castps_si512(last)}};
}

// Thirty-two numbers that follow each other along the reduction, as part tiles of A have them.
template <int kParts>
__attribute__((always_inline)) inline void join_row(__m512i* parts, __m512 low, __m512 high) {
  if (kParts == 1) {
    parts[0] = (__m512i)_mm512_cvtne2ps_pbh(high, low);
    return;
  }
  alignas(64) static const uint16_t kUpper[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21,
                                                  23, 25, 27, 29, 31, 33, 35, 37, 39, 41, 43,
                                                  45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  const __m512i upper = _mm512_load_si512(kUpper);
  const Parts a = split(low), b = split(high);
  for (int i = 0; i < kParts; ++i) parts[i] = _mm512_permutex2var_epi16(a.at[i], upper, b.at[i]);
}

// Sixteen pairs of numbers, as part tiles of B have them.
template <int kParts>
__attribute__((always_inline)) inline void join_pairs(__m512i* parts, __m512 even, __m512 odd) {
  if (kParts == 1) {
    alignas(64) static const uint16_t kInterleave[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                         21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                         11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    parts[0] =
        _mm512_permutexvar_epi16(_mm512_load_si512(kInterleave), (__m512i)_mm512_cvtne2ps_pbh(odd, even));
    return;
  }
  const Parts a = split(even), b = split(odd);
  // One instruction a part: the upper halves of the even numbers go below those of the odd ones.
  const __m512i upper = _mm512_set4_epi32(0x0f0e0f0e, 0x0b0a0b0a, 0x07060706, 0x03020302);
  for (int i = 0; i < kParts; ++i)
    parts[i] = _mm512_mask_shuffle_epi8(b.at[i], 0x3333333333333333u, a.at[i], upper);
}

template <int kParts>
void store_tiles(uint16_t* dst, int64_t part_step, __m512i (*parts)[16], bool transpose) {
  for (int i = 0; i < kParts; ++i) {
    if (transpose) transpose_16x16(parts[i]);
    for (int r = 0; r < 16; ++r) _mm512_store_si512(dst + i * part_step + r * 32, parts[i][r]);
  }
}

template <int kParts>
void pack_rows(uint16_t* dst, int64_t part_step, const float* const* rows, int64_t count, int64_t depth,
               bool transpose) {
  __m512i tiles[kParts][16], row[kParts];
  for (int64_t k = 0; k < depth; k += kBf16Step, dst += kParts * part_step) {
    const __mmask16 low = lanes(depth - k), high = lanes(depth - k - 16);
    for (int r = 0; r < 16; ++r) {
      const bool is = r < count;
      join_row<kParts>(row, is ? _mm512_maskz_loadu_ps(low, rows[r] + k) : _mm512_setzero_ps(),
                       is ? _mm512_maskz_loadu_ps(high, rows[r] + k + 16) : _mm512_setzero_ps());
      for (int i = 0; i < kParts; ++i) tiles[i][r] = row[i];
    }
    store_tiles<kParts>(dst, part_step, tiles, transpose);
  }
}

template <int kParts>
void pack_columns(uint16_t* dst, int64_t part_step, const float* src, int64_t src_stride, int64_t count,
                  int64_t depth, bool transpose) {
  const __mmask16 wide = lanes(count);
  __m512i tiles[kParts][16], pairs[kParts];
  for (int64_t k = 0; k < depth; k += kBf16Step, dst += kParts * part_step) {
    const float* from = src + k * src_stride;
    for (int r = 0; r < 16; ++r, from += 2 * src_stride) {
      const int64_t left = depth - k - 2 * r;
      join_pairs<kParts>(pairs, left > 0 ? _mm512_maskz_loadu_ps(wide, from) : _mm512_setzero_ps(),
                         left > 1 ? _mm512_maskz_loadu_ps(wide, from + src_stride) : _mm512_setzero_ps());
      for (int i = 0; i < kParts; ++i) tiles[i][r] = pairs[i];
    }
    store_tiles<kParts>(dst, part_step, tiles, transpose);
  }
}

// The next square of a panel that lies transposed: the halves of its columns take turns, then those of a
// step. And a request for what will be turned some steps later.
__attribute__((noinline)) void turn_square(PanelPack* p) {
  constexpr int64_t kAhead = 128;  // numbers of the reduction
  const int64_t half = p->squares % 2 * 16, k = p->squares / 2 * 16, depth = 2 * p->pairs;
  const float* const src = p->src + half * p->src_stride;
  const float* wanted = src + k + kAhead;
  if (k + kAhead >= depth && p->after) wanted = p->after + half * p->src_stride + k + kAhead - depth;
  __m512i x[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    const bool is = half + i < p->cols;
    x[i] = is ? _mm512_loadu_si512(src + i * p->src_stride + k) : _mm512_setzero_si512();
    _mm_prefetch(reinterpret_cast<const char*>(wanted + i * p->src_stride), _MM_HINT_T1);
  }
  transpose_16x16(x);
  float* const to = p->turned + k % (2 * kBf16Step) * kGemmPanel + half;
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) _mm512_store_si512(to + i * kGemmPanel, x[i]);
  ++p->squares;
}

// Where a panel that is packed comes from and goes to (PanelPack): rows as they lie, rows that are turned
// before, or rows as they lie through the ring of a stream; or none is packed, B lies as bf16.
enum class Source { kPlain, kTurned, kStream, kLying };

// Packs `pairs` pairs of rows of a panel, spread evenly over `places` calls of some(): in bunches they would
// hold up the tiles that multiply beside, whose loads wait behind them. And asks for what will be packed some
// pairs later. Of a stream fewer are packed where it ends.
template <int kParts, Source kSource>
class Packing {
 public:
  Packing(PanelPack* next, int64_t pairs, int64_t places)
      : next_(next), pairs_(pairs), places_(places), done_(next->done) {
    stride_ = kTurned ? kGemmPanel : next->src_stride;
    even_ = kTurned ? row_of_turned() : next->src + done_ * 2 * stride_;
    to_ = place();
    left_ = next->pairs - done_ - kAhead;
    wanted_ = left_ > 0 || !next->after ? even_ + kAhead * 2 * stride_ : next->after - left_ * 2 * stride_;
  }
  // After the last call of some().
  void end() { next_->done = done_; }

  __attribute__((always_inline)) void some() {
    for (due_ += pairs_; due_ >= places_; due_ -= places_) {
      if (!kStream || done_ < next_->pairs) pair();
    }
  }

 private:
  static constexpr bool kTurned = kSource == Source::kTurned, kStream = kSource == Source::kStream;
  static constexpr int64_t kAhead = kStream ? 64 : 32;  // pairs
  static constexpr int64_t kStepPairs = 16;             // in a step
  static constexpr int64_t kPairNumbers = 32;
  static constexpr int64_t kStepNumbers = kParts * 2 * kBf16Tile;

  uint16_t* place() const {
    const int64_t step = kStream ? done_ / kStepPairs % kStreamSteps : done_ / kStepPairs;
    return next_->dst + step * kStepNumbers + done_ % kStepPairs * kPairNumbers;
  }
  const float* row_of_turned() const { return next_->turned + done_ % (2 * kStepPairs) * 2 * kGemmPanel; }

  // A square of the step that follows for every four pairs.
  __attribute__((noinline)) void turn() {
    const int64_t steps = next_->pairs / kStepPairs, step = done_ / kStepPairs;
    const int64_t needed = 4 * step + 4 + done_ % kStepPairs / 4 + 1;
    while (next_->squares < needed && next_->squares < 4 * steps) turn_square(next_);
  }

  __attribute__((always_inline)) void pair() {
    if (kTurned && done_ % 4 == 0) turn();
    const float* const odd = even_ + stride_;
    if (!kTurned) {
      const float* const lines[] = {wanted_, wanted_ + 16, wanted_ + stride_, wanted_ + stride_ + 16};
      for (const float* const line : lines) _mm_prefetch(reinterpret_cast<const char*>(line), _MM_HINT_T1);
      wanted_ += 2 * stride_;
      if (--left_ == 0 && next_->after) wanted_ = next_->after;
    }
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      __m512i parts[kParts];
      join_pairs<kParts>(parts, _mm512_loadu_ps(even_ + half * 16), _mm512_loadu_ps(odd + half * 16));
      for (int i = 0; i < kParts; ++i) _mm512_store_si512(to_ + (2 * i + half) * kBf16Tile, parts[i]);
    }
    even_ += 2 * stride_;
    to_ += kPairNumbers;
    if (++done_ % kStepPairs == 0) {
      to_ = place();
      if (kTurned) even_ = row_of_turned();
    }
  }

  PanelPack* next_;
  int64_t pairs_, places_;
  int64_t done_;         // of the panel
  int64_t stride_;       // floats between rows
  const float* even_;    // the next pair
  uint16_t* to_;         // its place in the first part
  const float* wanted_;  // what is asked for
  int64_t left_;         // pairs until that is the panel after this one
  int64_t due_ = 0;
};

}  // namespace
}  // namespace dn::cpu
