// What happens to an element of a product before it is stored: bias, GELU or residual, accumulation,
// rounding.
#pragma once

#include "cuda/common.cuh"
#include "cuda/gemm.h"

namespace dn::cuda {

constexpr float kSqrtTwoOverPi = 0.7978845608f;

// tanh form: u (1 + tanh(sqrt(2 / pi) (u + 0.044715 u^3))) / 2.
DN_DEVICE float gelu(float u) { return 0.5f * u * (1 + tanhf(kSqrtTwoOverPi * (u + 0.044715f * u * u * u))); }
DN_DEVICE float gelu_derivative(float u) {
  const float t = tanhf(kSqrtTwoOverPi * (u + 0.044715f * u * u * u));
  return 0.5f * (1 + t) + 0.5f * u * (1 - t * t) * kSqrtTwoOverPi * (1 + 3 * 0.044715f * u * u);
}

template <typename T>
struct EpilogueParams {
  T* c;
  int64_t c_stride;
  T* extra;
  int64_t extra_stride;
  const float* bias;
  Epilogue kind;
  bool accumulate;
};

template <typename T>
EpilogueParams<T> epilogue_of(const Product& p) {
  return {static_cast<T*>(p.c), p.c_stride,  static_cast<T*>(p.extra), p.extra_stride, p.bias,
          p.epilogue,           p.accumulate};
}

template <typename T>
DN_DEVICE float finish(const EpilogueParams<T>& p, float x, int64_t m, int64_t n) {
  if (p.bias) x += p.bias[n];
  if (p.kind == Epilogue::kGelu) {
    if (p.extra) p.extra[m * p.extra_stride + n] = from_float<T>(x);
    x = gelu(x);
  } else if (p.kind == Epilogue::kResidual) {
    x += to_float(p.extra[m * p.extra_stride + n]);
  }
  if (p.accumulate) x += to_float(p.c[m * p.c_stride + n]);
  return x;
}

template <typename T>
DN_DEVICE void store_element(const EpilogueParams<T>& p, float x, int64_t m, int64_t n) {
  p.c[m * p.c_stride + n] = from_float<T>(finish(p, x, m, n));
}

// Two neighbouring columns, n even, in one access each where the strides allow it.
template <typename T>
DN_DEVICE void store_pair(const EpilogueParams<T>& p, float x0, float x1, int64_t m, int64_t n, int64_t N) {
  if (sizeof(T) == 2 && n + 1 < N && (p.c_stride & 1) == 0 && !p.accumulate &&
      (p.kind == Epilogue::kNone || (p.extra_stride & 1) == 0)) {
    if (p.bias) x0 += p.bias[n], x1 += p.bias[n + 1];
    uint32_t* const extra = reinterpret_cast<uint32_t*>(p.extra + (p.extra ? m * p.extra_stride + n : 0));
    if (p.kind == Epilogue::kGelu) {
      if (p.extra) *extra = pack_bf16(x0, x1);
      x0 = gelu(x0), x1 = gelu(x1);
    } else if (p.kind == Epilogue::kResidual) {
      const uint32_t residual = *extra;
      x0 += uint_as_float(residual << 16), x1 += uint_as_float(residual & 0xFFFF0000u);
    }
    *reinterpret_cast<uint32_t*>(p.c + m * p.c_stride + n) = pack_bf16(x0, x1);
    return;
  }
  store_element(p, x0, m, n);
  if (n + 1 < N) store_element(p, x1, m, n + 1);
}

}  // namespace dn::cuda
