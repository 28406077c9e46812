// The matrix product's kernels for AVX-512. A tile is up to 14 rows of two vectors: 28 sums, two vectors of B
// and one broadcast of A fill the 32 registers, and every load of the loop but one serves two multiply-adds.

#include "cpu/gemm_kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include "cpu/gemm_tile_avx512.inl"

namespace dn::cpu {
namespace {

constexpr int kMaxRows = 14;
// A panel block of 96 KB streams from L2, two lines for 28 multiply-adds: fewer blocks touch C less often.
constexpr int64_t kDepth = 768;

// How B lies: packed, packed and from memory (t.fetch), plain and to be packed (t.packed is given), or as
// bf16.
enum class B { kPacked, kFetched, kPlain, kBf16 };

// sum[r] += row k of A and of B, whose vectors are b0 and b1.
template <int kRows>
__attribute__((always_inline)) inline void multiply_row(__m512 (*sum)[2], const float* a, __m512 b0,
                                                        __m512 b1) {
#pragma GCC unroll 14
  for (int r = 0; r < kRows; ++r) {
    const __m512 value = _mm512_set1_ps(a[r]);
    sum[r][0] = _mm512_fmadd_ps(value, b0, sum[r][0]);
    sum[r][1] = _mm512_fmadd_ps(value, b1, sum[r][1]);
  }
}

__attribute__((always_inline)) inline void store_row(float* packed, __m512 b0, __m512 b1) {
  _mm512_storeu_ps(packed, b0);
  _mm512_storeu_ps(packed + 16, b1);
}

template <int kRows, B kB>
__attribute__((always_inline)) inline void multiply_fp32(__m512 (*sum)[2], const GemmTile& t) {
  const float* a = t.a;
  const float* b = t.b;
  const int64_t b_stride = kB == B::kPlain ? t.b_stride : kGemmPanel;
  float* packed = t.packed;
  const auto step = [&] {
    const __m512 b0 = _mm512_loadu_ps(b), b1 = _mm512_loadu_ps(b + 16);
    if (kB == B::kPlain) {
      prefetch_plain(b, b_stride);
      prefetch_plain(b + 16, b_stride);
      store_row(packed, b0, b1);
      packed += kGemmPanel;
    }
    if (kB == B::kFetched) {
      fetch_line<fetch_bytes(kRows)>(b);
      fetch_line<fetch_bytes(kRows)>(b + 16);
    }
    multiply_row<kRows>(sum, a, b0, b1);
    a += kRows;
    b += b_stride;
  };
  const float* const end = b + t.depth * b_stride;
  const PrefetchPlan plan = plan_prefetch(t.depth, t.prefetch_lines);
  GemmPrefetch ahead = *t.prefetch;
  int64_t lines = t.prefetch_lines;
  for (int64_t slot = 0; slot < plan.slots; ++slot) {
    lines -= plan.burst;
    take_lines(&ahead, lines < 0 ? plan.burst + lines : plan.burst);
    const float* const pause = b + plan.gap * b_stride;
    do step();
    while (b != pause);
  }
  *t.prefetch = ahead;
  while (b != end) step();
}

// A word is a pair of the reduction: two rows of B from one load.
template <int kRows>
__attribute__((always_inline)) inline void multiply_bf16(__m512 (*sum)[2], const GemmTile& t) {
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  const float* a = t.a;
  float* packed = t.packed;
  PairPrefetch ahead(t, t.prefetch_lines);
  for (int64_t k = 0; k < t.depth; k += 2) {
    const float* const words = t.b + bf16_words(k);
    const float* const right = words + 16;
    ahead.pair();
    fetch_line<kFetchFar>(words);
    fetch_line<kFetchFar>(right);
    const auto multiply = [&](__m512i b0, __m512i b1) {
      if (packed) {
        store_row(packed, _mm512_castsi512_ps(b0), _mm512_castsi512_ps(b1));
        packed += kGemmPanel;
      }
      multiply_row<kRows>(sum, a, _mm512_castsi512_ps(b0), _mm512_castsi512_ps(b1));
      a += kRows;
    };
    multiply(_mm512_slli_epi32(_mm512_loadu_si512(words), 16),
             _mm512_slli_epi32(_mm512_loadu_si512(right), 16));
    if (k + 1 < t.depth)
      multiply(_mm512_and_si512(_mm512_loadu_si512(words), upper),
               _mm512_and_si512(_mm512_loadu_si512(right), upper));
  }
  ahead.end(t);
}

template <int kRows, B kB>
void tile_rows(const GemmTile& t) {
  __m512 sum[kRows][2];
  ask_for_tile<kRows>(t);
#pragma GCC unroll 14
  for (int r = 0; r < kRows; ++r) sum[r][0] = sum[r][1] = _mm512_setzero_ps();
  kB == B::kBf16 ? multiply_bf16<kRows>(sum, t) : multiply_fp32<kRows, kB>(sum, t);
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
    case 12: return tile_rows<12, kB>(t);
    case 13: return tile_rows<13, kB>(t);
    default: return tile_rows<14, kB>(t);
  }
}

void tile(const GemmTile& t) {
  if (t.is_bf16) return tile_of<B::kBf16>(t);
  if (t.fetch) return tile_of<B::kFetched>(t);
  t.packed ? tile_of<B::kPlain>(t) : tile_of<B::kPacked>(t);
}

void pack_rows(float* dst, const float* const* rows, int64_t count, int64_t depth) {
  __m512i block[16];
  const __mmask16 wide = lanes(count);
  for (int64_t k = 0; k < depth; k += 16) {
    const int64_t width = depth - k < 16 ? depth - k : 16;
    const __mmask16 m = lanes(depth - k);
    for (int i = 0; i < 16; ++i)
      block[i] = i < count ? _mm512_maskz_loadu_epi32(m, rows[i] + k) : _mm512_setzero_si512();
    transpose_16x16(block);
    for (int64_t i = 0; i < width; ++i) _mm512_mask_storeu_epi32(dst + (k + i) * count, wide, block[i]);
  }
}

void copy(float* dst, int64_t dst_stride, const float* src, int64_t src_stride, int64_t rows, int64_t cols) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t n = 0; n < cols; n += 16) {
      const __mmask16 m = lanes(cols - n);
      _mm512_mask_storeu_ps(dst + r * dst_stride + n, m, _mm512_maskz_loadu_ps(m, src + r * src_stride + n));
    }
  }
}

