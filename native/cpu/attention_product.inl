// What the kernels of attention on vectors are made of: one register-blocked product, the transpose of a
// square in registers, and copies of the rows of a head into scratch. Every element of a product is one chain
// of fma over the inner index, whatever the size of the tile that holds it. Everything has internal linkage.
#include "cpu/attention_kernels.h"
#include "cpu/simd.inl"

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
  int64_t b_group = 0;   // in groups: floats between (n, kKeyGroup) columns of b and the next ones
};

// Where column c of b in groups begins.
inline const float* column_in_groups(const Product& p, int64_t c) {
  return p.b + c / kKeyGroup * p.b_group + c % kKeyGroup;
}

// c[r][0 .. V * kLanes) for R rows.
template <int R, int V, Start kStart, bool kGroups>
static inline void tile_product(const Product& p, int64_t row, int64_t col) {
  const int64_t c_stride = p.c_stride, a_row = p.a_row, a_i = p.a_i, b_stride = p.b_stride;
  float* const c = p.c + row * c_stride + col;
  const float* b[kGroups ? V : 1] = {p.b + col};
  if constexpr (kGroups) {
    DN_UNROLL for (int v = 0; v < V; ++v) b[v] = column_in_groups(p, col + v * kLanes);
  }
  // Every third row has a pointer: the two after it are within reach of one index register.
  const float* a[(R + 2) / 3];
  DN_UNROLL for (int i = 0; i < (R + 2) / 3; ++i) a[i] = p.a + (row + 3 * i) * a_row;
  Vec sum[R][V];
  DN_UNROLL for (int r = 0; r < R; ++r) {
    DN_UNROLL for (int v = 0; v < V; ++v) {
      if constexpr (kStart == Start::kZero) {
        sum[r][v] = simd::zero();
      } else {
        sum[r][v] = simd::load(c + r * c_stride + v * kLanes);
        if constexpr (kStart == Start::kScale)
          sum[r][v] = simd::mul(sum[r][v], simd::set1(p.factors[row + r]));
      }
    }
  }
  for (int64_t i = 0; i < p.n; ++i) {
    Vec bv[V];
    DN_UNROLL for (int v = 0; v < V; ++v) bv[v] = simd::load(kGroups ? b[v] : b[0] + v * kLanes);
    DN_UNROLL for (int r = 0; r < R; ++r) {
      const Vec ar = simd::set1(a[r / 3][r % 3 * a_row]);
      DN_UNROLL for (int v = 0; v < V; ++v) sum[r][v] = simd::fma(ar, bv[v], sum[r][v]);
    }
    DN_UNROLL for (int j = 0; j < (R + 2) / 3; ++j) a[j] += a_i;
    DN_UNROLL for (int v = 0; v < (kGroups ? V : 1); ++v) b[v] += b_stride;
  }
  DN_UNROLL for (int r = 0; r < R; ++r) {
    DN_UNROLL for (int v = 0; v < V; ++v) simd::store(c + r * c_stride + v * kLanes, sum[r][v]);
  }
}

// All rows of a strip V vectors wide, in the largest tiles that fit.
template <int R, int V, Start kStart, bool kGroups>
static inline void strip_product(const Product& p, int64_t row, int64_t rows, int64_t col) {
  for (; row + R <= rows; row += R) tile_product<R, V, kStart, kGroups>(p, row, col);
  if constexpr (R > 1) {
    constexpr int kNext = R == 12 ? 8 : R == 6 ? 4 : R / 2;
    if (row < rows) strip_product<kNext, V, kStart, kGroups>(p, row, rows, col);
  }
}

template <Start kStart, bool kGroups = false>
static void product(const Product& p, int64_t rows, int64_t cols) {
  int64_t col = 0;
  // One row alone: more columns at once, to have enough independent sums in flight.
  if (rows == 1) {
    for (; col + 4 * kLanes <= cols; col += 4 * kLanes) tile_product<1, 4, kStart, kGroups>(p, 0, col);
  }
  for (; col + 2 * kLanes <= cols; col += 2 * kLanes)
    strip_product<kTileRows, 2, kStart, kGroups>(p, 0, rows, col);
  for (; col < cols; col += kLanes) strip_product<kTileRows, 1, kStart, kGroups>(p, 0, rows, col);
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

#endif

// dst (rows, HSp) = src (rows, HS) * scale, zero beyond HS.
static void copy_rows(float* dst, const float* src, int64_t stride, int64_t rows, int64_t HS, int64_t HSp,
                      float scale) {
  const Vec s = simd::set1(scale);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t d = 0; d < HSp; d += kLanes) {
      const Mask lanes = d < HS ? tail(d, HS) : simd::first_lanes(0);
      simd::store(dst + r * HSp + d, simd::mul(simd::load(src + r * stride + d, lanes), s));
    }
  }
}

}  // namespace
}  // namespace dn::cpu
