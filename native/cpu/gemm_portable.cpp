// The matrix product's kernels in plain C++: the readable reference, and what runs where no vector set is
// known. The loops over columns have fixed length so that any compiler turns them into the vectors it has.

#include <math.h>
#include <string.h>

#include "core/half.h"
#include "cpu/gemm_kernels.h"

namespace dn::cpu {
namespace {

constexpr int64_t kMaxRows = 4;
constexpr int64_t kDepth = 256;

float multiply_add(float a, float b, float c) {
#if defined(FP_FAST_FMAF)
  return fmaf(a, b, c);
#else
  return a * b + c;  // a call into the C library per product otherwise
#endif
}

// tanh form: 0.5 u (1 + tanh z) = u / (1 + exp(-2z)), z = sqrt(2/pi) (u + 0.044715 u^3).
float gelu(float u) {
  const float e = expf(-1.5957691216f * (u + 0.044715f * u * u * u));
  return e > 1e38f ? 0.0f : u / (1.0f + e);  // of -inf, too
}

void finish(const GemmFinish& f) {
  for (int64_t r = 0; r < f.rows; ++r) {
    float* c = f.c + r * f.c_stride;
    for (int64_t n = 0; n < f.cols; ++n) {
      float value = c[n];
      if (f.bias) value += f.bias[n];
      if (f.pre) f.pre[r * f.extra_stride + n] = value;
      if (f.gelu) value = gelu(value);
      if (f.residual) value += f.residual[r * f.extra_stride + n];
      c[n] = value;
    }
  }
}

// dst (kGemmPanel) = row k of a panel of bf16.
void widen_row(float* dst, const float* panel, int64_t k) {
  uint32_t words[kGemmPanel];
  memcpy(words, panel + bf16_words(k), sizeof words);
  for (int64_t n = 0; n < kGemmPanel; ++n)
    dst[n] = bits_float(k % 2 == 0 ? words[n] << 16 : words[n] & 0xffff0000u);
}

void tile(const GemmTile& t) {
  float widened[kDepth * kGemmPanel];
  float* const room = t.packed ? t.packed : widened;
  for (int64_t k = 0; t.is_bf16 && k < t.depth; ++k) widen_row(room + k * kGemmPanel, t.b, k);
  for (int64_t k = 0; !t.is_bf16 && t.packed && k < t.depth; ++k)
    memcpy(room + k * kGemmPanel, t.b + k * t.b_stride, kGemmPanel * sizeof(float));
  const float* const packed = t.is_bf16 || t.packed ? room : t.b;
  for (int64_t r = 0; r < t.rows; ++r) {
    float sum[kGemmPanel] = {};
    const float* a = t.a + r;
    for (int64_t k = 0; k < t.depth; ++k) {
      const float* b = packed + k * kGemmPanel;
      for (int64_t n = 0; n < kGemmPanel; ++n) sum[n] = multiply_add(a[k * t.rows], b[n], sum[n]);
    }
    float* c = t.c + r * t.c_stride;
    for (int64_t n = 0; n < t.cols; ++n) c[n] = t.accumulate ? c[n] + sum[n] : sum[n];
  }
  if (t.finish) finish(*t.finish);
}

void pack_rows(float* dst, const float* const* rows, int64_t count, int64_t depth) {
  for (int64_t k = 0; k < depth; ++k) {
    for (int64_t r = 0; r < count; ++r) dst[k * count + r] = rows[r][k];
  }
}

void copy(float* dst, int64_t dst_stride, const float* src, int64_t src_stride, int64_t rows, int64_t cols) {
  for (int64_t r = 0; r < rows; ++r) {
    memcpy(dst + r * dst_stride, src + r * src_stride, static_cast<size_t>(cols) * sizeof(float));
  }
}

void transpose(float* dst, int64_t dst_stride, const float* src, int64_t src_stride, int64_t rows,
               int64_t cols) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t k = 0; k < cols; ++k) dst[k * dst_stride + r] = src[r * src_stride + k];
  }
}

void column_sums(float* sums, const float* src, int64_t src_stride, int64_t rows, int64_t cols) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t n = 0; n < cols; ++n) sums[n] += src[r * src_stride + n];
  }
}

}  // namespace

const GemmKernels kGemmPortable = {kMaxRows, kDepth, tile, finish, pack_rows, copy, transpose, column_sums};

}  // namespace dn::cpu