void transpose(float* dst, int64_t dst_stride, const float* src, int64_t src_stride, int64_t rows,
               int64_t cols) {
  __m512i block[16];
  for (int64_t r = 0; r < rows; r += 16) {
    const int64_t height = rows - r < 16 ? rows - r : 16;
    const __mmask16 wide = lanes(rows - r);
    for (int64_t k = 0; k < cols; k += 16) {
      const int64_t width = cols - k < 16 ? cols - k : 16;
      const __mmask16 m = lanes(cols - k);
      for (int i = 0; i < 16; ++i) {
        block[i] =
            i < height ? _mm512_maskz_loadu_epi32(m, src + (r + i) * src_stride + k) : _mm512_setzero_si512();
      }
      transpose_16x16(block);
      for (int64_t i = 0; i < width; ++i)
        _mm512_mask_storeu_epi32(dst + (k + i) * dst_stride + r, wide, block[i]);
    }
  }
}

// Four rows at a time, along the rows: memory is read as it lies.
void column_sums(float* sums, const float* src, int64_t src_stride, int64_t rows, int64_t cols) {
  for (int64_t r = 0; r < rows; r += 4) {
    const float* const row = src + r * src_stride;
    const int64_t count = rows - r < 4 ? rows - r : 4;
    for (int64_t n = 0; n < cols; n += 16) {
      const __mmask16 m = lanes(cols - n);
      __m512 sum = _mm512_maskz_loadu_ps(m, sums + n);
      for (int64_t i = 0; i < count; ++i)
        sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(m, row + i * src_stride + n));
      _mm512_mask_storeu_ps(sums + n, m, sum);
    }
  }
}

void finish_tile(const GemmFinish& f) {
  GemmFinish part = f;  // any number of columns
  for (int64_t n = 0; n < f.cols; n += 32) {
    part.c = f.c + n;
    part.cols = f.cols - n < 32 ? f.cols - n : 32;
    part.bias = f.bias ? f.bias + n : nullptr;
    part.pre = f.pre ? f.pre + n : nullptr;
    part.residual = f.residual ? f.residual + n : nullptr;
    finish_from<false>(part.c, part.c_stride, part, FormulaGelu());
  }
}

}  // namespace

const GemmKernels kGemmAvx512 = {kMaxRows,  kDepth, tile,      finish_tile,
                                 pack_rows, copy,   transpose, column_sums};

}  // namespace dn::cpu

#else

namespace dn::cpu {
const GemmKernels kGemmAvx512 = {};
}  // namespace dn::cpu

#endif
