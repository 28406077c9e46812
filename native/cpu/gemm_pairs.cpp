// Products in pairs (gemm_kernels.h): where they pay, and the scales that make them exact.

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/half.h"
#include "cpu/gemm_chunk.h"
#include "cpu/isa.h"

namespace dn::cpu {
namespace {

constexpr int64_t kPairLeast = 96;  // steps of a reduction that is worth the sums of its pairs

GemmKernels kernels_of_pairs() {
  GemmKernels kernels = kGemmAvx512;
  kernels.max_rows = kGemmPairsAvx512.max_rows;
  kernels.depth = kPairBlock;
  kernels.tile = kGemmPairsAvx512.tile;
  kernels.pairs = &kGemmPairsAvx512;
  return kernels;
}

}  // namespace

const GemmKernels& pair_kernels() {
  static const GemmKernels kernels = kernels_of_pairs();
  return kernels;
}

bool pairs_pay(Isa isa, int64_t K) {
  return K >= kPairLeast && isa >= Isa::kAvx512 && has_fast_pairs() && kGemmPairsAvx512.tile;
}

const char* active_fp32() {
  const Isa isa = active_isa();
  if (split_kernels(isa, INT64_MAX)) return "amx-bf16x3";
  return pairs_pay(isa, INT64_MAX) ? "avx512-pairs" : isa_name(isa);
}

bool packs_for_pairs(Isa isa, int64_t K) { return pairs_pay(isa, K) && !split_kernels(isa, K); }

void PairScales::set(int64_t i, float squares, const float* numbers, int64_t stride, int64_t depth) {
  int before = 0;  // exponent that numbers are brought to before they are squared
  if (!(squares > 0x1p-80f && squares < 0x1p100f)) {
    // Squares have half the range of numbers.
    float most = 0;
    for (int64_t k = 0; k < depth && !std::isnan(most); ++k) {
      const float size = std::fabs(numbers[k * stride]);
      if (!(size <= most)) most = size;
    }
    if (most == 0 || !std::isfinite(most)) {
      scales[i] = most == 0 ? 1.0f : std::numeric_limits<float>::quiet_NaN();
      exponents[i] = most == 0 ? 0.0f : scales[i];
      return;
    }
    std::frexp(most, &before);
    squares = 0;
    for (int64_t k = 0; k < depth; k += 4) {
      float x[4] = {};
      for (int64_t j = 0; j < std::min<int64_t>(4, depth - k); ++j)
        x[j] = std::ldexp(numbers[(k + j) * stride], -before);
      squares += (x[0] * x[0] + x[1] * x[1]) + (x[2] * x[2] + x[3] * x[3]);
    }
  }
  // By the bits, since every panel asks for 32 of them: the mean square is a normal number, below 2^e and not
  // below 2^(e-1), and its root is nearest to 2^(e >> 1), in proportion. Beyond 126 a power of two or its
  // reciprocal is no normal number.
  const int e = static_cast<int>(float_bits(squares / static_cast<float>(depth)) >> 23) - 126;
  const int exponent = std::clamp((e >> 1) + before, -126, 126);
  scales[i] = bits_float(static_cast<uint32_t>(127 - exponent) << 23);
  exponents[i] = static_cast<float>(exponent);
}

namespace {

// 2^exponent of each column.
void factors_of(float* factors, const float* exponents) {
  for (int64_t n = 0; n < kGemmPanel; ++n)
    factors[n] = bits_float(static_cast<uint32_t>(127 + static_cast<int>(exponents[n])) << 23);
}

}  // namespace

void scale_block(PairPanel* pairs, float* block, int64_t depth) {
  const GemmPairs& kernels = kGemmPairsAvx512;
  float squares[kGemmPanel], factors[kGemmPanel];
  PairScales of;
  kernels.column_squares(squares, block, kGemmPanel, kGemmPanel, depth);
  for (int64_t n = 0; n < kGemmPanel; ++n) {
    of.set(n, squares[n], block + n, kGemmPanel, depth);
    if (std::isnan(of.exponents[n])) return;
  }
  factors_of(factors, of.exponents);
  if (!kernels.scale_block(block, pairs->sums, of.scales, factors, depth)) return;
  std::copy_n(of.exponents, kGemmPanel, pairs->exponents);
  pairs->form[0] = kScaledForm;
}

void unscale_rows(const PairPanel& pairs, float* numbers, int64_t count) {
  float factors[kGemmPanel];
  factors_of(factors, pairs.exponents);
  for (int64_t k = 0; k < count; ++k) {
    for (int64_t n = 0; n < kGemmPanel; ++n) numbers[k * kGemmPanel + n] *= factors[n];
  }
}

void unscale_block(PairPanel* pairs, float* block, int64_t depth) {
  if (is_scaled(*pairs)) unscale_rows(*pairs, block, depth);
  *pairs = PairPanel();
}

void pack_pairs(const GemmChunk& chunk, float* dst, int64_t m, int64_t rows, int64_t k, int64_t depth) {
  const GemmProduct& p = chunk.p;
  const GemmPairs& pairs = *chunk.kernels.pairs;
  float squares[kGemmPanel];
  PairScales of;
  if (p.a_layout == GemmLayout::kTransposed) {
    const float* const src = p.a + k * p.a_stride + m;
    pairs.column_squares(squares, src, p.a_stride, rows, depth);
    for (int64_t r = 0; r < rows; ++r) of.set(r, squares[r], src + r, p.a_stride, depth);
    return pairs.pack_steps(dst, src, p.a_stride, of.scales, of.exponents, rows, depth);
  }
  const float* src[kGemmPanel] = {};
  for (int64_t r = 0; r < rows; ++r) src[r] = (p.a_rows ? p.a_rows[m + r] : p.a + (m + r) * p.a_stride) + k;
  alignas(64) float steps[kPairBlock * kTurnedRows];
  pairs.turn_rows(steps, squares, src, rows, depth);
  for (int64_t r = 0; r < rows; ++r) of.set(r, squares[r], src[r], 1, depth);
  pairs.pack_steps(dst, steps, kTurnedRows, of.scales, of.exponents, rows, depth);
}

}  // namespace dn::cpu
