// The int8 product's kernels in plain C++: the readable reference, and what runs where no vector set is
// known.

#include <string.h>

#include "core/half.h"
#include "core/int8.h"
#include "cpu/gemm_int8_kernels.h"

namespace dn::cpu {
namespace {

constexpr int64_t kMaxRows = 4;

void tile(const Int8Tile& t) {
  for (int64_t r = 0; r < t.rows; ++r) {
    int32_t sum[kGemmPanel] = {};
    const uint8_t* const a = t.a + r * t.a_stride;
    const int8_t* w = reinterpret_cast<const int8_t*>(t.panel + 1);
    for (int64_t k = 0; k < t.depth; k += kInt8Group) {
      for (int64_t n = 0; n < kGemmPanel; ++n) {
        for (int64_t i = 0; i < kInt8Group; ++i) sum[n] += (a[k + i] - kInt8Offset) * w[n * kInt8Group + i];
      }
      w += kGemmPanel * kInt8Group;
    }
    float* const c = t.c + r * t.c_stride;
    for (int64_t n = 0; n < t.cols; ++n) {
      c[n] = static_cast<float>(sum[n]) * t.a_scales[r] * t.panel->scales[n];
    }
  }
  if (t.finish) kGemmPortable.finish(*t.finish);
}

float quantise_row(uint8_t* q, const float* x, int64_t K) {
  uint32_t bits = 0;
  for (int64_t k = 0; k < K; ++k) {
    const uint32_t magnitude = float_bits(x[k]) & 0x7FFFFFFFu;
    bits = magnitude > bits ? magnitude : bits;
  }
  const float most = bits_float(bits);
  if (bits >= 0x7F800000u || most < kInt8Least) {
    memset(q, static_cast<int>(kInt8Offset), static_cast<size_t>(K));
    return bits >= 0x7F800000u ? bits_float(0x7FC00000u) : 0.0f;
  }
  const float inverse = kInt8Most / most;
  const uint32_t zero = float_bits(kRoundingShift) - static_cast<uint32_t>(kInt8Offset);
  for (int64_t k = 0; k < K; ++k) {
    q[k] = static_cast<uint8_t>(float_bits(x[k] * inverse + kRoundingShift) - zero);
  }
  return most / kInt8Most;
}

}  // namespace

const Int8Kernels kInt8Portable = {"portable", kMaxRows, nullptr, nullptr, tile, quantise_row};

}  // namespace dn::cpu
