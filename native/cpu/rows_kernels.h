// The row and element kernels, one table per instruction set; rows.cpp cuts the work into tasks and calls
// them. All pointers are fp32, strides are in elements between rows. This header is also seen by sources
// compiled for AVX: types only, no functions.
#pragma once

#include <stdint.h>

namespace dn::cpu {

// Constants of one AdamW step, the same for every element.
struct AdamWConstants {
  float decay;      // 1 - learning_rate * weight_decay
  float step_size;  // learning_rate / (1 - beta1^step)
  float v_scale;    // 1 / (1 - beta2^step)
  float beta1;
  float beta2;
  float eps;
  float gradient_scale;
};

struct RowsKernels {
  // out += a, C elements.
  void (*accumulate)(float* out, const float* a, int64_t C);

  // out = LN(inp) * weight + bias for `rows` rows; mean and rstd (rows), may be null.
  void (*layernorm_forward)(float* out, int64_t out_stride, float* mean, float* rstd, const float* inp,
                            int64_t inp_stride, const float* weight, const float* bias, int64_t rows,
                            int64_t C);
  // dinp += for `rows` rows; dweight and dbias (C) += their sums, row after row.
  void (*layernorm_backward)(float* dinp, int64_t dinp_stride, float* dweight, float* dbias,
                             const float* dout, int64_t dout_stride, const float* inp, int64_t inp_stride,
                             const float* weight, const float* mean, const float* rstd, int64_t rows,
                             int64_t C);

  // Element by element; dinp may be dout.
  void (*gelu_backward)(float* dinp, const float* dout, const float* inp, int64_t n);
  void (*adamw)(float* params, const float* gradients, float* m, float* v, int64_t n,
                const AdamWConstants* c);
  double (*sum_of_squares)(const float* x, int64_t n);
  // Zeros for memory that is not needed soon: past the caches where the machine can.
  void (*clear)(float* out, int64_t n);

  // The functions that kernels are built from (simd.inl), element by element, so that tests can see their
  // accuracy.
  void (*exp)(float* out, const float* inp, int64_t n);
  void (*softmax_exp)(float* out, const float* inp, int64_t n);   // inputs below 88
  void (*softmax_exp2)(float* out, const float* inp, int64_t n);  // inputs below 128
  void (*log)(float* out, const float* inp, int64_t n);
};

extern const RowsKernels kRowsPortable;
extern const RowsKernels kRowsAvx2;
extern const RowsKernels kRowsAvx512;

}  // namespace dn::cpu
