// The matrix product's kernels for processors that add beside their multiply-adds (isa.h, has_fast_pairs):
// two steps of three of the reduction are multiplied in pairs, one multiply-add and two additions for what
// else are two multiply-adds. Both kinds of units are then busy all the time, and a tile takes two thirds of
// it.
//
//   a1 b1 + a2 b2 = (a1 + b2) (a2 + b1) - a1 a2 - b1 b2
//
// (S. Winograd, A New Algorithm for Inner Product, IEEE Trans. Comput. C-17, 1968). The products a1 a2 belong
// to a row of A, b1 b2 to a column of B: they are summed once, not for every element. What it takes to be as
// exact as a chain of multiply-adds, gemm_kernels.h says.
//
#include "cpu/gemm_kernels.h"

#if defined(__x86_64__) && !defined(_MSC_VER)
#include <immintrin.h>

#include "cpu/gemm_pairs.inl"
#include "cpu/gemm_tile_avx512.inl"

namespace dn::cpu {
namespace {

constexpr int kMaxRows = 12;
static_assert(pair_depth(0) % kPairGroup == 0 && pair_depth(kPairBlock) % kPairGroup == 0,
              "whole groups between corrections");

// How a tile finds B: scaled, or as the first one, packed, packed and from memory (t.fetch), or plain and to
// be packed.
enum class B { kScaled, kPacked, kFetched, kPlain };

// Rows of B, one after the other, and what happens to them on the way.
template <int kRows, B kB>
struct Rows {
  const float* b;
  int64_t stride;
  float* packed;
  float* scaled;
  __m512 scales[2];

  __attribute__((always_inline)) inline void next(__m512* row) {
    row[0] = _mm512_loadu_ps(b);
    row[1] = _mm512_loadu_ps(b + 16);
    if (kB == B::kPlain) {
      prefetch_plain(b, stride);
      prefetch_plain(b + 16, stride);
      _mm512_storeu_ps(packed, row[0]);
      _mm512_storeu_ps(packed + 16, row[1]);
      packed += kGemmPanel;
    }
    if (kB == B::kFetched) {
      fetch_line<fetch_bytes(kRows)>(b);
      fetch_line<fetch_bytes(kRows)>(b + 16);
    }
    b += kB == B::kPlain ? stride : kGemmPanel;
    if (kB == B::kScaled) return;
    row[0] = _mm512_mul_ps(row[0], scales[0]);
    row[1] = _mm512_mul_ps(row[1], scales[1]);
    if (kB == B::kFetched) return;
    _mm512_store_ps(scaled, row[0]);
    _mm512_store_ps(scaled + 16, row[1]);
    scaled += kGemmPanel;
  }
};

// Three steps: a pair and a single one. of_b: the sums of B's pairs, or null where they are known.
template <int kRows, B kB, bool kSubtract>
__attribute__((always_inline)) inline void multiply_three(__m512 (*sum)[2], __m512* of_b, const float* a,
                                                          Rows<kRows, kB>& rows) {
  __m512 b1[2], b2[2], b3[2];
  rows.next(b1);
  rows.next(b2);
  rows.next(b3);
  multiply_steps<kRows, 2, kRows, kSubtract>(sum, b1, b2, b3, a);
#pragma GCC unroll 2
  for (int v = 0; kB != B::kScaled && v < 2; ++v)
    of_b[v] = kSubtract ? _mm512_fnmadd_ps(b2[v], b1[v], of_b[v]) : _mm512_fmadd_ps(b2[v], b1[v], of_b[v]);
}

template <int kRows, B kB>
void tile_rows(const GemmTile& t) {
  ask_for_tile<kRows>(t);
  const float* a = t.a;
  const float* a_sums = t.a + t.depth * kRows;
  float* b_sums = t.b_sums;
  Rows<kRows, kB> rows = {t.b, t.b_stride, t.packed, t.scaled, {}};
  if (kB != B::kScaled) {
    rows.scales[0] = _mm512_loadu_ps(t.b_scales);
    rows.scales[1] = _mm512_loadu_ps(t.b_scales + 16);
  }
  GemmPrefetch ahead = *t.prefetch;
  int64_t lines = t.prefetch_lines;
  const int64_t groups = t.depth / kPairGroup, burst = groups > 0 ? (lines + groups - 1) / groups : 0;

  __m512 sum[kRows][2], total[kRows][2];
  const __m512 one = _mm512_set1_ps(1.0f);  // multiply-adds have less to do here than additions
  const int64_t part = pair_depth(t.depth);
  for (int64_t k = 0;; k += part) {
    const bool is_last = k + part >= t.depth;
    const int64_t steps = is_last ? t.depth - k : part;
    __m512 of_b[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) sum[r][0] = sum[r][1] = _mm512_setzero_ps();
    for (int64_t i = steps / kPairGroup; i > 0; --i) {
      const int64_t now = lines < burst ? lines : burst;
      if (now > 0) take_lines(&ahead, now);
      lines -= now;
      multiply_three<kRows, kB, false>(sum, of_b, a, rows);
      multiply_three<kRows, kB, true>(sum, of_b, a + 3 * kRows, rows);
      a += kPairGroup * kRows;
    }
    for (int64_t i = steps % kPairGroup; i > 0; --i) {
      __m512 b[2];
      rows.next(b);
#pragma GCC unroll 12
      for (int r = 0; r < kRows; ++r) {
        multiply_add(sum[r][0], b[0], a + r);
        multiply_add(sum[r][1], b[1], a + r);
      }
      a += kRows;
    }
    if (kB == B::kScaled) {
      of_b[0] = _mm512_loadu_ps(b_sums);
      of_b[1] = _mm512_loadu_ps(b_sums + 16);
    } else {
      _mm512_storeu_ps(b_sums, of_b[0]);
      _mm512_storeu_ps(b_sums + 16, of_b[1]);
    }
    b_sums += kGemmPanel;
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        sum[r][v] = _mm512_fnmadd_ps(of_b[v], one, subtract(sum[r][v], a_sums + r));
        if (k > 0) sum[r][v] = _mm512_fmadd_ps(total[r][v], one, sum[r][v]);
        if (!is_last) total[r][v] = sum[r][v];
      }
    }
    a_sums += kRows;
    if (is_last) break;
  }
  take_lines(&ahead, lines > 0 ? lines : 0);
  *t.prefetch = ahead;

