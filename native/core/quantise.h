// Symmetric int8 weights with one scale per output column: w = q * scale, q in -127 .. 127. What a column
// becomes depends on that column alone, so a matrix may be quantised in pieces; the bits are the same on
// every machine. Inputs of int8 products are quantised by the same rule, a row at a time
// (cpu/gemm_int8_kernels.h).
#pragma once

#include <cstdint>

#include "core/int8.h"
#include "core/tensor.h"

namespace dn {

// A quantised matrix in host memory: values in plain `order`, scales (N).
struct Int8Matrix {
  int8_t* values = nullptr;
  float* scales = nullptr;
  WeightOrder order = WeightOrder::kInOut;
  int64_t K = 0;
  int64_t N = 0;
};

// scale = max |w| / 127 and q = w * (127 / max |w|) rounded to nearest, ties to even, column by column.
// `values` holds K * N numbers in out's order. False when one of them is not finite.
bool quantise(const Int8Matrix& out, const float* values);

// values = q * scale.
void dequantise(float* values, const Int8Matrix& matrix);

}  // namespace dn
