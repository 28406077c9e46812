// The int8 product's kernels for AVX2, and for AVX2 with the VNNI instructions that newer chips have without
// AVX-512 (AVX-VNNI). Plain AVX2 widens to int16 and multiplies pairs into
// int32: its byte multiply saturates and would not be exact.

#include "cpu/gemm_int8_kernels.h"

#if defined(__x86_64__) && !defined(_MSC_VER)
#include <immintrin.h>
#include <string.h>

#include "core/int8.h"
#include "cpu/gemm_prefetch.inl"

namespace dn::cpu {
namespace {

// The first n of 8 lanes; none when n <= 0, all when n >= 8.
__m256i lanes(int64_t n) {
  const int count = n >= 8 ? 8 : n <= 0 ? 0 : static_cast<int>(n);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

// Sums of columns [n, n + 8) of row r, scaled and written.
void store(const Int8Tile& t, int64_t r, int64_t n, __m256i sum) {
  const __m256 value = _mm256_mul_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(sum), _mm256_set1_ps(t.a_scales[r])),
                                     _mm256_loadu_ps(t.panel->scales + n));
  _mm256_maskstore_ps(t.c + r * t.c_stride + n, lanes(t.cols - n), value);
}

// Columns [n, n + 16). A vector holds four columns of two pair sums each; t.panel's groups, 64 bytes of them.
template <int kRows>
void tile_wide(const Int8Tile& t, int64_t n) {
  __m256i sum[kRows][4];
#pragma GCC unroll 3
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) sum[r][v] = _mm256_setzero_si256();
  }
  const char* w = reinterpret_cast<const char*>(t.panel + 1) + n * kInt8Group;
  for (int64_t k = 0; k < t.depth; k += kInt8Group, w += kGemmPanel * kInt8Group) {
    if (t.fetch) fetch_line<fetch_bytes(kRows)>(w);
    __m256i a[kRows];
#pragma GCC unroll 3
    for (int r = 0; r < kRows; ++r) {
      int32_t four;
      memcpy(&four, t.a + r * t.a_stride + k, 4);
      a[r] = _mm256_cvtepu8_epi16(_mm_set1_epi32(four));
    }
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      const __m256i four_columns =
          _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w + 16 * v)));
#pragma GCC unroll 3
      for (int r = 0; r < kRows; ++r) {
        sum[r][v] = _mm256_add_epi32(sum[r][v], _mm256_madd_epi16(a[r], four_columns));
      }
    }
  }
#pragma GCC unroll 3
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      // Adding neighbours leaves columns 0, 1, 4, 5, 2, 3, 6, 7.
      const __m256i mixed = _mm256_hadd_epi32(sum[r][2 * half], sum[r][2 * half + 1]);
      const __m256i ordered = _mm256_permute4x64_epi64(mixed, 0xd8);
      const int64_t first = n + 8 * half;
      const __m256i correction =
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(t.panel->correction + first));
      store(t, r, first, _mm256_add_epi32(ordered, correction));
    }
  }
}

void prefetch(const Int8Tile& t) {
  for (int64_t i = 0; i < t.prefetch_lines; ++i) _mm_prefetch(t.prefetch + i * 64, _MM_HINT_T1);
}

template <int kRows>
void tile_rows(const Int8Tile& t) {
  prefetch(t);
  tile_wide<kRows>(t, 0);
  if (t.cols > 16) tile_wide<kRows>(t, 16);
}

void tile(const Int8Tile& t) {
  switch (t.rows) {
    case 1: tile_rows<1>(t); break;
    case 2: tile_rows<2>(t); break;
    default: tile_rows<3>(t);
  }
  if (t.finish) kGemmAvx2.finish(*t.finish);
}

#if defined(__clang__) || __GNUC__ >= 11
#define DN_AVX_VNNI 1

// sum += four products of a byte of a and a signed byte of w. By hand: the flags of this file stop short of
// VNNI, which other sources with them must not use.
__attribute__((always_inline)) inline void multiply_add(__m256i& sum, __m256i a, __m256i w) {
  asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(a), "x"(w));
}

