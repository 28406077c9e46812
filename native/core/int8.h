// The numbers that the quantisation of weights (core/quantise.h) and of a product's inputs
// (cpu/gemm_int8_kernels.h) share. C only: included by files compiled for AVX2 and AVX-512.
#pragma once

#include <stdint.h>

namespace dn {

constexpr float kInt8Most = 127.0f;
// A column or row with no value of at least this magnitude, 2^-100, is zero: 127 / max stays finite.
constexpr float kInt8Least = 0x1p-100f;
// The most inputs K of a product: K * 127 * 127 stays below 2^31.
constexpr int64_t kInt8MostInputs = 131072;
// Adding it to |x| < 2^22 rounds x to the nearest whole number, ties to even: 1.5 * 2^23, beyond which an
// fp32 has no fraction.
constexpr float kRoundingShift = 12582912.0f;

}  // namespace dn
