// The inner loops of attention on vectors, compiled once per instruction set by attention_avx2.cpp and
// attention_avx512.cpp. The meaning of each kernel is in attention_kernels.h, the readable form in
// attention_portable.cpp.
//
// All products go through one register-blocked kernel, tile_product. Every element of a product is one chain
// of fma over the inner index, whatever the size of the tile that holds it, so a query's bits do not depend
// on its neighbours. Keys that a query does not see get probability 0, which adds nothing.
#include "cpu/attention_forward.inl"

#if defined(__clang__)
#define DN_UNROLL _Pragma("unroll")
#elif defined(__GNUC__)
#define DN_UNROLL _Pragma("GCC unroll 16")
#else
#define DN_UNROLL
#endif

namespace dn::cpu {
namespace {

using simd::kLanes;
using simd::Mask;
using simd::Vec;

// Rows of a register tile two vectors wide: 24 of 32 registers are sums with AVX-512, 12 of 16 with AVX2.
constexpr int kTileRows = kLanes == 16 ? 12 : 6;

// Lanes of the vector at c that lie inside [0, n).
inline Mask tail(int64_t c, int64_t n) {
  return simd::first_lanes(n - c < kLanes ? static_cast<int>(n - c) : kLanes);
}

// Where a product starts from: zero, what is there, or what is there times a factor for each row.
enum class Start { kZero, kAdd, kScale };

struct Product {
  float* c;  // (rows, cols), cols a multiple of kLanes
  int64_t c_stride;
  const float* a;  // (rows, n): a[row * a_row + i * a_i]
  int64_t a_row;
  int64_t a_i;
  const float* b;  // (n, cols)
  int64_t b_stride;
  int64_t n;
  const float* factors;  // (rows), for kScale
};

// c[r][0 .. V * kLanes) for R rows.
template <int R, int V, Start kStart>
static inline void tile_product(const Product& p, int64_t row, int64_t col) {
  float* const c = p.c + row * p.c_stride + col;
  const float* const a = p.a + row * p.a_row;
  const float* const b = p.b + col;
  Vec sum[R][V];
  DN_UNROLL for (int r = 0; r < R; ++r) {
    DN_UNROLL for (int v = 0; v < V; ++v) {
      if constexpr (kStart == Start::kZero) {
        sum[r][v] = simd::zero();
      } else {
        sum[r][v] = simd::load(c + r * p.c_stride + v * kLanes);
        if constexpr (kStart == Start::kScale)
          sum[r][v] = simd::mul(sum[r][v], simd::set1(p.factors[row + r]));
      }
    }
  }
  for (int64_t i = 0; i < p.n; ++i) {
    Vec bv[V];
    DN_UNROLL for (int v = 0; v < V; ++v) bv[v] = simd::load(b + i * p.b_stride + v * kLanes);
    DN_UNROLL for (int r = 0; r < R; ++r) {
      const Vec ar = simd::set1(a[r * p.a_row + i * p.a_i]);
      DN_UNROLL for (int v = 0; v < V; ++v) sum[r][v] = simd::fma(ar, bv[v], sum[r][v]);
    }
  }
  DN_UNROLL for (int r = 0; r < R; ++r) {
    DN_UNROLL for (int v = 0; v < V; ++v) simd::store(c + r * p.c_stride + v * kLanes, sum[r][v]);
  }
}

// All rows of a strip V vectors wide, in the largest tiles that fit.
template <int R, int V, Start kStart>
static inline void strip_product(const Product& p, int64_t row, int64_t rows, int64_t col) {
  for (; row + R <= rows; row += R) tile_product<R, V, kStart>(p, row, col);
  if constexpr (R > 1) {
    constexpr int kNext = R == 12 ? 8 : R == 6 ? 4 : R / 2;
    if (row < rows) strip_product<kNext, V, kStart>(p, row, rows, col);
  }
}

template <Start kStart>
static void product(const Product& p, int64_t rows, int64_t cols) {
  int64_t col = 0;
  // One row alone: more columns at once, to have enough independent sums in flight.
  if (rows == 1) {
    for (; col + 4 * kLanes <= cols; col += 4 * kLanes) tile_product<1, 4, kStart>(p, 0, col);
  }
  for (; col + 2 * kLanes <= cols; col += 2 * kLanes) strip_product<kTileRows, 2, kStart>(p, 0, rows, col);
  for (; col < cols; col += kLanes) strip_product<kTileRows, 1, kStart>(p, 0, rows, col);
}

#if defined(__AVX512F__)

// Transposes 16 rows of 16 in registers: pairs, then quads, then 128-bit lanes.
inline void transpose_lanes(Vec* r) {
  Vec t[16];
  DN_UNROLL for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
  DN_UNROLL for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xEE);
    r[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xEE);
  }
  DN_UNROLL for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xDD);
    t[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xDD);
  }
  DN_UNROLL for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xDD);
    r[i + 4] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xDD);
  }
}

