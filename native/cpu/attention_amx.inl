// What the vector units do between the products of tiles in attention_amx.cpp: probabilities of a pair of
// strips of queries, and packing of the next block of keys and values. Each is cut into pieces of some dozens
// of instructions. Everything has internal linkage.

#include "cpu/attention_forward.inl"
#include "cpu/gemm_bf16_tiles.inl"

namespace dn::cpu {
namespace {

constexpr int kParts = 3;
constexpr int64_t kPair = 32;                         // queries, in two halves
constexpr int64_t kHalf = 16;                         // of them; keys or numbers of a head in a strip
constexpr int64_t kStripStep = kParts * kBf16Tile;    // numbers of a step of one strip of A
constexpr int64_t kPairStep = 2 * kStripStep;         // of B, for a pair
constexpr int64_t kKeySteps = kKeyBlock / kBf16Step;  // of the reduction over a block of keys

// What a pair of strips has in scratch.
struct Pair {
  const uint16_t* q;  // B: [step of HS][part][half]
  float* acc;         // (HS, kPair)
  float* max;         // (kPair): what scores are taken relative to
  float* sum;         // (2, kPair), of the lower and the upper keys of a step
  float* scores;      // (kKeyBlock, kPair)
  uint16_t* p;        // B: [step of keys][part][half]
};

// The softmax of a pair over a block of keys, `columns` of them with those past the end, which nobody sees.
// First pieces that find the maxima (kMaxKeys keys each), then settle(), then pieces that turn scores into
// probabilities (two keys each, which lie half a step apart).
class Softmax {
 public:
  static constexpr int64_t kMaxKeys = 8;
  static constexpr float kSlack = 8;

  // words: of the pair's queries, or null when every query sees all keys.
  Softmax(const Pair& pair, int64_t columns, const uint64_t* words)
      : pair_(pair), words_(words), max_pieces_(columns / kMaxKeys), pieces_(columns / 2) {
    max_[0] = max_[1] = _mm512_set1_ps(-simd::kInfinity);
  }

  int64_t max_pieces() const { return max_pieces_; }
  int64_t pieces() const { return pieces_; }

  __attribute__((noinline)) void max_piece() {
    float* scores = pair_.scores + max_done_ * kMaxKeys * kPair;
    if (words_) {
      for (int half = 0; half < 2; ++half) hide_unseen(scores + half * kHalf, words_ + half * kHalf);
    }
    __m512 max[2][2];
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      max[half][0] = max_[half];
      max[half][1] = _mm512_load_ps(scores + kPair + half * kHalf);
    }
#pragma GCC unroll 8
    for (int j = 0; j < kMaxKeys; ++j) {
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half)
        max[half][j % 2] = _mm512_max_ps(max[half][j % 2], _mm512_load_ps(scores + j * kPair + half * kHalf));
    }
    for (int half = 0; half < 2; ++half) max_[half] = _mm512_max_ps(max[half][0], max[half][1]);
    ++max_done_;
  }

