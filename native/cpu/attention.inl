// The inner loops of attention on vectors, compiled once per instruction set by attention_avx2.cpp and
// attention_avx512.cpp. The meaning of each kernel is in attention_kernels.h, the readable form in
// attention_portable.cpp.
//
// All products go through one register-blocked kernel, tile_product. Every element of a product is one chain
// of fma over the inner index, whatever the size of the tile that holds it, so a query's bits do not depend
// on its neighbours. Keys that a query does not see get probability 0, which adds nothing.
#include "cpu/attention_annealed.inl"
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

static void forward_begin(const ForwardTile& t, const float* q, int64_t q_stride, const ForwardAhead& ahead) {
  ask_ahead(t, ahead, 0, t.rows);
  copy_rows(t.q, q, q_stride, t.rows, t.HS, t.HSp, t.scale * kLog2E);
  for (int64_t i = 0; i < t.rows * t.HSp; ++i) t.acc[i] = 0;
  for (int64_t i = 0; i < t.rows * kSumLanes; ++i) t.sum[i] = 0;
  for (int64_t r = 0; r < t.rows; ++r) t.max[r] = -simd::kInfinity;
}

// Scores of kTileRows queries become probabilities relative to the new maximum; factors (kScoreRows) are what
// earlier sums must be multiplied with. Scores and maxima are in base 2. `columns`: kKeyBlock or less, a
// multiple of kLanes.
static void softmax_rows(const ForwardTile& t, int64_t first, int64_t rows, int64_t columns,
                         const uint64_t* words, float* factors) {
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
    const float block_max = simd::reduce_max(m);
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
    const Vec m = simd::set1(new_max[r]);
    Vec sum = simd::mul(simd::load(t.sum + (first + r) * kSumLanes), simd::set1(factors[r]));
    for (int64_t c = 0; c < columns; c += kLanes) {
      const Vec p = simd::softmax_exp2(simd::sub(simd::load(s + c), m));
      simd::store(s + c, p);
      sum = simd::add(sum, p);
    }
    simd::store(t.sum + (first + r) * kSumLanes, sum);
  }
}

static void forward_block(const ForwardTile& t, const KeyRows& keys, const uint64_t* words,
                          const ForwardAhead& ahead) {
  const int64_t count = keys.count, columns = round_up_lanes(count);
  const uint64_t all = count == kKeyBlock ? ~uint64_t{0} : (uint64_t{1} << count) - 1;
  copy_transposed(t.keys, keys.k, keys.stride, count, t.HS);
  // Few queries read the values once and where they are; otherwise a compact copy avoids conflicts in the
  // cache.
  const bool in_place = t.rows <= kTileRows && t.HS == t.HSp;
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
    product<Start::kZero>(
        {t.scores, kKeyBlock, t.q + first * t.HSp, t.HSp, 1, t.keys, kKeyBlock, t.HS, nullptr}, rows,
        columns);
    alignas(64) float factors[kScoreRows];
    softmax_rows(t, first, rows, columns, row_words, factors);
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

static void backward_begin(const BackwardTile& t, const float* q, int64_t stride, const float* dout,
                           int64_t dout_stride, const float* out, int64_t out_stride, const float* lse,
                           int64_t lse_stride) {
  copy_rows(t.q, q, stride, t.T, t.HS, t.HSp, t.scale);
  copy_rows(t.dout, dout, dout_stride, t.T, t.HS, t.HSp, 1.0f);
  for (int64_t i = 0; i < t.T * t.HSp; ++i) t.dq[i] = 0;
  for (int64_t r = 0; r < t.T; ++r) {
    Vec sum = simd::zero();
    for (int64_t d = 0; d < t.HS; d += kLanes) {
      sum = simd::fma(simd::load(t.dout + r * t.HSp + d), simd::load(out + r * out_stride + d, tail(d, t.HS)),
                      sum);
    }
    t.delta[r] = simd::reduce_add(sum);
    t.lse[r] = lse[r * lse_stride];
  }
}

static void backward_keys(const BackwardTile& t, const float* k, const float* v, int64_t stride) {
  copy_rows(t.keys, k, stride, t.count, t.HS, t.HSp, 1.0f);
  copy_transposed(t.keys_t, k, stride, t.count, t.HS);
  copy_transposed(t.values_t, v, stride, t.count, t.HS);
  for (int64_t i = 0; i < t.count * t.HSp; ++i) t.dk[i] = t.dv[i] = 0;
}

static void backward_block(const BackwardTile& t, int64_t first, int64_t rows, const uint64_t* words) {
  const int64_t columns = round_up_lanes(t.count);
  const uint64_t all = t.count == kKeyBlock ? ~uint64_t{0} : (uint64_t{1} << t.count) - 1;
  const float* const q = t.q + first * t.HSp;
  const float* const dout = t.dout + first * t.HSp;
  product<Start::kZero>({t.p, kKeyBlock, q, t.HSp, 1, t.keys_t, kKeyBlock, t.HS, nullptr}, rows, columns);
  product<Start::kZero>({t.ds, kKeyBlock, dout, t.HSp, 1, t.values_t, kKeyBlock, t.HS, nullptr}, rows,
                        columns);
  for (int64_t r = 0; r < rows; ++r) {
    float* const p_row = t.p + r * kKeyBlock;
    float* const ds_row = t.ds + r * kKeyBlock;
    const Vec lse = simd::set1(t.lse[first + r]), delta = simd::set1(t.delta[first + r]);
    const uint64_t word = words ? words[r] : all;
    for (int64_t c = 0; c < columns; c += kLanes) {
      const Mask on = simd::lanes_of_bits(static_cast<uint32_t>(word >> c));
      const Vec e = simd::softmax_exp(simd::sub(simd::load(p_row + c), lse));
      const Vec p = simd::select(on, e, simd::zero());
      simd::store(p_row + c, p);
      simd::store(ds_row + c, simd::mul(p, simd::sub(simd::load(ds_row + c), delta)));
    }
  }
  product<Start::kAdd>({t.dv, t.HSp, t.p, 1, kKeyBlock, dout, t.HSp, rows, nullptr}, t.count, t.HSp);
  product<Start::kAdd>({t.dk, t.HSp, t.ds, 1, kKeyBlock, q, t.HSp, rows, nullptr}, t.count, t.HSp);
  product<Start::kAdd>({t.dq + first * t.HSp, t.HSp, t.ds, kKeyBlock, 1, t.keys, t.HSp, t.count, nullptr},
                       rows, t.HSp);
}

static void backward_keys_end(const BackwardTile& t, float* dk, float* dv, int64_t stride) {
  write_rows(dk, stride, t.dk, t.count, t.HS, t.HSp, 1.0f);
  write_rows(dv, stride, t.dv, t.count, t.HS, t.HSp, 1.0f);
}

static void backward_end(const BackwardTile& t, float* dq, int64_t stride) {
  write_rows(dq, stride, t.dq, t.T, t.HS, t.HSp, t.scale);
}

}  // namespace
}  // namespace dn::cpu