// The bits of 32 keys: eight Philox counters, one in each 64-bit lane. A word is the low half of its lane;
// what the high half holds never reaches a low one, because the products read low halves only.
inline uint32_t annealed_half(__m512i c0, uint32_t q, uint32_t step, uint32_t stream, uint64_t seed,
                              uint32_t threshold) {
  __m512i c1 = _mm512_set1_epi64(q), c2 = _mm512_set1_epi64(step), c3 = _mm512_set1_epi64(stream);
  const __m512i m0 = _mm512_set1_epi64(0xD2511F53), m1 = _mm512_set1_epi64(0xCD9E8D57);
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  DN_UNROLL for (int round = 0; round < 10; ++round) {
    const __m512i p0 = _mm512_mul_epu32(m0, c0), p1 = _mm512_mul_epu32(m1, c2);
    c0 = _mm512_xor_si512(_mm512_xor_si512(_mm512_srli_epi64(p1, 32), c1), _mm512_set1_epi64(k0));
    c2 = _mm512_xor_si512(_mm512_xor_si512(_mm512_srli_epi64(p0, 32), c3), _mm512_set1_epi64(k1));
    c1 = p1;
    c3 = p0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  const __m512i low = _mm512_set1_epi64(0xFFFFFFFF), limit = _mm512_set1_epi64(threshold);
  const __m512i words[4] = {c0, c1, c2, c3};
  __m512i bits = _mm512_setzero_si512();
  DN_UNROLL for (int i = 0; i < 4; ++i) {
    const __mmask8 on = _mm512_cmplt_epu64_mask(_mm512_and_si512(words[i], low), limit);
    bits = _mm512_or_si512(bits, _mm512_maskz_set1_epi64(on, 1 << i));
  }
  bits = _mm512_sllv_epi64(bits, _mm512_setr_epi64(0, 4, 8, 12, 16, 20, 24, 28));
  return static_cast<uint32_t>(_mm512_reduce_or_epi64(bits));
}

static uint64_t annealed_word(uint64_t seed, uint32_t stream, uint32_t step, uint32_t threshold, uint32_t q,
                              uint32_t k0) {
  const __m512i first =
      _mm512_add_epi64(_mm512_set1_epi64(k0 / 4), _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7));
  const __m512i second = _mm512_add_epi64(first, _mm512_set1_epi64(8));
  return annealed_half(first, q, step, stream, seed, threshold) |
         static_cast<uint64_t>(annealed_half(second, q, step, stream, seed, threshold)) << 32;
}

#else  // AVX2

inline void transpose_lanes(Vec* r) {
  Vec t[8];
  DN_UNROLL for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  DN_UNROLL for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xEE);
    r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xEE);
  }
  DN_UNROLL for (int i = 0; i < 4; ++i) {
    const Vec low = r[i], high = r[i + 4];
    r[i] = _mm256_permute2f128_ps(low, high, 0x20);
    r[i + 4] = _mm256_permute2f128_ps(low, high, 0x31);
  }
}

