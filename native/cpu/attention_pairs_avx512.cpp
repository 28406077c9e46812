// Attention's forward pass where the scores of queries and keys are multiplied in pairs (gemm_kernels.h, and
// isa.h for where that pays); nothing where the compiler has no AVX-512. Values are multiplied by chains of
// fma: a probability near 1 beside many that are nearly 0 would cost pairs the digits of the small ones.
//
// A query, and a key, is scaled by the power of two that brings its root mean square nearest to 1. The
// products of a key's own pairs are subtracted and its scale is undone in one fma; the scale of a query goes
// into the unit of its scores, with 1 / sqrt(HS) and the base of the exponentials. A score depends on its
// query and key alone. A query or a key that is not finite, or whose root mean square is beyond 2^118 (in
// heads of 64; half of it in heads of twice the size), gives NaN.
#include "cpu/attention_kernels.h"

#if defined(__x86_64__) && !defined(_MSC_VER)
#include "cpu/attention_forward_vectors.inl"
#include "cpu/gemm_pairs.inl"

namespace dn::cpu {
namespace {

// Up to kLanes rows of queries or keys of one head, HS floats each, `stride` floats apart.
struct Rows {
  const float* at;
  int64_t stride;
  int64_t count;
  int64_t HS;
};

// The sum of each of kLanes vectors, all added up in the same order; they are lost.
inline Vec sums_of(Vec* v) {
  DN_UNROLL for (int i = 0; i < 8; ++i) {
    v[i] = simd::add(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
  }
  DN_UNROLL for (int i = 0; i < 4; ++i) {  // the lower and the upper halves of each 128 bits
    v[i] = simd::add(_mm512_shuffle_ps(v[2 * i], v[2 * i + 1], 0x44),
                     _mm512_shuffle_ps(v[2 * i], v[2 * i + 1], 0xEE));
  }
  for (int count = 2; count > 0; count /= 2) {  // the even and the odd 128 bits
    DN_UNROLL for (int i = 0; i < count; ++i) {
      v[i] = simd::add(_mm512_shuffle_f32x4(v[2 * i], v[2 * i + 1], 0x88),
                       _mm512_shuffle_f32x4(v[2 * i], v[2 * i + 1], 0xDD));
    }
  }
  return v[0];
}

// The sums of the squares of each row; kShifts: of the row times 2^-exponent.
template <bool kShifts>
static Vec squares_of(const Rows& rows, const float* exponents) {
  Vec squares[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) {
    squares[i] = simd::zero();
    if (i >= rows.count) continue;
    const float* const x = rows.at + i * rows.stride;
    for (int64_t d = 0; d < rows.HS; d += kLanes) {
      Vec v = simd::load(x + d, tail(d, rows.HS));
      if (kShifts) v = _mm512_scalef_ps(v, simd::set1(-exponents[i]));
      squares[i] = simd::fma(v, v, squares[i]);
    }
  }
  return sums_of(squares);
}

// A lane for each row.
struct Scales {
  Vec scale;     // the power of two that brings its root mean square nearest to 1; NaN: it is not finite
  Vec exponent;  // of two, that undoes it
};

// What PairScales (gemm_chunk.h) finds for one row after the other, for all of them at once.
static Scales scales_of(const Rows& rows) {
  const Vec infinity = simd::set1(simd::kInfinity), none = simd::zero();
  Vec squares = squares_of<false>(rows, nullptr), before = none;
  const Mask lanes = simd::first_lanes(static_cast<int>(rows.count));
  Mask finite = lanes;
  const Mask usual = simd::less(simd::set1(0x1p-80f), squares) & simd::less(squares, simd::set1(0x1p100f));
  if ((usual & lanes) != lanes) {
    // Squares have half the range of numbers: those of unusual rows are taken of numbers near 1.
    alignas(64) float sizes[kLanes] = {}, exponents[kLanes];
    for (int64_t i = 0; i < rows.count; ++i) {
      Vec most = none;
      for (int64_t d = 0; d < rows.HS; d += kLanes) {
        const Vec x = simd::abs(simd::load(rows.at + i * rows.stride + d, tail(d, rows.HS)));
        most = simd::max(most, simd::select(simd::less(x, infinity), x, infinity));
      }
      sizes[i] = simd::reduce_max(most);
    }
    const Vec most = simd::load(sizes);
    finite = simd::less(most, infinity);
    const Mask shifted = static_cast<Mask>(~usual) & finite & simd::less(none, most);
    before = simd::select(shifted, _mm512_getexp_ps(most), none);
    simd::store(exponents, before);
    squares = squares_of<true>(rows, exponents);
  }
  // 2^e <= mean square < 2^(e + 1): its root is nearest to 2^floor((e + 1) / 2), in proportion.
  const Vec one = simd::set1(1.0f), mean = simd::mul(squares, simd::set1(1.0f / static_cast<float>(rows.HS)));
  const Vec half = simd::mul(simd::add(_mm512_getexp_ps(mean), one), simd::set1(0.5f));
  Vec exponent = _mm512_roundscale_ps(half, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  exponent = simd::max(simd::set1(-126.0f), simd::add(exponent, before));
  // Sums of up to 2 HS are multiplied by 2^exponent: what could overflow is as good as infinite.
  const int most_exponent = 126 - (64 - __builtin_clzll(2 * static_cast<unsigned long long>(rows.HS)));
  finite &= static_cast<Mask>(~simd::less(simd::set1(static_cast<float>(most_exponent)), exponent));
  exponent = simd::select(simd::less(none, squares) & finite, exponent, none);
  const Vec scale = _mm512_scalef_ps(one, simd::sub(none, exponent));
  return {simd::select(finite, scale, simd::set1(__builtin_nanf(""))), exponent};
}

// dst (HS, kLanes), `stride` floats from step to step = the transpose of the rows times their scales, zeros
// for rows that are not there. What a step has beyond `stride` lanes the next one takes, and after the last
// one whoever comes next. Returns the sums of the products of the rows' pairs, in the order in which
// multiply_steps adds them up: against zeros a score is exactly 0.
static Vec pack(float* dst, int64_t stride, const Rows& rows, Vec scale) {
  alignas(64) float scales[kLanes];
  simd::store(scales, scale);
  for (int64_t d = 0; d < rows.HS; d += kLanes) {
    const Mask lanes = tail(d, rows.HS);
    Vec v[kLanes];
    DN_UNROLL for (int i = 0; i < kLanes; ++i) {
      v[i] = i < rows.count
                 ? simd::mul(simd::load(rows.at + i * rows.stride + d, lanes), simd::set1(scales[i]))
                 : simd::zero();
    }
    transpose_lanes(v);
    DN_UNROLL for (int i = 0; i < kLanes; ++i) {
      if (d + i < rows.HS) simd::store(dst + (d + i) * stride, v[i]);
    }
  }
  Vec sums = simd::zero();
  for (int64_t d = 0; d + kPairGroup <= rows.HS; d += kPairGroup) {
    const float* const step = dst + d * stride;
    sums = simd::fma(simd::load(step), simd::load(step + stride), sums);
    sums = simd::fnma(simd::load(step + 3 * stride), simd::load(step + 4 * stride), sums);
  }
  return sums;
}

// Queries lie in groups of kTileRows: (HS, kTileRows), the sums of their pairs, their units.
constexpr int64_t kQueryExtra = 2;  // numbers of a query beyond HS

class PairScores {
 public:
  static constexpr bool kHasUnits = true;

  static void load_queries(const ForwardTile& t, const float* q, int64_t q_stride) {
    for (int64_t first = 0; first < t.rows; first += kTileRows) {
      const int64_t count = t.rows - first < kTileRows ? t.rows - first : kTileRows;
      const Rows rows = {q + first * q_stride, q_stride, count, t.HS};
      const Scales of = scales_of(rows);
      float* const group = t.q + first * (t.HS + kQueryExtra);
      const Vec sums = pack(group, kTileRows, rows, of.scale);
      simd::store_n(group + t.HS * kTileRows, sums, kTileRows);
      simd::store_n(group + (t.HS + 1) * kTileRows,
                    _mm512_scalef_ps(simd::set1(t.scale * kLog2E), of.exponent), kTileRows);
    }
  }

  PairScores(const ForwardTile& tile, const KeyRows& keys) : t(tile) {
    for (int64_t j = 0; j < keys.count; j += kLanes) {
      const int64_t count = keys.count - j < kLanes ? keys.count - j : kLanes;
      const Rows rows = {keys.k + j * keys.stride, keys.stride, count, t.HS};
      const Scales of = scales_of(rows);
      const Vec sums = pack(t.keys + j, kKeyBlock, rows, of.scale);
      simd::store(sums_ + j, _mm512_scalef_ps(sums, of.exponent));
      simd::store(powers_ + j, _mm512_scalef_ps(simd::set1(1.0f), of.exponent));
    }
  }

  void multiply(int64_t first, int64_t rows, int64_t columns) const {
    int64_t col = 0;
    for (; col + 2 * kLanes <= columns; col += 2 * kLanes) strip<2>(first, rows, col);
    if (col < columns) strip<1>(first, rows, col);
  }
  const float* units(int64_t first) const {
    return t.q + first * (t.HS + kQueryExtra) + (t.HS + 1) * kTileRows;
  }

 private:
  // Rows beyond `rows` are zeros, for which t.scores has room.
  template <int V>
  void strip(int64_t first, int64_t rows, int64_t col) const {
    rows <= 4 ? tile<4, V>(first, col) : rows <= 8 ? tile<8, V>(first, col) : tile<12, V>(first, col);
  }

  template <int kRows, int V>
  void tile(int64_t first, int64_t col) const {
    const float* a = t.q + first * (t.HS + kQueryExtra);
    const float* b = t.keys + col;
    Vec sum[kRows][V];
    DN_UNROLL for (int r = 0; r < kRows; ++r) {
      DN_UNROLL for (int v = 0; v < V; ++v) sum[r][v] = simd::zero();
    }
    const auto next = [&](Vec * row) __attribute__((always_inline)) {
      DN_UNROLL for (int v = 0; v < V; ++v) row[v] = simd::load(b + v * kLanes);
      b += kKeyBlock;
    };
    Vec b1[V], b2[V], b3[V];
    for (int64_t i = t.HS / kPairGroup; i > 0; --i) {
      next(b1);
      next(b2);
      next(b3);
      multiply_steps<kRows, V, kTileRows, false>(sum, b1, b2, b3, a);
      next(b1);
      next(b2);
      next(b3);
      multiply_steps<kRows, V, kTileRows, true>(sum, b1, b2, b3, a + 3 * kTileRows);
      a += kPairGroup * kTileRows;
    }
    for (int64_t i = t.HS % kPairGroup; i > 0; --i) {
      next(b1);
      DN_UNROLL for (int r = 0; r < kRows; ++r) {
        DN_UNROLL for (int v = 0; v < V; ++v) multiply_add(sum[r][v], b1[v], a + r);
      }
      a += kTileRows;
    }
    // a is at the sums of the queries' pairs.
    DN_UNROLL for (int v = 0; v < V; ++v) {
      const Vec sums = simd::load(sums_ + col + v * kLanes), power = simd::load(powers_ + col + v * kLanes);
      DN_UNROLL for (int r = 0; r < kRows; ++r) {
        simd::store(t.scores + r * kKeyBlock + col + v * kLanes,
                    simd::fms(subtract(sum[r][v], a + r), power, sums));
      }
    }
  }

  const ForwardTile& t;
  alignas(64) float sums_[kKeyBlock];    // of the keys' pairs, their scale undone
  alignas(64) float powers_[kKeyBlock];  // that undo the scales of the keys
};

}  // namespace

const AttentionForward kAttentionForwardPairs = {kVectorRows,
                                                 kTileRows,
                                                 sizeof(float),
                                                 1,
                                                 kVectorScores,
                                                 kQueryExtra,
                                                 forward_begin<PairScores>,
                                                 forward_block<PairScores>,
                                                 forward_end};

}  // namespace dn::cpu

#else

namespace dn::cpu {
const AttentionForward kAttentionForwardPairs = {};
}  // namespace dn::cpu

#endif
