// Matrix products on the device. C (M, N) = epilogue(A (M, K) * B (K, N)). An own tensor-core kernel
// (gemm.cu) is always there; cuBLASLt (cublaslt.h) is used instead when it was found; a plain kernel
// (gemm_any.cu) does fp32 and whatever is not aligned to 16 bytes. Every element is one sum over k in
// ascending order in the own kernels, whatever M is, so a row's bits do not depend on the rows around it.
#pragma once

#include <cstdint>

#include "core/backend.h"
#include "cuda/live.h"
#include "cuda/runtime.h"

namespace dn::cuda {

class CublasLt;

// A matrix operand: element (i, j) is data[i * stride + j], or data[j * stride + i] when transposed.
struct Operand {
  const void* data = nullptr;
  int64_t stride = 0;
  bool transposed = false;
};

struct Product {
  int64_t M = 0, N = 0, K = 0;
  Dtype input = Dtype::kBF16;  // of A and B
  Operand a;                   // (M, K)
  Operand b;                   // (K, N)
  void* c = nullptr;
  Dtype output = Dtype::kBF16;
  int64_t c_stride = 0;
  bool accumulate = false;      // C += instead of C =; fp32 output
  const float* bias = nullptr;  // (N)
  Epilogue epilogue = Epilogue::kNone;
  void* extra =
      nullptr;  // kResidual: added; kGelu: receives the values before it, may be null; `output` elements
  int64_t extra_stride = 0;
  // A's rows end in zeros up to a multiple of 8 columns beyond K, so that K need not be one.
  bool padded_k = false;
  LiveRows live;  // of A and C; only the own tensor-core kernel leaves out the others
};

// Runs on cuBLASLt when `library` is given and knows an algorithm, otherwise on the own kernels.
void multiply(const Product& product, CublasLt* library, int multiprocessors, Stream stream);
bool on_tensor_cores(const Product& product);
void multiply_tensor_cores(const Product& product, int multiprocessors, Stream stream);
void multiply_any(const Product& product, Stream stream);
// The rest of a product whose sums are already in C: the bias when asked for, and GELU when it is the
// epilogue.
void finish_product(const Product& product, bool add_bias, Stream stream);

}  // namespace dn::cuda
