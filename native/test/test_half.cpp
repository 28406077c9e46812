// The 16-bit formats against arithmetic in double: every fp16 and bf16 value, every tie between neighbours,
// random bits.
#include <cmath>
#include <string>

#include "core/half.h"
#include "core/rng.h"
#include "test/check.h"

namespace {

using namespace dn;

// The value of a 16-bit float with `mantissa_bits` stored bits and exponent bias `bias`, by definition.
double decode(uint16_t half, int mantissa_bits, int bias) {
  const int exponent_bits = 15 - mantissa_bits;
  const int exponent = (half >> mantissa_bits) & ((1 << exponent_bits) - 1);
  const int mantissa = half & ((1 << mantissa_bits) - 1);
  double value;
  if (exponent == (1 << exponent_bits) - 1) {
    value = mantissa == 0 ? INFINITY : NAN;
  } else if (exponent == 0) {
    value = std::ldexp(mantissa, 1 - bias - mantissa_bits);
  } else {
    value = std::ldexp((1 << mantissa_bits) + mantissa, exponent - bias - mantissa_bits);
  }
  return (half & 0x8000) != 0 ? -value : value;
}

// x rounded to the nearest value of the format, ties to even, as a double.
double rounded(float x, int mantissa_bits, int bias) {
  if (x == 0 || !std::isfinite(x)) return x;
  const int exponent = std::max(std::ilogb(x), 1 - bias);
  const double unit = std::ldexp(1.0, exponent - mantissa_bits);
  const double value = std::nearbyint(x / unit) * unit;
  return std::fabs(value) >= std::ldexp(1.0, bias + 1) ? std::copysign(INFINITY, x) : value;
}

void check_narrowing(float x) {
  const double f16 = decode(f32_to_f16(x), 10, 15), bf16 = decode(f32_to_bf16(x), 7, 127);
  if (std::isnan(x)) {
    CHECK(std::isnan(f16) && std::isnan(bf16));
    return;
  }
  const double want_f16 = rounded(x, 10, 15), want_bf16 = rounded(x, 7, 127);
  CHECK_MSG(f16 == want_f16 && std::signbit(f16) == std::signbit(x), "fp16 of " + std::to_string(x) + " is " +
                                                                         std::to_string(f16) + ", expected " +
                                                                         std::to_string(want_f16));
  CHECK_MSG(bf16 == want_bf16 && std::signbit(bf16) == std::signbit(x),
            "bf16 of " + std::to_string(x) + " is " + std::to_string(bf16) + ", expected " +
                std::to_string(want_bf16));
}

}  // namespace

DN_TEST(half_widening_is_exact_and_round_trips) {
  for (uint32_t i = 0; i < 65536; ++i) {
    const uint16_t half = static_cast<uint16_t>(i);
    const double f16 = decode(half, 10, 15), bf16 = decode(half, 7, 127);
    const float from_f16 = f16_to_f32(half), from_bf16 = bf16_to_f32(half);
    if (std::isnan(f16)) {
      CHECK(std::isnan(from_f16) && std::isnan(f16_to_f32(f32_to_f16(from_f16))));
    } else {
      CHECK_MSG(static_cast<double>(from_f16) == f16, "fp16 bits " + std::to_string(i));
      CHECK_MSG(f32_to_f16(from_f16) == half, "fp16 bits " + std::to_string(i) + " do not round-trip");
    }
    if (std::isnan(bf16)) {
      CHECK(std::isnan(from_bf16) && std::isnan(bf16_to_f32(f32_to_bf16(from_bf16))));
    } else {
      CHECK_MSG(static_cast<double>(from_bf16) == bf16, "bf16 bits " + std::to_string(i));
      CHECK_MSG(f32_to_bf16(from_bf16) == half, "bf16 bits " + std::to_string(i) + " do not round-trip");
    }
  }
}

DN_TEST(half_narrowing_rounds_to_nearest_even) {
  // Midpoints between neighbours and the floats on either side of them.
  for (uint32_t i = 0; i < 0x7C00; ++i) {
    const double low = decode(static_cast<uint16_t>(i), 10, 15);
    const double high = i == 0x7BFF ? 65536.0 : decode(static_cast<uint16_t>(i + 1), 10, 15);
    const float middle = static_cast<float>((low + high) / 2);
    for (const float x : {middle, std::nextafterf(middle, 0.0f), std::nextafterf(middle, INFINITY)}) {
      check_narrowing(x);
      check_narrowing(-x);
    }
  }
  for (uint32_t i = 0; i < 0x7F80; ++i) {
    const uint32_t middle = (i << 16) | 0x8000u;
    for (const uint32_t bits : {middle - 1, middle, middle + 1}) check_narrowing(bits_float(bits));
  }
}

DN_TEST(half_narrowing_of_random_bits_and_edges) {
  for (uint64_t i = 0; i < 200000; ++i) {
    const Philox4 r = philox(1, Stream::kData, 0, i);
    check_narrowing(bits_float(r.v[0]));
    // Around the fp16 range, where random exponents rarely fall.
    check_narrowing(bits_float((r.v[1] & 0x807FFFFFu) | ((96u + r.v[2] % 50u) << 23)));
  }
  for (const float x :
       {0.0f, -0.0f, 65504.0f, 65519.996f, 65520.0f, 65536.0f, 1e30f, 3.4028235e38f, 5.9604645e-8f,
        2.9802322e-8f, 1e-45f, INFINITY, -INFINITY, NAN, bits_float(0x7F800001u), bits_float(0xFFFFFFFFu)}) {
    check_narrowing(x);
  }
  CHECK(f32_to_f16(65519.996f) == 0x7BFF);
  CHECK(f32_to_f16(65520.0f) == 0x7C00);
}