// The bits of 16 keys: four Philox counters, one in each 64-bit lane; see the AVX-512 form.
inline uint32_t annealed_quarter(__m256i c0, uint32_t q, uint32_t step, uint32_t stream, uint64_t seed,
                                 uint32_t threshold) {
  __m256i c1 = _mm256_set1_epi64x(q), c2 = _mm256_set1_epi64x(step), c3 = _mm256_set1_epi64x(stream);
  const __m256i m0 = _mm256_set1_epi64x(0xD2511F53), m1 = _mm256_set1_epi64x(0xCD9E8D57);
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  DN_UNROLL for (int round = 0; round < 10; ++round) {
    const __m256i p0 = _mm256_mul_epu32(m0, c0), p1 = _mm256_mul_epu32(m1, c2);
    c0 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p1, 32), c1), _mm256_set1_epi64x(k0));
    c2 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p0, 32), c3), _mm256_set1_epi64x(k1));
    c1 = p1;
    c3 = p0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  const __m256i low = _mm256_set1_epi64x(0xFFFFFFFF), limit = _mm256_set1_epi64x(threshold);
  const __m256i words[4] = {c0, c1, c2, c3};
  uint32_t bits = 0;
  DN_UNROLL for (int i = 0; i < 4; ++i) {
    const __m256i on =
        _mm256_cmpgt_epi64(limit, _mm256_and_si256(words[i], low));  // both below 2^32: signed is fine
    const uint32_t lanes = static_cast<uint32_t>(_mm256_movemask_pd(_mm256_castsi256_pd(on)));
    // Lane j becomes bit 4j + i.
    bits |= ((lanes & 1) | (lanes & 2) << 3 | (lanes & 4) << 6 | (lanes & 8) << 9) << i;
  }
  return bits;
}

static uint64_t annealed_word(uint64_t seed, uint32_t stream, uint32_t step, uint32_t threshold, uint32_t q,
                              uint32_t k0) {
  uint64_t word = 0;
  for (uint32_t part = 0; part < 4; ++part) {
    const __m256i counters =
        _mm256_add_epi64(_mm256_set1_epi64x(k0 / 4 + 4 * part), _mm256_setr_epi64x(0, 1, 2, 3));
    word |= static_cast<uint64_t>(annealed_quarter(counters, q, step, stream, seed, threshold))
            << (16 * part);
  }
  return word;
}

#endif

// dst (kKeyBlock rows, HSp) = rows of src, zero beyond HS and beyond `count`.
static void copy_rows(float* dst, const float* src, int64_t stride, int64_t rows, int64_t count, int64_t HS,
                      int64_t HSp, float scale) {
  const Vec s = simd::set1(scale);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t d = 0; d < HSp; d += kLanes) {
      const Mask lanes = r < count && d < HS ? tail(d, HS) : simd::first_lanes(0);
      simd::store(dst + r * HSp + d, simd::mul(simd::load(src + r * stride + d, lanes), s));
    }
  }
}

// dst (HSp, kKeyBlock) = src (count, HS) transposed, zero where there is no source.
static void copy_transposed(float* dst, const float* src, int64_t stride, int64_t count, int64_t HS) {
  for (int64_t j = 0; j < kKeyBlock; j += kLanes) {
    for (int64_t d = 0; d < HS; d += kLanes) {
      const Mask lanes = tail(d, HS);
      Vec v[kLanes];
      DN_UNROLL for (int i = 0; i < kLanes; ++i) {
        v[i] = j + i < count ? simd::load(src + (j + i) * stride + d, lanes) : simd::zero();
      }
      transpose_lanes(v);
      DN_UNROLL for (int i = 0; i < kLanes; ++i) simd::store(dst + (d + i) * kKeyBlock + j, v[i]);
    }
  }
}

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
  copy_rows(t.q, q, q_stride, t.rows, t.rows, t.HS, t.HSp, t.scale * kLog2E);
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
    new_max[r] = block_max > old_max[r] ? block_max : old_max[r];
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
  if (!in_place) copy_rows(t.values, keys.v, keys.stride, count, count, t.HS, t.HSp, 1.0f);
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
  copy_rows(t.q, q, stride, t.T, t.T, t.HS, t.HSp, t.scale);
  copy_rows(t.dout, dout, dout_stride, t.T, t.T, t.HS, t.HSp, 1.0f);
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
  copy_rows(t.keys, k, stride, t.count, t.count, t.HS, t.HSp, 1.0f);
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

// dst rows (HS) = src rows (HSp) * scale.
static void write_rows(float* dst, int64_t stride, const float* src, int64_t rows, int64_t HS, int64_t HSp,
                       float scale) {
  const Vec s = simd::set1(scale);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t d = 0; d < HS; d += kLanes) {
      simd::store(dst + r * stride + d, simd::mul(simd::load(src + r * HSp + d), s), tail(d, HS));
    }
  }
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