  // Exponents in one step: the two of them may be far apart.
  const __m512 of_columns[2] = {_mm512_loadu_ps(t.b_exponents), _mm512_loadu_ps(t.b_exponents + 16)};
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) {
    const __m512 of_row = _mm512_set1_ps(a_sums[r]);
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) sum[r][v] = _mm512_scalef_ps(sum[r][v], _mm512_add_ps(of_row, of_columns[v]));
  }
  write_tile<kRows>(t, sum);
}

template <B kB>
void tile_of(const GemmTile& t) {
  switch (t.rows) {
    case 1: return tile_rows<1, kB>(t);
    case 2: return tile_rows<2, kB>(t);
    case 3: return tile_rows<3, kB>(t);
    case 4: return tile_rows<4, kB>(t);
    case 5: return tile_rows<5, kB>(t);
    case 6: return tile_rows<6, kB>(t);
    case 7: return tile_rows<7, kB>(t);
    case 8: return tile_rows<8, kB>(t);
    case 9: return tile_rows<9, kB>(t);
    case 10: return tile_rows<10, kB>(t);
    case 11: return tile_rows<11, kB>(t);
    default: return tile_rows<12, kB>(t);
  }
}

void tile(const GemmTile& t) {
  if (t.fetch) return tile_of<B::kFetched>(t);
  if (t.packed) return tile_of<B::kPlain>(t);
  t.is_first ? tile_of<B::kPacked>(t) : tile_of<B::kScaled>(t);
}

// The sums of squares of up to 16 numbers a step, in the order that all layouts have.
class Squares {
 public:
  __attribute__((always_inline)) void add(__m512 a, __m512 b, __m512 c, __m512 d) {
    const __m512 left = _mm512_add_ps(_mm512_mul_ps(a, a), _mm512_mul_ps(b, b));
    const __m512 right = _mm512_add_ps(_mm512_mul_ps(c, c), _mm512_mul_ps(d, d));
    sum_ = _mm512_add_ps(sum_, _mm512_add_ps(left, right));
  }
  __m512 sum() const { return sum_; }

 private:
  __m512 sum_ = _mm512_setzero_ps();
};

// A square of 16 steps of up to 16 rows, turned; zeros past the last row and step.
__attribute__((always_inline)) inline void load_square(__m512i* block, const float* const* rows,
                                                       int64_t count, int64_t k, int64_t depth) {
  const __mmask16 m = lanes(depth - k);
  for (int i = 0; i < 16; ++i)
    block[i] = i < count ? _mm512_maskz_loadu_epi32(m, rows[i] + k) : _mm512_setzero_si512();
  transpose_16x16(block);
}

void turn_rows(float* steps, float* squares, const float* const* rows, int64_t count, int64_t depth) {
  Squares sum;
  __m512i block[16];
  for (int64_t k = 0; k < depth; k += 16) {
    load_square(block, rows, count, k, depth);
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
      sum.add(_mm512_castsi512_ps(block[i]), _mm512_castsi512_ps(block[i + 1]),
              _mm512_castsi512_ps(block[i + 2]), _mm512_castsi512_ps(block[i + 3]));
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) _mm512_storeu_si512(steps + (k + i) * kTurnedRows, block[i]);
  }
  _mm512_mask_storeu_ps(squares, lanes(count), sum.sum());
}

