// Attention's forward pass on AMX tiles of bf16, numbers in three parts (gemm_kernels.h): fp32 in and out, no
// lower precision.
//
// All of it lies turned: scores are (keys, queries) and sums (HS, queries), keys and values are the A of
// their products. A softmax over keys is then a loop over vectors whose lanes are queries, without a
// reduction inside a vector, and probabilities of two keys join into what tiles want of B: numbers in pairs.
// A pair is a number of the lower and one of the upper half of a step, sixteen apart. The unit is a pair
// of strips of 16 queries. While the vector units turn the scores of a pair into probabilities, tiles
// multiply the keys for the next pair and the values for the one before; in between the next block of keys is
// packed.
//
// Every cell of a tile is one chain of sums over the reduction in steps of 32, whatever the other cells hold:
// a query's bits do not depend on its neighbours. Keys that a query does not see have probability 0.
#include "cpu/attention_kernels.h"

#if defined(__x86_64__) && defined(__AMX_TILE__) && defined(__AMX_BF16__)
#include <immintrin.h>
#include <string.h>

#include "cpu/attention_amx.inl"

namespace dn::cpu {
namespace {

constexpr int64_t kMostPairs = 32;  // of a task: they share the packing of keys
static_assert(kMostPairs * kPair <= kMaxQueryBlock, "callers have words for kMaxQueryBlock queries");
constexpr int64_t kScores = kKeyBlock * kPair;                 // floats: scores of a pair
constexpr int64_t kProbabilities = kKeySteps * kPairStep / 2;  // floats: probabilities of a pair, packed

uint16_t* numbers(float* x) { return reinterpret_cast<uint16_t*>(x); }

// Pairs that follow each other have scores and probabilities of their own.
Pair pair_of(const ForwardTile& t, int64_t index, int64_t turn) {
  float* const buffer = t.scores + turn % 2 * (kScores + kProbabilities);
  return {numbers(t.q) + index * (t.HS / kBf16Step * kPairStep),
          t.acc + index * t.HS * kPair,
          t.max + index * kPair,
          t.sum + index * 2 * kPair,
          buffer,
          numbers(buffer + kScores)};
}

// What is done between the products of a stage: pieces of three kinds, one after the other, spread evenly
// over the `places` of the stage. In bunches they would hold up the tiles, whose loads wait behind them.
class Stage {
 public:
  explicit Stage(int64_t places) : places_(places) {}

  void add_probabilities(Softmax* softmax, int64_t pieces) {
    probabilities_ = softmax;
    probabilities_end_ = pieces_ += pieces;
  }
  void add_maxima(Softmax* softmax) {
    maxima_ = softmax;
    maxima_end_ = pieces_ += softmax->max_pieces();
  }
  void add_ahead(Ahead* ahead, int64_t pieces) {
    ahead_ = ahead;
    pieces_ += pieces;
  }

  __attribute__((always_inline)) void some() {
    for (due_ += pieces_; due_ >= places_; due_ -= places_) piece();
  }
  // Without products.
  void all() {
    while (done_ < pieces_) piece();
  }

 private:
  __attribute__((noinline)) void piece() {
    if (done_ < probabilities_end_) {
      probabilities_->piece();
    } else if (done_ < maxima_end_) {
      maxima_->max_piece();
    } else {
      ahead_->piece();
    }
    ++done_;
  }

  Softmax* probabilities_ = nullptr;
  Softmax* maxima_ = nullptr;
  Ahead* ahead_ = nullptr;
  int64_t places_;
  int64_t pieces_ = 0, probabilities_end_ = 0, maxima_end_ = 0;
  int64_t due_ = 0, done_ = 0;
};

// A block of keys and values, packed.
struct Block {
  const uint16_t* keys;
  const uint16_t* values;
  int64_t steps;  // of 32 keys
  int64_t HS;

