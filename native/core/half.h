// Conversions between fp32 and the 16-bit formats of checkpoints: fp16 (IEEE binary16) and bf16 (the upper
// half of an fp32). Narrowing rounds to nearest, ties to even, as hardware does. Plain C without branches in
// the common path, so that a loop over an array is vectorised, and `static` so that files compiled for
// different instruction sets may share it.
#pragma once

#include <stdint.h>
#include <string.h>

namespace dn {

static inline uint32_t float_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

static inline float bits_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// a where condition holds, otherwise b, by masks: compilers turn a conditional whose sides compute floats
// into a jump, and then do not vectorise the loop around it.
static inline uint32_t select_bits(int condition, uint32_t a, uint32_t b) {
  const uint32_t mask = 0u - (uint32_t)condition;
  return (a & mask) | (b & ~mask);
}

// Exact for every input; a NaN keeps its payload. Subnormals go through a normal fp32 difference, so that the
// result does not depend on the flush-to-zero mode of the calling thread.
static inline float f16_to_f32(uint16_t half) {
  const uint32_t sign = (uint32_t)(half & 0x8000u) << 16;
  const uint32_t magnitude = (uint32_t)(half & 0x7FFFu) << 13;  // exponent and mantissa at their fp32 places
  const uint32_t exponent = magnitude & 0x0F800000u;
  const uint32_t rebased = magnitude + (112u << 23);  // bias 127 instead of 15
  const uint32_t subnormal = float_bits(bits_float(magnitude | (113u << 23)) - bits_float(113u << 23));
  const uint32_t special = magnitude | 0x7F800000u;
  const uint32_t finite = select_bits(exponent == 0, subnormal, rebased);
  return bits_float(select_bits(exponent == 0x0F800000u, special, finite) | sign);
}

// Finite values that round beyond 65504 (magnitude 65520 and above) become infinite; a NaN stays one, made
// quiet.
static inline uint16_t f32_to_f16(float value) {
  const uint32_t bits = float_bits(value);
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  // Subtracts 112 from the exponent and adds just under half a unit, or half a unit when the kept mantissa is
  // odd.
  const uint32_t normal = (magnitude + 0xC8000FFFu + ((magnitude >> 13) & 1u)) >> 13;
  // Below 2^-14: adding 0.5 leaves the fp16 subnormal, correctly rounded, in the low mantissa bits of the
  // sum.
  const int is_small = magnitude < 0x38800000u;
  const uint32_t small = select_bits(is_small, magnitude, 0u);
  const uint32_t subnormal = float_bits(bits_float(small) + 0.5f) - float_bits(0.5f);
  const uint32_t nan = 0x7E00u | ((magnitude >> 13) & 0x3FFu);
  const uint32_t special = select_bits(magnitude > 0x7F800000u, nan, 0x7C00u);
  const uint32_t finite = select_bits(is_small, subnormal, normal);
  return (uint16_t)(select_bits(magnitude >= 0x47800000u, special, finite) | ((bits >> 16) & 0x8000u));
}

static inline float bf16_to_f32(uint16_t half) { return bits_float((uint32_t)half << 16); }

static inline int is_finite_bf16(uint16_t half) { return (half & 0x7F80u) != 0x7F80u; }

// Values above the largest bf16 by half a unit or more become infinite; a NaN stays one, made quiet.
static inline uint16_t f32_to_bf16(float value) {
  const uint32_t bits = float_bits(value);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t nan = (bits >> 16) | 0x40u;
  return (uint16_t)select_bits((bits & 0x7FFFFFFFu) > 0x7F800000u, nan, rounded);
}

}  // namespace dn
