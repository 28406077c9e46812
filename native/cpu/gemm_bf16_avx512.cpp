// The bf16 matrix product's kernels on AVX512_BF16, for processors whose vdpbf16ps does more than two fp32
// multiply-adds in the same time (isa.h, has_fast_bf16). Eight rows of two vectors at a time: sixteen sums
// hide the latency, and each broadcast pair of A serves two instructions.

#include "cpu/gemm_kernels.h"

#if defined(__x86_64__) && defined(__AVX512BF16__)
#include <immintrin.h>
#include <string.h>

#include "cpu/gemm_bf16.inl"
#include "cpu/gemm_prefetch.inl"

namespace dn::cpu {
namespace {

constexpr int kGroup = 8;

void begin() {}

void end() {}

// Rows of a strip of A, whose first one is a, times a block of a panel: their part of what t says.
template <int kRows>
void multiply(const Bf16Tile& t, const uint16_t* a, int64_t first, bool fetch) {
  float* const c = t.c + first * t.c_stride;
  const GemmFinish then = t.finish ? rows_of(*t.finish, first, kRows) : GemmFinish();
  const __mmask16 masks[2] = {lanes(t.cols), lanes(t.cols - 16)};
  __m512 sum[kRows][2];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    sum[r][0] = sum[r][1] = _mm512_setzero_ps();
    if (t.accumulate) {
      sum[r][0] = _mm512_maskz_loadu_ps(masks[0], c + r * t.c_stride);
      sum[r][1] = _mm512_maskz_loadu_ps(masks[1], c + r * t.c_stride + 16);
    } else {
      prefetch_row(c + r * t.c_stride);
    }
  }
  if (t.finish) prefetch_finish(&then);
  const uint16_t* b = t.b;
  const int64_t pair_stride = t.is_lying ? 64 : 32, half = t.is_lying ? 32 : kBf16Tile;
  for (int64_t step = 0; step < t.steps; ++step, a += kBf16Tile, b += 2 * kBf16Tile) {
    for (int pair = 0; pair < kBf16Step / 2; ++pair) {
      const uint16_t* const left = b + pair * pair_stride;
      const uint16_t* const right = left + half;
      const __m512bh b0 = (__m512bh)_mm512_loadu_si512(left), b1 = (__m512bh)_mm512_loadu_si512(right);
      if (fetch) {
        fetch_line<fetch_bytes(kRows)>(left);
        fetch_line<fetch_bytes(kRows)>(right);
      }
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        int32_t both;
        memcpy(&both, a + r * kBf16Step + 2 * pair, sizeof both);
        const __m512bh value = (__m512bh)_mm512_set1_epi32(both);
        sum[r][0] = _mm512_dpbf16_ps(sum[r][0], value, b0);
        sum[r][1] = _mm512_dpbf16_ps(sum[r][1], value, b1);
      }
    }
  }
  finish_rows<kRows>(
      c, t.c_stride, t.cols,
      t.finish ? &then : nullptr, [&](int r, int v) __attribute__((always_inline)) { return sum[r][v]; });
}

constexpr decltype(&multiply<1>) kMultiply[kGroup] = {multiply<1>, multiply<2>, multiply<3>, multiply<4>,
                                                      multiply<5>, multiply<6>, multiply<7>, multiply<8>};

template <Source kSource>
void pack(const Bf16Tile& t) {
  Packing<1, kSource> packing(t.next, t.pack_pairs, 1);
  packing.some();
  packing.end();
}

void tile(const Bf16Tile& t) {
  t.next->turned ? pack<Source::kTurned>(t) : pack<Source::kPlain>(t);
  for (int64_t r = 0; r < t.rows; r += kGroup) {
    const uint16_t* const strip = r < kBf16Rows ? t.a0 : t.a1;
    const int64_t rows = t.rows - r < kGroup ? t.rows - r : kGroup;
    kMultiply[rows - 1](t, strip + r % kBf16Rows * kBf16Step, r, t.fetch && r == 0);
  }
}

}  // namespace

const Bf16Kernels kGemmBf16Avx512 = {1, begin, end, tile, pack_rows<1>, pack_columns<1>};

}  // namespace dn::cpu

#else

namespace dn::cpu {
const Bf16Kernels kGemmBf16Avx512 = {};
}  // namespace dn::cpu

#endif
