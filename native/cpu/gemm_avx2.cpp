// The matrix product's kernels for AVX2 with FMA. A tile is up to 6 rows; the 32 columns of a panel are done
// in two halves of two vectors each: 12 sums, two vectors of B and one broadcast of A fill the 16 registers.

#include "cpu/gemm_kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>
#include <string.h>

#include "cpu/gemm_prefetch.inl"
#include "cpu/simd.inl"

namespace dn::cpu {
namespace {

constexpr int kMaxRows = 6;
// A panel block of 32 KB stays in L1.
constexpr int64_t kDepth = 256;

// The first n of 8 lanes; none when n <= 0, all when n >= 8.
__m256i lanes(int64_t n) {
  const int count = n >= 8 ? 8 : n <= 0 ? 0 : static_cast<int>(n);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

// How B lies: packed, packed and from memory (t.fetch), plain and to be packed (t.packed is given), or as
// bf16.
enum class B { kPacked, kFetched, kPlain, kBf16 };

// sum[r] += row k of A and of B, whose vectors are b0 and b1.
template <int kRows>
__attribute__((always_inline)) inline void multiply_row(__m256 (*sum)[2], const float* a, __m256 b0,
                                                        __m256 b1) {
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
    const __m256 value = _mm256_broadcast_ss(a + r);
    sum[r][0] = _mm256_fmadd_ps(value, b0, sum[r][0]);
    sum[r][1] = _mm256_fmadd_ps(value, b1, sum[r][1]);
  }
}

__attribute__((always_inline)) inline void store_row(float* packed, __m256 b0, __m256 b1) {
  _mm256_storeu_ps(packed, b0);
  _mm256_storeu_ps(packed + 8, b1);
}

template <int kRows, B kB>
__attribute__((always_inline)) inline void multiply_fp32(__m256 (*sum)[2], const GemmTile& t, const float* b,
                                                         float* packed, int64_t lines) {
  const float* a = t.a;
  const int64_t b_stride = kB == B::kPlain ? t.b_stride : kGemmPanel;
  const auto step = [&] {
    const __m256 b0 = _mm256_loadu_ps(b), b1 = _mm256_loadu_ps(b + 8);
    if (kB == B::kPlain) {
      prefetch_plain(b, b_stride);
      store_row(packed, b0, b1);
      packed += kGemmPanel;
    }
    if (kB == B::kFetched) fetch_line<fetch_bytes(kRows)>(b);
    multiply_row<kRows>(sum, a, b0, b1);
    a += kRows;
    b += b_stride;
  };
  const float* const end = b + t.depth * b_stride;
  const PrefetchPlan plan = plan_prefetch(t.depth, lines);
  GemmPrefetch ahead = *t.prefetch;
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
__attribute__((always_inline)) inline void multiply_bf16(__m256 (*sum)[2], const GemmTile& t,
                                                         const float* half, float* packed, int64_t lines) {
  const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  const float* a = t.a;
  PairPrefetch ahead(t, lines);
  for (int64_t k = 0; k < t.depth; k += 2) {
    const float* const words = half + bf16_words(k);
    ahead.pair();
    fetch_line<kFetchFar>(words);
    const auto load = [&](int64_t column) {
      return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words + column));
    };
    const auto multiply = [&](__m256i b0, __m256i b1) {
      if (packed) {
        store_row(packed, _mm256_castsi256_ps(b0), _mm256_castsi256_ps(b1));
        packed += kGemmPanel;
      }
      multiply_row<kRows>(sum, a, _mm256_castsi256_ps(b0), _mm256_castsi256_ps(b1));
      a += kRows;
    };
    multiply(_mm256_slli_epi32(load(0), 16), _mm256_slli_epi32(load(8), 16));
    if (k + 1 < t.depth) multiply(_mm256_and_si256(load(0), upper), _mm256_and_si256(load(8), upper));
  }
  ahead.end(t);
}

// Columns [0, 16) of c, b and, unless null, packed; cols counts from there. Asks for `lines` of t.prefetch.
template <int kRows, B kB>
void half_rows(const GemmTile& t, float* c, const float* b, float* packed, int64_t cols, int64_t lines) {
  __m256 sum[kRows][2];
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
    sum[r][0] = sum[r][1] = _mm256_setzero_ps();
    if (!t.stream) _mm_prefetch(reinterpret_cast<const char*>(c + r * t.c_stride), _MM_HINT_T0);
  }
  kB == B::kBf16 ? multiply_bf16<kRows>(sum, t, b, packed, lines)
                 : multiply_fp32<kRows, kB>(sum, t, b, packed, lines);
  if (t.stream) {
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      _mm256_stream_ps(c + r * t.c_stride, sum[r][0]);
      _mm256_stream_ps(c + r * t.c_stride + 8, sum[r][1]);
    }
    return;
  }
  if (cols >= 16) {
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      float* const row = c + r * t.c_stride;
      if (t.accumulate) {
        sum[r][0] = _mm256_add_ps(_mm256_loadu_ps(row), sum[r][0]);
        sum[r][1] = _mm256_add_ps(_mm256_loadu_ps(row + 8), sum[r][1]);
      }
      _mm256_storeu_ps(row, sum[r][0]);
      _mm256_storeu_ps(row + 8, sum[r][1]);
    }
    return;
  }
  const __m256i m0 = lanes(cols), m1 = lanes(cols - 8);
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
    float* const row = c + r * t.c_stride;
    if (t.accumulate) {
      sum[r][0] = _mm256_add_ps(_mm256_maskload_ps(row, m0), sum[r][0]);
      sum[r][1] = _mm256_add_ps(_mm256_maskload_ps(row + 8, m1), sum[r][1]);
    }
    _mm256_maskstore_ps(row, m0, sum[r][0]);
    _mm256_maskstore_ps(row + 8, m1, sum[r][1]);
  }
}