  int64_t places() const { return steps * (HS / kBf16Step) * places_in_step(kParts); }
};

// scores = K q
void multiply_keys(const Block& block, const Pair& pair, Stage* stage) {
  const int64_t steps = block.HS / kBf16Step, strip = steps * kStripStep;
  const uint16_t* keys = block.keys;
  for (int64_t i = 0; i < block.steps; ++i, keys += 2 * strip) {
    zero_c<true>();
    multiply_steps<kParts, true>(keys, keys + strip, pair.q, steps, *stage);
    store_c<true>(pair.scores + i * kBf16Step * kPair, kPair);
  }
}

// acc += V^T p
void multiply_values(const Block& block, const Pair& pair, Stage* stage) {
  constexpr int64_t strip = kKeySteps * kStripStep;
  const uint16_t* values = block.values;
  for (int64_t d = 0; d < block.HS; d += 2 * kHalf, values += 2 * strip) {
    load_c<true>(pair.acc + d * kPair, kPair);
    multiply_steps<kParts, true>(values, values + strip, pair.p, block.steps, *stage);
    store_c<true>(pair.acc + d * kPair, kPair);
  }
}

void forward_begin(const ForwardTile& t, const float* q, int64_t q_stride, const ForwardAhead& ahead) {
  for (int64_t j = 0; j < ahead.next.count; ++j) {
    ask_row(ahead.next.k + j * ahead.next.stride, t.HS);
    ask_row(ahead.next.v + j * ahead.next.stride, t.HS);
  }
  const __m512 scale = _mm512_set1_ps(t.scale * kLog2E);
  const int64_t all_rows = (t.rows + kPair - 1) / kPair * kPair;
  __m512i tiles[kParts][kHalf], row[kParts];
  for (int64_t first = 0; first < all_rows; first += kHalf) {
    const int64_t count = t.rows - first < kHalf ? t.rows - first : kHalf;
    uint16_t* to =
        numbers(t.q) + first / kPair * (t.HS / kBf16Step * kPairStep) + first / kHalf % 2 * kBf16Tile;
    for (int64_t d = 0; d < t.HS; d += kBf16Step, to += kPairStep) {
      for (int64_t r = 0; r < kHalf; ++r) {
        __m512 lower = _mm512_setzero_ps(), upper = _mm512_setzero_ps();
        if (r < count) {
          const float* const from = q + (first + r) * q_stride + d;
          simd::prefetch(from + kPair * q_stride);
          simd::prefetch(from + kPair * q_stride + kHalf);
          lower = _mm512_mul_ps(_mm512_loadu_ps(from), scale);
          upper = _mm512_mul_ps(_mm512_loadu_ps(from + kHalf), scale);
        }
        join_pairs<kParts>(row, lower, upper);
        for (int i = 0; i < kParts; ++i) tiles[i][r] = row[i];
      }
      store_tiles<kParts>(to, 2 * kBf16Tile, tiles, true);
    }
  }
  memset(t.acc, 0, static_cast<size_t>(all_rows * t.HS) * sizeof(float));
  memset(t.sum, 0, static_cast<size_t>(all_rows * 2) * sizeof(float));
  for (int64_t r = 0; r < all_rows; ++r) t.max[r] = -simd::kInfinity;
}

void forward_block(const ForwardTile& t, const KeyRows& keys, const uint64_t* words,
                   const ForwardAhead& ahead) {
  const int64_t steps = (keys.count + kBf16Step - 1) / kBf16Step, columns = steps * kBf16Step;
  const uint64_t all = keys.count == kKeyBlock ? ~uint64_t{0} : (uint64_t{1} << keys.count) - 1;
  const bool masked = words || keys.count < columns;
  uint64_t seen[kMostPairs][kPair];  // by the queries of a pair
  int64_t pairs[kMostPairs], count = 0;
  for (int64_t first = 0; first < t.rows; first += kPair) {
    uint64_t any = masked ? 0 : 1;
    for (int64_t r = 0; masked && r < kPair; ++r)
      any |= seen[count][r] = first + r >= t.rows ? 0 : words ? words[first + r] : all;
    if (any != 0) pairs[count++] = first / kPair;
  }
  if (count == 0) return;

  const int64_t buffer = kParts * kKeyBlock * t.HS;
  const auto keys_at = [&](int64_t turn) { return numbers(t.keys) + turn * buffer; };
  const auto values_at = [&](int64_t turn) { return numbers(t.values) + turn * buffer; };
  const int64_t turn = t.packed->turn;

  begin();
  asm volatile("" ::: "memory");  // the compiler does not know that tile loads read memory
  if (t.packed->k != keys.k) {
    ForwardAhead now;
    now.next = keys;
    Ahead pack(t, now, keys_at(turn), values_at(turn));
    while (pack.left() > 0) pack.piece();
  }
  const Block block = {keys_at(turn), values_at(turn), steps, t.HS};
  Ahead next(t, ahead, keys_at(1 - turn), values_at(1 - turn));
  const int64_t share = (next.left() + 2 * count - 1) / (2 * count);  // of a stage
  const auto add_ahead = [&](Stage* stage) {
    stage->add_ahead(&next, next.left() < share ? next.left() : share);
  };

  const auto softmax_of = [&](int64_t i) {
    return Softmax(pair_of(t, pairs[i], i), columns, masked ? seen[i] : nullptr);
  };
  Stage before(block.places());
  add_ahead(&before);
  multiply_keys(block, pair_of(t, pairs[0], 0), &before);
  Softmax softmax = softmax_of(0);
  for (int64_t j = 0; j < softmax.max_pieces(); ++j) softmax.max_piece();
  softmax.settle(t.HS);
  for (int64_t i = 0; i < count; ++i) {
    const bool is_first = i == 0, is_last = i + 1 == count;
    Softmax then = is_last ? softmax : softmax_of(i + 1);
    // Half of the pieces beside the keys for the next pair, half beside the values for the one before.
    const int64_t beside_keys = is_last ? 0 : is_first ? softmax.pieces() : softmax.pieces() / 2;
    if (!is_last) {
      Stage stage(block.places());
      stage.add_probabilities(&softmax, beside_keys);
      add_ahead(&stage);
      multiply_keys(block, pair_of(t, pairs[i + 1], i + 1), &stage);
    }
    Stage stage(block.places());
    stage.add_probabilities(&softmax, softmax.pieces() - beside_keys);
    if (!is_last) stage.add_maxima(&then);
    if (is_first) {
      stage.all();
    } else {
      add_ahead(&stage);
      multiply_values(block, pair_of(t, pairs[i - 1], i - 1), &stage);
    }
    softmax.end();
    if (is_last) break;
    then.settle(t.HS);
    softmax = then;
  }
  Stage after(block.places());
  after.add_ahead(&next, next.left());
  multiply_values(block, pair_of(t, pairs[count - 1], count - 1), &after);
  asm volatile("" ::: "memory");
  end();
  *t.packed = {ahead.next.k, 1 - turn};
}

void forward_end(const ForwardTile& t, float* out, int64_t out_stride, float* lse, int64_t lse_stride) {
  for (int64_t first = 0; first < t.rows; first += kHalf) {
    const int64_t half = first % kPair, count = t.rows - first < kHalf ? t.rows - first : kHalf;
    const Pair pair = pair_of(t, first / kPair, 0);
    const __m512 max = _mm512_load_ps(pair.max + half);
    const __m512 sum =
        _mm512_add_ps(_mm512_load_ps(pair.sum + half), _mm512_load_ps(pair.sum + kPair + half));
    const __mmask16 visible = _mm512_cmp_ps_mask(max, _mm512_set1_ps(-simd::kInfinity), _CMP_NEQ_UQ);
    const __m512 inverse = _mm512_maskz_div_ps(visible, _mm512_set1_ps(1.0f), sum);
    for (int64_t d = 0; d < t.HS; d += kHalf) {
      __m512i rows[kHalf];
#pragma GCC unroll 16
      for (int i = 0; i < kHalf; ++i)
        rows[i] =
            _mm512_castps_si512(_mm512_mul_ps(_mm512_load_ps(pair.acc + (d + i) * kPair + half), inverse));
      transpose_16x16(rows);
      for (int64_t r = 0; r < count; ++r) _mm512_storeu_si512(out + (first + r) * out_stride + d, rows[r]);
    }
    if (!lse) continue;
    const __m512 logarithm = _mm512_fmadd_ps(max, _mm512_set1_ps(kLn2), simd::log(sum));
    alignas(64) float values[kHalf];
    _mm512_store_ps(values, _mm512_maskz_mov_ps(visible, logarithm));
    for (int64_t r = 0; r < count; ++r) lse[(first + r) * lse_stride] = values[r];
  }
}

}  // namespace

const AttentionForward kAttentionForwardAmx = {kMostPairs * kPair,
                                               kPair,
                                               kParts * sizeof(uint16_t),
                                               2,
                                               2 * (kScores + kProbabilities),
                                               0,
                                               forward_begin,
                                               forward_block,
                                               forward_end};

}  // namespace dn::cpu

#else

namespace dn::cpu {
const AttentionForward kAttentionForwardAmx = {};
}  // namespace dn::cpu

#endif