  // After the last max_piece(): the running maximum, and what earlier sums must be multiplied with. The
  // maximum of a query stays while a block exceeds it by kSlack at most: its probabilities then reach
  // 2^kSlack, which costs no accuracy in floating point, and sums are rarely rescaled after the first block.
  __attribute__((noinline)) void settle(int64_t HS) {
    const __m512 none = _mm512_set1_ps(-simd::kInfinity);
    __m512 factors[2];
    bool rescale = false;
    for (int half = 0; half < 2; ++half) {
      const __m512 before = _mm512_load_ps(pair_.max + half * kHalf);
      // Not at most: also the first maximum, and NaN, which stays.
      const __mmask16 raised =
          _mm512_cmp_ps_mask(max_[half], _mm512_add_ps(before, _mm512_set1_ps(kSlack)), _CMP_NLE_UQ);
      const __m512 max = _mm512_mask_mov_ps(before, raised, max_[half]);
      _mm512_store_ps(pair_.max + half * kHalf, max);
      // Nothing visible so far: 2^(-inf - 0) = 0.
      max_[half] = _mm512_mask_mov_ps(max, _mm512_cmp_ps_mask(max, none, _CMP_EQ_OQ), _mm512_setzero_ps());
      factors[half] = simd::softmax_exp2(_mm512_sub_ps(before, max_[half]));
      for (int i = 0; i < 2; ++i)
        sum_[i][half] = _mm512_mul_ps(_mm512_load_ps(pair_.sum + i * kPair + half * kHalf), factors[half]);
      // Sums of queries that have seen nothing are 0.
      rescale |= _mm512_mask_cmp_ps_mask(raised, before, none, _CMP_NEQ_UQ) != 0;
    }
    if (!rescale) return;
    for (float* acc = pair_.acc; acc < pair_.acc + HS * kPair; acc += kPair) {
      _mm512_store_ps(acc, _mm512_mul_ps(_mm512_load_ps(acc), factors[0]));
      _mm512_store_ps(acc + kHalf, _mm512_mul_ps(_mm512_load_ps(acc + kHalf), factors[1]));
    }
  }

  __attribute__((noinline)) void piece() {
    const uint64_t step = done_ / kHalf, row = done_ % kHalf;
    const float* const lower_scores = pair_.scores + (step * kBf16Step + row) * kPair;
    const float* const upper_scores = lower_scores + kHalf * kPair;
    uint16_t* const p = pair_.p + step * kPairStep + row * kBf16Step;
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const __m512 max = max_[half];
      const __m512 lower =
          simd::softmax_exp2(_mm512_sub_ps(_mm512_load_ps(lower_scores + half * kHalf), max));
      const __m512 upper =
          simd::softmax_exp2(_mm512_sub_ps(_mm512_load_ps(upper_scores + half * kHalf), max));
      sum_[0][half] = _mm512_add_ps(sum_[0][half], lower);
      sum_[1][half] = _mm512_add_ps(sum_[1][half], upper);
      __m512i parts[kParts];
      join_pairs<kParts>(parts, lower, upper);
      for (int i = 0; i < kParts; ++i) _mm512_store_si512(p + (2 * i + half) * kBf16Tile, parts[i]);
    }
    ++done_;
  }

  // After the last piece().
  void end() const {
    for (int half = 0; half < 2; ++half) {
      for (int i = 0; i < 2; ++i) _mm512_store_ps(pair_.sum + i * kPair + half * kHalf, sum_[i][half]);
    }
  }

 private:
  // Scores of the piece's keys that a query does not see become -inf.
  void hide_unseen(float* scores, const uint64_t* words) const {
    const __m512i low = _mm512_loadu_si512(words), high = _mm512_loadu_si512(words + 8);
    for (uint64_t j = 0; j < kMaxKeys; ++j, scores += kPair) {
      const uint64_t key = static_cast<uint64_t>(max_done_ * kMaxKeys) + j;
      const __m512i bit = _mm512_set1_epi64(static_cast<int64_t>(uint64_t{1} << key));
      const int seen = _mm512_test_epi64_mask(low, bit) | _mm512_test_epi64_mask(high, bit) << 8;
      _mm512_mask_store_ps(scores, static_cast<__mmask16>(~seen), _mm512_set1_ps(-simd::kInfinity));
    }
  }

  Pair pair_;
  const uint64_t* words_;
  int64_t max_pieces_, pieces_;
  uint64_t max_done_ = 0, done_ = 0;
  __m512 max_[2];
  __m512 sum_[2][2];
};