template <int kRows>
void tile_rows(const GemmTile& t) {
  const bool both = t.cols > 16;
  const int64_t first = both ? t.prefetch_lines / 2 : t.prefetch_lines;
  const int64_t second = t.prefetch_lines - first;
  if (t.is_bf16) {
    float* const right = t.packed ? t.packed + 16 : nullptr;
    half_rows<kRows, B::kBf16>(t, t.c, t.b, t.packed, t.cols, first);
    if (both) half_rows<kRows, B::kBf16>(t, t.c + 16, t.b + 16, right, t.cols - 16, second);
  } else if (t.packed) {  // both, then
    half_rows<kRows, B::kPlain>(t, t.c, t.b, t.packed, 16, first);
    half_rows<kRows, B::kPlain>(t, t.c + 16, t.b + 16, t.packed + 16, 16, second);
  } else if (t.fetch) {
    half_rows<kRows, B::kFetched>(t, t.c, t.b, nullptr, t.cols, first);
    if (both) half_rows<kRows, B::kFetched>(t, t.c + 16, t.b + 16, nullptr, t.cols - 16, second);
  } else {
    half_rows<kRows, B::kPacked>(t, t.c, t.b, nullptr, t.cols, first);
    if (both) half_rows<kRows, B::kPacked>(t, t.c + 16, t.b + 16, nullptr, t.cols - 16, second);
  }
}

void finish(const GemmFinish& f) {
  for (int64_t n = 0; n < f.cols; n += 8) {
    const __m256i m = lanes(f.cols - n);
    const __m256 bias = f.bias ? _mm256_maskload_ps(f.bias + n, m) : _mm256_setzero_ps();
    for (int64_t r = 0; r < f.rows; ++r) {
      float* const c = f.c + r * f.c_stride + n;
      __m256 value = _mm256_maskload_ps(c, m);
      if (f.bias) value = _mm256_add_ps(value, bias);
      if (f.pre) _mm256_maskstore_ps(f.pre + r * f.extra_stride + n, m, value);
      if (f.gelu) value = simd::gelu(value);
      if (f.residual)
        value = _mm256_add_ps(value, _mm256_maskload_ps(f.residual + r * f.extra_stride + n, m));
      _mm256_maskstore_ps(c, m, value);
    }
  }
}

