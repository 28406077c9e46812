// Attention's forward pass on vectors, for the kernels that multiply queries and keys as `Scores` does:
//
//   static void load_queries(const ForwardTile& t, const float* q, int64_t q_stride);
//   Scores(const ForwardTile& t, const KeyRows& keys);  // packs a block of keys into t.keys, if need be
//   // t.scores (rows, columns) of queries [first, first + rows), at most kTileRows
//   void multiply(int64_t first, int64_t rows, int64_t columns) const;
//   static constexpr bool kHasUnits;          // whether scores have units, see softmax_rows
//   const float* units(int64_t first) const;  // of queries from `first` on
//
// Keys that a query does not see get probability 0, which adds nothing. Everything has internal linkage.
#include "cpu/attention_forward.inl"
#include "cpu/attention_product.inl"

namespace dn::cpu {
namespace {

inline int64_t round_up_lanes(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// The share of the requests that falls to queries [first, first + rows) of the tile; of few queries none,
// which have too little work to spread them over.
__attribute__((always_inline)) inline void ask_ahead(const ForwardTile& t, const ForwardAhead& ahead,
                                                     int64_t first, int64_t rows) {
  if (t.rows <= kFewQueries) return;
  const KeyRows& next = ahead.next;
  const int64_t end = next.count * (first + rows) / t.rows;
  for (int64_t j = next.count * first / t.rows; j < end; ++j) {
    ask_row(next.k + j * next.stride, t.HS);
    ask_row(next.v + j * next.stride, t.HS);
  }
  if (ahead.out == nullptr) return;
  for (int64_t r = first; r < first + rows; ++r) ask_row_to_write(ahead.out + r * ahead.out_stride, t.HS);
}

template <class Scores>
static void forward_begin(const ForwardTile& t, const float* q, int64_t q_stride, const ForwardAhead& ahead) {
  ask_ahead(t, ahead, 0, t.rows);
  Scores::load_queries(t, q, q_stride);
  for (int64_t i = 0; i < t.rows * t.HSp; ++i) t.acc[i] = 0;
  for (int64_t i = 0; i < t.rows * kSumLanes; ++i) t.sum[i] = 0;
  for (int64_t r = 0; r < t.rows; ++r) t.max[r] = -simd::kInfinity;
}

// Scores of kTileRows queries become probabilities relative to the new maximum; factors (kScoreRows) are what
// earlier sums must be multiplied with. Maxima are in base 2, scores in units of their own for each query, or
// null: in base 2, too. `columns`: kKeyBlock or less, a multiple of kLanes.
template <bool kHasUnits>
static void softmax_rows(const ForwardTile& t, int64_t first, int64_t rows, int64_t columns,
                         const uint64_t* words, const float* units, float* factors) {
  const Vec minus_infinity = simd::set1(-simd::kInfinity);
  alignas(64) float old_max[kScoreRows], new_max[kScoreRows];
  for (int64_t r = 0; r < rows; ++r) {
    float* const s = t.scores + r * kKeyBlock;
    Vec m = minus_infinity;
    if (words[r] == ~uint64_t{0}) {
      for (int64_t c = 0; c < columns; c += kLanes) m = simd::max(m, simd::load(s + c));
    } else {
      for (int64_t c = 0; c < columns; c += kLanes) {
        const Mask on = simd::lanes_of_bits(static_cast<uint32_t>(words[r] >> c));
        const Vec masked = simd::select(on, simd::load(s + c), minus_infinity);
        simd::store(s + c, masked);
        m = simd::max(m, masked);
      }
    }
    const float block_max = kHasUnits ? simd::reduce_max(m) * units[r] : simd::reduce_max(m);
    old_max[r] = t.max[first + r];
    new_max[r] = block_max <= old_max[r] ? old_max[r] : block_max;  // NaN: the block's
    t.max[first + r] = new_max[r];
    if (new_max[r] == -simd::kInfinity) new_max[r] = 0;  // nothing visible so far: e^(-inf - 0) = 0 below
  }
  for (int64_t r = rows; r < kScoreRows; ++r) old_max[r] = new_max[r] = 0;
  for (int64_t r = 0; r < kScoreRows; r += kLanes) {
    simd::store(factors + r, simd::softmax_exp2(simd::sub(simd::load(old_max + r), simd::load(new_max + r))));
  }
  for (int64_t r = 0; r < rows; ++r) {
    float* const s = t.scores + r * kKeyBlock;
    const Vec m = simd::set1(new_max[r]), unit = simd::set1(kHasUnits ? units[r] : 1.0f);
    Vec sum = simd::mul(simd::load(t.sum + (first + r) * kSumLanes), simd::set1(factors[r]));
    for (int64_t c = 0; c < columns; c += kLanes) {
      const Vec score = simd::load(s + c);
      const Vec p = simd::softmax_exp2(kHasUnits ? simd::fms(score, unit, m) : simd::sub(score, m));
      simd::store(s + c, p);
      sum = simd::add(sum, p);
    }
    simd::store(t.sum + (first + r) * kSumLanes, sum);
  }
}

template <class Scores>
static void forward_block(const ForwardTile& t, const KeyRows& keys, const uint64_t* words,
                          const ForwardAhead& ahead) {
  const int64_t count = keys.count, columns = round_up_lanes(count);
  const uint64_t all = count == kKeyBlock ? ~uint64_t{0} : (uint64_t{1} << count) - 1;
  const Scores scores(t, keys);
  // Few queries read the values once and where they are; otherwise a compact copy, unless they are compact,
  // avoids conflicts in the cache.
  const bool in_place = (t.rows <= kTileRows || keys.stride == t.HS) && t.HS == t.HSp;
  const float* const values = in_place ? keys.v : t.values;
  const int64_t values_stride = in_place ? keys.stride : t.HSp;
  if (!in_place) copy_rows(t.values, keys.v, keys.stride, count, t.HS, t.HSp, 1.0f);
  for (int64_t first = 0; first < t.rows; first += kTileRows) {
    const int64_t rows = t.rows - first < kTileRows ? t.rows - first : kTileRows;
    uint64_t row_words[kTileRows];
    uint64_t any = 0;
    ask_ahead(t, ahead, first, rows);
    for (int64_t r = 0; r < rows; ++r) any |= row_words[r] = words ? words[first + r] : all;
    if (any == 0) continue;
    scores.multiply(first, rows, columns);
    alignas(64) float factors[kScoreRows];
    softmax_rows<Scores::kHasUnits>(t, first, rows, columns, row_words, scores.units(first), factors);
    product<Start::kScale>(
        {t.acc + first * t.HSp, t.HSp, t.scores, kKeyBlock, 1, values, values_stride, count, factors}, rows,
        t.HSp);
  }
}

static void forward_end(const ForwardTile& t, float* out, int64_t out_stride, float* lse,
                        int64_t lse_stride) {
  for (int64_t r = 0; r < t.rows; ++r) {
    const float sum = simd::reduce_add(simd::load(t.sum + r * kSumLanes));
    const bool visible = t.max[r] != -simd::kInfinity;
    const Vec inverse = simd::set1(visible ? 1.0f / sum : 0.0f);
    for (int64_t d = 0; d < t.HS; d += kLanes) {
      simd::store(out + r * out_stride + d, simd::mul(simd::load(t.acc + r * t.HSp + d), inverse),
                  tail(d, t.HS));
    }
    if (lse) {
      const Vec logarithm = simd::fma(simd::set1(t.max[r]), simd::set1(kLn2), simd::log(simd::set1(sum)));
      simd::store_n(lse + r * lse_stride, visible ? logarithm : simd::zero(), 1);
    }
  }
}

}  // namespace
}  // namespace dn::cpu