// Columns [n, n + 16): as the fp32 kernel, 12 sums, two vectors of weights and one broadcast of inputs.
template <int kRows>
void vnni_half(const Int8Tile& t, int64_t n) {
  __m256i sum[kRows][2];
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
    sum[r][0] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(t.panel->correction + n));
    sum[r][1] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(t.panel->correction + n + 8));
  }
  const char* w = reinterpret_cast<const char*>(t.panel + 1) + n * kInt8Group;
  for (int64_t k = 0; k < t.depth; k += kInt8Group, w += kGemmPanel * kInt8Group) {
    if (t.fetch) fetch_line<fetch_bytes(kRows)>(w);
    const __m256i w0 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w));
    const __m256i w1 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + 32));
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      int32_t four;
      memcpy(&four, t.a + r * t.a_stride + k, 4);
      const __m256i value = _mm256_set1_epi32(four);
      multiply_add(sum[r][0], value, w0);
      multiply_add(sum[r][1], value, w1);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
    store(t, r, n, sum[r][0]);
    store(t, r, n + 8, sum[r][1]);
  }
}

template <int kRows>
void vnni_rows(const Int8Tile& t) {
  prefetch(t);
  vnni_half<kRows>(t, 0);
  if (t.cols > 16) vnni_half<kRows>(t, 16);
}

void vnni_tile(const Int8Tile& t) {
  switch (t.rows) {
    case 1: vnni_rows<1>(t); break;
    case 2: vnni_rows<2>(t); break;
    case 3: vnni_rows<3>(t); break;
    case 4: vnni_rows<4>(t); break;
    case 5: vnni_rows<5>(t); break;
    default: vnni_rows<6>(t);
  }
  if (t.finish) kGemmAvx2.finish(*t.finish);
}

#endif

float quantise_row(uint8_t* q, const float* x, int64_t K) {
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  __m256i most = _mm256_setzero_si256();  // compared as integers: infinity and NaN lie above every number
  for (int64_t k = 0; k < K; k += 8) {
    const __m256 v = _mm256_maskload_ps(x + k, lanes(K - k));
    most = _mm256_max_epi32(most, _mm256_and_si256(magnitude, _mm256_castps_si256(v)));
  }
  __m128i best = _mm_max_epi32(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1));
  best = _mm_max_epi32(best, _mm_shuffle_epi32(best, 0x4e));
  best = _mm_max_epi32(best, _mm_shuffle_epi32(best, 0xb1));
  const int bits = _mm_cvtsi128_si32(best);
  const float largest = _mm_cvtss_f32(_mm_castsi128_ps(best));
  if (bits >= 0x7f800000 || largest < kInt8Least) {
    memset(q, static_cast<int>(kInt8Offset), static_cast<size_t>(K));
    return bits >= 0x7f800000 ? __builtin_nanf("") : 0.0f;
  }
  const __m256 inverse = _mm256_set1_ps(kInt8Most / largest);
  const __m256i offset = _mm256_set1_epi32(static_cast<int>(kInt8Offset));
  for (int64_t k = 0; k < K; k += 8) {
    const __m256 v = _mm256_mul_ps(_mm256_maskload_ps(x + k, lanes(K - k)), inverse);
    const __m256i whole = _mm256_add_epi32(_mm256_cvtps_epi32(v), offset);
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
    const __m128i bytes = _mm_packus_epi16(words, words);
    if (K - k >= 8) {
      _mm_storel_epi64(reinterpret_cast<__m128i*>(q + k), bytes);
    } else {
      uint8_t eight[16];
      _mm_storeu_si128(reinterpret_cast<__m128i*>(eight), bytes);
      memcpy(q + k, eight, static_cast<size_t>(K - k));
    }
  }
  return largest / kInt8Most;
}

}  // namespace

const Int8Kernels kInt8Avx2 = {"avx2", 3, nullptr, nullptr, tile, quantise_row};
#if defined(DN_AVX_VNNI)
const Int8Kernels kInt8AvxVnni = {"avx-vnni", 6, nullptr, nullptr, vnni_tile, quantise_row};
#else
const Int8Kernels kInt8AvxVnni = {};
#endif

}  // namespace dn::cpu

#else

namespace dn::cpu {
const Int8Kernels kInt8Avx2 = {};
const Int8Kernels kInt8AvxVnni = {};
}  // namespace dn::cpu

#endif