void tile(const GemmTile& t) {
  switch (t.rows) {
    case 1: tile_rows<1>(t); break;
    case 2: tile_rows<2>(t); break;
    case 3: tile_rows<3>(t); break;
    case 4: tile_rows<4>(t); break;
    case 5: tile_rows<5>(t); break;
    default: tile_rows<6>(t);
  }
  if (t.finish) finish(*t.finish);
}

void copy(float* dst, int64_t dst_stride, const float* src, int64_t src_stride, int64_t rows, int64_t cols) {
  for (int64_t r = 0; r < rows; ++r) {
    float* const to = dst + r * dst_stride;
    const float* const from = src + r * src_stride;
    int64_t n = 0;
    for (; n + 8 <= cols; n += 8) _mm256_storeu_ps(to + n, _mm256_loadu_ps(from + n));
    for (; n + 4 <= cols; n += 4) _mm_storeu_ps(to + n, _mm_loadu_ps(from + n));
    for (; n < cols; ++n) to[n] = from[n];
  }
}

// An 8 x 8 block from src to dst.
void transpose_8x8(float* dst, int64_t dst_stride, const float* src, int64_t src_stride) {
  __m256 x[8], t[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) x[i] = _mm256_loadu_ps(src + i * src_stride);
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(x[i], x[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    x[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    x[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    x[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    x[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(dst + i * dst_stride, _mm256_permute2f128_ps(x[i], x[i + 4], 0x20));
    _mm256_storeu_ps(dst + (i + 4) * dst_stride, _mm256_permute2f128_ps(x[i], x[i + 4], 0x31));
  }
}

void pack_rows(float* dst, const float* const* rows, int64_t count, int64_t depth) {
  int64_t k = 0;
  for (; k + 8 <= depth; k += 8) {
    float block[8][8] = {};
    for (int64_t r = 0; r < count; ++r) _mm256_storeu_ps(block[r], _mm256_loadu_ps(rows[r] + k));
    transpose_8x8(block[0], 8, block[0], 8);
    for (int64_t i = 0; i < 8; ++i) {
      float* const to = dst + (k + i) * count;
      if (count == kMaxRows) {
        _mm_storeu_ps(to, _mm_loadu_ps(block[i]));
        memcpy(to + 4, block[i] + 4, 2 * sizeof(float));
      } else {
        for (int64_t r = 0; r < count; ++r) to[r] = block[i][r];
      }
    }
  }
  for (; k < depth; ++k) {
    for (int64_t r = 0; r < count; ++r) dst[k * count + r] = rows[r][k];
  }
}

void transpose(float* dst, int64_t dst_stride, const float* src, int64_t src_stride, int64_t rows,
               int64_t cols) {
  for (int64_t r = 0; r < rows; r += 8) {
    for (int64_t k = 0; k < cols; k += 8) {
      const float* from = src + r * src_stride + k;
      float* to = dst + k * dst_stride + r;
      if (rows - r >= 8 && cols - k >= 8) {
        transpose_8x8(to, dst_stride, from, src_stride);
        continue;
      }
      for (int64_t i = 0; i < 8 && i < rows - r; ++i) {
        for (int64_t j = 0; j < 8 && j < cols - k; ++j) to[j * dst_stride + i] = from[i * src_stride + j];
      }
    }
  }
}

// Four rows at a time, along the rows: memory is read as it lies.
void column_sums(float* sums, const float* src, int64_t src_stride, int64_t rows, int64_t cols) {
  for (int64_t r = 0; r < rows; r += 4) {
    const float* const row = src + r * src_stride;
    const int64_t count = rows - r < 4 ? rows - r : 4;
    for (int64_t n = 0; n < cols; n += 8) {
      const __m256i m = lanes(cols - n);
      __m256 sum = _mm256_maskload_ps(sums + n, m);
      for (int64_t i = 0; i < count; ++i)
        sum = _mm256_add_ps(sum, _mm256_maskload_ps(row + i * src_stride + n, m));
      _mm256_maskstore_ps(sums + n, m, sum);
    }
  }
}

}  // namespace

const GemmKernels kGemmAvx2 = {kMaxRows, kDepth, tile, finish, pack_rows, copy, transpose, column_sums};

}  // namespace dn::cpu

#else

namespace dn::cpu {
const GemmKernels kGemmAvx2 = {};
}  // namespace dn::cpu

#endif
