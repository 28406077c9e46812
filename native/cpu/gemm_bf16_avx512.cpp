// The bf16 matrix product's kernels on AVX512_BF16, for processors whose vdpbf16ps does more than two fp32
// multiply-adds in the same time (isa.h, has_fast_bf16). Eight rows of two vectors at a time: sixteen sums
// hide the latency, and each broadcast pair of A serves two instructions.

#include "cpu/gemm_kernels.h"

#if defined(__x86_64__) && defined(__AVX512BF16__)
#include <immintrin.h>
#include <string.h>

#include "cpu/gemm_bf16.inl"

namespace dn::cpu {
namespace {

constexpr int kGroup = 8;

void begin() {}

void end() {}

// c (kGroup, 32) = or += A B for kGroup rows of a strip of A; only `rows` rows and the columns of the masks
// are touched.
void multiply(const uint16_t* a, const uint16_t* b, int64_t steps, float* c, int64_t c_stride, int64_t rows,
              __mmask16 m0, __mmask16 m1, bool accumulate) {
  __m512 sum[kGroup][2];
#pragma GCC unroll 8
  for (int r = 0; r < kGroup; ++r) {
    sum[r][0] = sum[r][1] = _mm512_setzero_ps();
    if (accumulate && r < rows) {
      sum[r][0] = _mm512_maskz_loadu_ps(m0, c + r * c_stride);
      sum[r][1] = _mm512_maskz_loadu_ps(m1, c + r * c_stride + 16);
    }
  }
  for (int64_t step = 0; step < steps; ++step, a += kBf16Tile, b += 2 * kBf16Tile) {
    for (int pair = 0; pair < kBf16Step / 2; ++pair) {
      const __m512bh b0 = (__m512bh)_mm512_load_si512(b + pair * 32);
      const __m512bh b1 = (__m512bh)_mm512_load_si512(b + kBf16Tile + pair * 32);
#pragma GCC unroll 8
      for (int r = 0; r < kGroup; ++r) {
        int32_t both;
        memcpy(&both, a + r * kBf16Step + 2 * pair, sizeof both);
        const __m512bh value = (__m512bh)_mm512_set1_epi32(both);
        sum[r][0] = _mm512_dpbf16_ps(sum[r][0], value, b0);
        sum[r][1] = _mm512_dpbf16_ps(sum[r][1], value, b1);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kGroup; ++r) {
    if (r >= rows) break;
    _mm512_mask_storeu_ps(c + r * c_stride, m0, sum[r][0]);
    _mm512_mask_storeu_ps(c + r * c_stride + 16, m1, sum[r][1]);
  }
}

template <Source kSource>
void pack(const Bf16Tile& t) {
  Packing<1, kSource> packing(t.next, t.pack_pairs, 1);
  packing.some();
  packing.end();
}

void tile(const Bf16Tile& t) {
  t.next->turned ? pack<Source::kTurned>(t) : pack<Source::kPlain>(t);
  // What is finished before it is stored lies beside C.
  alignas(64) float cells[2 * kBf16Rows * kGemmPanel];
  if (t.finish && t.accumulate) copy_cells(cells, kGemmPanel, t.c, t.c_stride, t.rows, t.cols);
  float* const c = t.finish ? cells : t.c;
  const int64_t stride = t.finish ? kGemmPanel : t.c_stride;
  const __mmask16 m0 = lanes(t.cols), m1 = lanes(t.cols - 16);
  for (int64_t r = 0; r < t.rows; r += kGroup) {
    const uint16_t* const strip = r < kBf16Rows ? t.a0 : t.a1;
    const int64_t rows = t.rows - r < kGroup ? t.rows - r : kGroup;
    multiply(strip + r % kBf16Rows * kBf16Step, t.b, t.steps, c + r * stride, stride, rows, m0, m1,
             t.accumulate);
  }
  if (t.finish) finish_from(cells, kGemmPanel, *t.finish);
}

}  // namespace

const Bf16Kernels kGemmBf16Avx512 = {1, begin, end, tile, pack_rows<1>, pack_columns<1>};

}  // namespace dn::cpu

#else

namespace dn::cpu {
const Bf16Kernels kGemmBf16Avx512 = {};
}  // namespace dn::cpu

#endif