void column_squares(float* squares, const float* src, int64_t src_stride, int64_t count, int64_t depth) {
  const __mmask16 m[2] = {lanes(count), lanes(count - 16)};
  Squares sum[2];
  for (int64_t k = 0; k < depth; k += 4) {
    for (int v = 0; v < (count > 16 ? 2 : 1); ++v) {
      __m512 x[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const float* const at = src + (k + i) * src_stride + v * 16;
        if (src_stride > kGemmPanel) prefetch_plain(at, src_stride);
        x[i] = k + i < depth ? _mm512_maskz_loadu_ps(m[v], at) : _mm512_setzero_ps();
      }
      sum[v].add(x[0], x[1], x[2], x[3]);
    }
  }
  _mm512_mask_storeu_ps(squares, m[0], sum[0].sum());
  if (count > 16) _mm512_mask_storeu_ps(squares + 16, m[1], sum[1].sum());
}

// The sum of the pairs of so many steps, of which next() brings one after the other, in the order in which
// tiles add them up.
template <typename Next>
__attribute__((always_inline)) inline __m512 sum_pairs(int64_t steps, Next&& next) {
  __m512 sum = _mm512_setzero_ps();
  for (int64_t i = steps / kPairGroup; i > 0; --i) {
    const __m512 a1 = next(), a2 = next();
    sum = _mm512_fmadd_ps(a1, a2, sum);
    next();
    const __m512 s1 = next(), s2 = next();
    sum = _mm512_fnmadd_ps(s1, s2, sum);
    next();
  }
  for (int64_t i = steps % kPairGroup; i > 0; --i) next();
  return sum;
}

// Steps of A on their way.
struct Steps {
  const float* from;
  int64_t stride;
  float* to;
  int64_t count;
  __mmask16 m;
  __m512 scale;

  __attribute__((always_inline)) __m512 next() {
    const __m512 x = _mm512_mul_ps(_mm512_maskz_loadu_ps(m, from), scale);
    _mm512_mask_storeu_ps(to, m, x);
    from += stride;
    to += count;
    return x;
  }
};

void pack_steps(float* dst, const float* src, int64_t src_stride, const float* scales, const float* exponents,
                int64_t count, int64_t depth) {
  const __mmask16 m = lanes(count);
  Steps steps = {src, src_stride, dst, count, m, _mm512_maskz_loadu_ps(m, scales)};
  float* sums = dst + depth * count;
  const int64_t part = pair_depth(depth);
  for (int64_t k = 0; k < depth; k += part) {
    const int64_t in_part = depth - k < part ? depth - k : part;
    _mm512_mask_storeu_ps(sums, m, sum_pairs(in_part, [&] { return steps.next(); }));
    sums += count;
  }
  _mm512_mask_storeu_ps(sums, m, _mm512_maskz_loadu_ps(m, exponents));
}

bool scale_block(float* block, float* sums, const float* scales, const float* factors, int64_t depth) {
  const __m512 scale[2] = {_mm512_loadu_ps(scales), _mm512_loadu_ps(scales + 16)};
  const __m512 factor[2] = {_mm512_loadu_ps(factors), _mm512_loadu_ps(factors + 16)};
  __mmask16 lost = 0;
  for (int64_t k = 0; k < depth; ++k) {
    for (int v = 0; v < 2; ++v) {
      const __m512 x = _mm512_loadu_ps(block + k * kGemmPanel + v * 16);
      const __m512 back = _mm512_mul_ps(_mm512_mul_ps(x, scale[v]), factor[v]);
      lost |= _mm512_cmpneq_epi32_mask(_mm512_castps_si512(x), _mm512_castps_si512(back));
    }
  }
  if (lost != 0) return false;
  const int64_t part = pair_depth(depth);
  for (int v = 0; v < 2; ++v) {
    float* at = block + v * 16;
    const auto next = [&]() __attribute__((always_inline)) {
      const __m512 x = _mm512_mul_ps(_mm512_loadu_ps(at), scale[v]);
      _mm512_storeu_ps(at, x);
      at += kGemmPanel;
      return x;
    };
    for (int64_t k = 0; k < depth; k += part) {
      const int64_t in_part = depth - k < part ? depth - k : part;
      _mm512_storeu_ps(sums + k / part * kGemmPanel + v * 16, sum_pairs(in_part, next));
    }
  }
  return true;
}

}  // namespace

const GemmPairs kGemmPairsAvx512 = {kMaxRows, tile, turn_rows, column_squares, pack_steps, scale_block};

}  // namespace dn::cpu

#else

namespace dn::cpu {
const GemmPairs kGemmPairsAvx512 = {};
}  // namespace dn::cpu

#endif
