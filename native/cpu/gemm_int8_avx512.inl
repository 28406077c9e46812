// What the AVX-512 and AMX kernels of the int8 product share: the quantisation of a row, and GELU. Included
// once by each; everything lies in an anonymous namespace.
#pragma once

// GCC 12 warns of its own header: _mm512_undefined_ps is, on purpose, not initialised.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif
#include <stdint.h>
#include <string.h>

#include "core/int8.h"
#include "cpu/gelu_table_avx512.inl"
#include "cpu/gemm_avx512.inl"
#include "cpu/gemm_int8_kernels.h"

namespace dn::cpu {
namespace {

float quantise_row(uint8_t* q, const float* x, int64_t K) {
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  // Compared as integers: infinity and NaN lie above every number. Four chains hide the latency.
  __m512i most[4] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512(),
                     _mm512_setzero_si512()};
  int64_t k = 0;
  for (; k + 64 <= K; k += 64) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      most[i] = _mm512_max_epi32(most[i], _mm512_and_si512(magnitude, _mm512_loadu_si512(x + k + 16 * i)));
    }
  }
  for (; k < K; k += 16) {
    most[0] =
        _mm512_max_epi32(most[0], _mm512_and_si512(magnitude, _mm512_maskz_loadu_epi32(lanes(K - k), x + k)));
  }
  const int bits = _mm512_reduce_max_epi32(
      _mm512_max_epi32(_mm512_max_epi32(most[0], most[1]), _mm512_max_epi32(most[2], most[3])));
  const float largest = _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(bits)));
  if (bits >= 0x7f800000 || largest < kInt8Least) {
    memset(q, static_cast<int>(kInt8Offset), static_cast<size_t>(K));
    return bits >= 0x7f800000 ? __builtin_nanf("") : 0.0f;
  }
  const __m512 inverse = _mm512_set1_ps(kInt8Most / largest);
  const __m512i offset = _mm512_set1_epi8(static_cast<char>(kInt8Offset));  // flips the sign: adds 128
  // Packing works in each quarter of a vector: fours of the four vectors lie in turns.
  const __m512i in_order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const auto whole = [&](__m512 value) { return _mm512_cvtps_epi32(_mm512_mul_ps(value, inverse)); };
  for (k = 0; k + 64 <= K; k += 64) {
    const float* const from = x + k;
    const __m512i low = _mm512_packs_epi32(whole(_mm512_loadu_ps(from)), whole(_mm512_loadu_ps(from + 16)));
    const __m512i high =
        _mm512_packs_epi32(whole(_mm512_loadu_ps(from + 32)), whole(_mm512_loadu_ps(from + 48)));
    const __m512i bytes = _mm512_permutexvar_epi32(in_order, _mm512_packs_epi16(low, high));
    _mm512_storeu_si512(q + k, _mm512_xor_si512(bytes, offset));
  }
  for (; k < K; k += 16) {
    const __mmask16 m = lanes(K - k);
    const __m128i bytes = _mm512_cvtepi32_epi8(whole(_mm512_maskz_loadu_ps(m, x + k)));
    _mm_mask_storeu_epi8(q + k, m, _mm_xor_si128(bytes, _mm512_castsi512_si128(offset)));
  }
  return largest / kInt8Most;
}

}  // namespace
}  // namespace dn::cpu