// Packs a block of keys and values as A of their products, K (keys, HS) as [strip of 16 keys][step of
// HS][part] and V turned, (HS, keys), as [strip of 16 numbers of the head][step of keys][part]; zeros past
// the last key of a step. Numbers pair up as those of queries and probabilities do. And asks the caches for
// the block after that, and for the rows of the result that will be written soon.
class Ahead {
 public:
  Ahead(const ForwardTile& t, const ForwardAhead& ahead, uint16_t* keys, uint16_t* values)
      : ahead_(ahead), HS_(t.HS), to_keys_(keys), to_values_(values) {
    const int64_t columns = (ahead.next.count + kBf16Step - 1) / kBf16Step * kBf16Step;
    key_pieces_ = columns;
    value_pieces_ = columns / kBf16Step * (HS_ / kHalf) * kTilePieces;
    pieces_ = key_pieces_ + value_pieces_ + (ahead.out ? t.rows : 0);
  }

  int64_t left() const { return pieces_ - done_; }

  __attribute__((noinline)) void piece() {
    if (done_ < key_pieces_) {
      key_piece(done_);
    } else if (done_ < key_pieces_ + value_pieces_) {
      value_piece(done_ - key_pieces_);
    } else {
      ask_row_to_write(ahead_.out + (done_ - key_pieces_ - value_pieces_) * ahead_.out_stride, HS_);
    }
    ++done_;
  }

 private:
  static constexpr int64_t kTilePieces = 2 + 8;  // two squares to turn, then two rows of the tile at a time

  __attribute__((always_inline)) void store_row(uint16_t* tiles, const float* row, bool is) {
    __m512i parts[kParts];
    join_pairs<kParts>(parts, is ? _mm512_loadu_ps(row) : _mm512_setzero_ps(),
                       is ? _mm512_loadu_ps(row + kHalf) : _mm512_setzero_ps());
    for (int i = 0; i < kParts; ++i) _mm512_store_si512(tiles + i * kBf16Tile, parts[i]);
  }

  void key_piece(int64_t key) {
    const KeyRows& next = ahead_.next;
    if (key < ahead_.after.count) {
      ask_row(ahead_.after.k + key * ahead_.after.stride, HS_);
      ask_row(ahead_.after.v + key * ahead_.after.stride, HS_);
    }
    uint16_t* to = to_keys_ + key / kHalf * (HS_ / kBf16Step * kStripStep) + key % kHalf * 32;
    for (int64_t d = 0; d < HS_; d += kBf16Step, to += kStripStep)
      store_row(to, next.k + key * next.stride + d, key < next.count);
  }

  // Tile by tile, those of a step of keys together.
  void value_piece(int64_t index) {
    const KeyRows& next = ahead_.next;
    const int64_t tile = index / kTilePieces, part = index % kTilePieces;
    const int64_t step = tile / (HS_ / kHalf), strip = tile % (HS_ / kHalf);
    if (part < 2) {
      const int64_t key = step * kBf16Step + part * kHalf;
      __m512i x[kHalf];
#pragma GCC unroll 16
      for (int i = 0; i < kHalf; ++i) {
        x[i] = key + i < next.count ? _mm512_loadu_si512(next.v + (key + i) * next.stride + strip * kHalf)
                                    : _mm512_setzero_si512();
      }
      transpose_16x16(x);
#pragma GCC unroll 16
      for (int i = 0; i < kHalf; ++i) _mm512_store_si512(turned_ + i * kBf16Step + part * kHalf, x[i]);
      return;
    }
    uint16_t* const to = to_values_ + (strip * kKeySteps + step) * kStripStep;
    for (int64_t r = 2 * (part - 2); r < 2 * (part - 1); ++r)
      store_row(to + r * 32, turned_ + r * kBf16Step, true);
  }

  ForwardAhead ahead_;
  int64_t HS_;
  uint16_t* to_keys_;
  uint16_t* to_values_;
  int64_t key_pieces_, value_pieces_, pieces_;
  int64_t done_ = 0;
  alignas(64) float turned_[kHalf * kBf16Step];  // numbers of the head, keys
};

}  // namespace
}  // namespace dn::cpu
