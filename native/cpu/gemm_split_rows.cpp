// A few rows times a panel in three parts (gemm_kernels.h), by the vector units and from the panel as it
// lies: one or two rows are bound by reading the weight, and packing it would take longer. Bit for bit what
// the AMX tiles give: in a step, for every product of parts, one chain of fused multiply-adds over the even
// numbers and one over the odd ones, both from zero; then their sum is added to C. (Intel's Instruction Set
// Reference, TDPBF16PS; products of two bf16 are exact in fp32, so that fused or not is the same.)

#include "cpu/gemm_kernels.h"

#if defined(__x86_64__) && defined(__AMX_TILE__) && defined(__AMX_BF16__)
#include <immintrin.h>

#include "cpu/gemm_bf16.inl"

namespace dn::cpu {
namespace {

constexpr int kProducts = 6;
// In the order of the tiles.
constexpr int kPartOfA[kProducts] = {2, 1, 1, 0, 0, 0};
constexpr int kPartOfB[kProducts] = {0, 0, 1, 1, 2, 0};

struct Numbers {
  __m512 part[3];
};

__attribute__((always_inline)) inline Numbers numbers(__m512 x) {
  const Parts parts = split(x);
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  Numbers n;
  for (int i = 0; i < 2; ++i) n.part[i] = _mm512_castsi512_ps(_mm512_and_si512(parts.at[i], upper));
  n.part[2] = _mm512_castsi512_ps(parts.at[2]);  // fits
  return n;
}

constexpr int64_t kAhead = 4096;  // floats: of the panel, what is asked for

// One step of kRows rows and sixteen columns: sum[r] += .
template <int kRows>
__attribute__((always_inline)) inline void step(__m512* sum, const float* a, int64_t part_stride,
                                                int64_t row_stride, const float* b) {
  __m512 chain[kRows][kProducts][2];
#pragma GCC unroll 2
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 6
    for (int i = 0; i < kProducts; ++i) chain[r][i][0] = chain[r][i][1] = _mm512_setzero_ps();
  }
  for (int64_t k = 0; k < kBf16Step; k += 2) {
#pragma GCC unroll 2
    for (int odd = 0; odd < 2; ++odd) {
      const float* const row = b + (k + odd) * kGemmPanel;
      // One by one: in bursts they would keep the few buffers that the loads need.
      _mm_prefetch(reinterpret_cast<const char*>(row + kAhead), _MM_HINT_T1);
      const Numbers n = numbers(_mm512_loadu_ps(row));
#pragma GCC unroll 2
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 6
        for (int i = 0; i < kProducts; ++i) {
          const __m512 value = _mm512_set1_ps(a[r * row_stride + kPartOfA[i] * part_stride + k + odd]);
          chain[r][i][odd] = _mm512_fmadd_ps(value, n.part[kPartOfB[i]], chain[r][i][odd]);
        }
      }
    }
  }
#pragma GCC unroll 2
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 6
    for (int i = 0; i < kProducts; ++i)
      sum[r] = _mm512_add_ps(sum[r], _mm512_add_ps(chain[r][i][0], chain[r][i][1]));
  }
}

template <int kRows>
void multiply(const SplitRows& t) {
  const __mmask16 masks[2] = {lanes(t.cols), lanes(t.cols - 16)};
  __m512 low[kRows], high[kRows];
#pragma GCC unroll 2
  for (int r = 0; r < kRows; ++r) {
    const float* const c = t.c + r * t.c_stride;
    low[r] = t.accumulate ? _mm512_maskz_loadu_ps(masks[0], c) : _mm512_setzero_ps();
    high[r] = t.accumulate ? _mm512_maskz_loadu_ps(masks[1], c + 16) : _mm512_setzero_ps();
  }
  const int64_t row_stride = 3 * t.part_stride;
  for (int64_t k = 0; k < t.depth; k += kBf16Step) {
    const float* const b = t.b + k * kGemmPanel;
    step<kRows>(low, t.a + k, t.part_stride, row_stride, b);
    step<kRows>(high, t.a + k, t.part_stride, row_stride, b + 16);
  }
  finish_rows<kRows>(
      t.c, t.c_stride, t.cols,
      t.finish, [&](int r, int v) __attribute__((always_inline)) { return v == 0 ? low[r] : high[r]; });
}

void rows(const SplitRows& t) { t.rows == 1 ? multiply<1>(t) : multiply<2>(t); }

void parts_of_row(float* dst, int64_t part_stride, const float* src, int64_t depth) {
  for (int64_t k = 0; k < depth; k += 16) {
    const Numbers n = numbers(_mm512_loadu_ps(src + k));
    for (int i = 0; i < 3; ++i) _mm512_storeu_ps(dst + i * part_stride + k, n.part[i]);
  }
}

}  // namespace

const SplitRowKernels kSplitRowsAvx512 = {2, rows, parts_of_row};

}  // namespace dn::cpu

#else

namespace dn::cpu {
const SplitRowKernels kSplitRowsAvx512 = {};
}  // namespace dn::cpu

#endif
