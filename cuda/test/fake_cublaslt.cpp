// Stands in for libcublasLt in tests: the functions that cublaslt.h declares, with their documented meaning
// (column-major matrices, D = alpha op(A) op(B) + beta C, a bias over the rows of D), in plain loops on the
// emulator's memory. Matrices with a bias and more than 100 rows of D have no algorithm here, so that the way
// back to our own kernels is taken too.

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "core/half.h"
#include "cuda/cublaslt.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

namespace lt = dn::cuda::lt;

struct Desc {
  int32_t trans_a = 0, trans_b = 0, epilogue = lt::kEpilogueDefault, bias_type = -1;
  const void* bias = nullptr;
};
struct Layout {
  int32_t type;
  uint64_t rows, cols;
  int64_t ld;
};

float load(const void* p, int32_t type, int64_t i) {
  return type == lt::kTypeF32 ? static_cast<const float*>(p)[i]
                              : dn::bf16_to_f32(static_cast<const uint16_t*>(p)[i]);
}

int64_t products = 0;

}  // namespace

// Not of the library: products it has done in this process.
EXPORT int64_t fakeCublasLtProducts() { return products; }

EXPORT int32_t cublasLtCreate(void** handle) {
  if (std::getenv("DN_FAKE_CUBLASLT_FAILS")) return 1;
  *handle = new int(7);
  return 0;
}
EXPORT int32_t cublasLtDestroy(void* handle) {
  delete static_cast<int*>(handle);
  return 0;
}
EXPORT size_t cublasLtGetVersion() { return 999; }
EXPORT int32_t cublasLtMatmulDescCreate(void** desc, int32_t compute, int32_t scale) {
  *desc = new Desc;
  return compute == lt::kComputeF32 && scale == lt::kTypeF32 ? 0 : 7;
}
EXPORT int32_t cublasLtMatmulDescSetAttribute(void* desc, int32_t attribute, const void* value,
                                              size_t bytes) {
  Desc& d = *static_cast<Desc*>(desc);
  void* target = nullptr;
  if (attribute == lt::kDescTransA) target = &d.trans_a;
  if (attribute == lt::kDescTransB) target = &d.trans_b;
  if (attribute == lt::kDescEpilogue) target = &d.epilogue;
  if (attribute == lt::kDescBiasType) target = &d.bias_type;
  if (attribute == lt::kDescBiasPointer) target = &d.bias;
  if (!target || bytes != (attribute == lt::kDescBiasPointer ? sizeof(void*) : sizeof(int32_t))) return 7;
  std::memcpy(target, value, bytes);
  return 0;
}
EXPORT int32_t cublasLtMatmulDescDestroy(void* desc) {
  delete static_cast<Desc*>(desc);
  return 0;
}
EXPORT int32_t cublasLtMatrixLayoutCreate(void** layout, int32_t type, uint64_t rows, uint64_t cols,
                                          int64_t ld) {
  if (ld < static_cast<int64_t>(rows)) return 7;
  *layout = new Layout{type, rows, cols, ld};
  return 0;
}
EXPORT int32_t cublasLtMatrixLayoutDestroy(void* layout) {
  delete static_cast<Layout*>(layout);
  return 0;
}
EXPORT int32_t cublasLtMatmulPreferenceCreate(void** preference) {
  *preference = new size_t(0);
  return 0;
}
EXPORT int32_t cublasLtMatmulPreferenceSetAttribute(void* preference, int32_t attribute, const void* value,
                                                    size_t bytes) {
  if (attribute >= lt::kPreferenceAlignmentA && attribute <= lt::kPreferenceAlignmentD)
    return bytes == sizeof(uint32_t) ? 0 : 7;
  if (attribute != lt::kPreferenceMaxWorkspace || bytes != sizeof(size_t)) return 7;
  std::memcpy(preference, value, bytes);
  return 0;
}
EXPORT int32_t cublasLtMatmulPreferenceDestroy(void* preference) {
  delete static_cast<size_t*>(preference);
  return 0;
}
EXPORT int32_t cublasLtMatmulAlgoGetHeuristic(void*, void* desc, void*, void*, void*, void* d,
                                              void* preference, int requested, lt::HeuristicResult* results,
                                              int* found) {
  *found = 0;
  if (static_cast<Desc*>(desc)->bias && static_cast<Layout*>(d)->rows > 100) return 15;
  if (requested < 1 || *static_cast<size_t*>(preference) == 0) return 7;
  results[0] = {};
  results[0].algorithm.data[0] = 42;
  *found = 1;
  return 0;
}
EXPORT int32_t cublasLtMatmul(void* handle, void* desc, const void* alpha, const void* a, void* a_layout,
                              const void* b, void* b_layout, const void* beta, const void* c, void* c_layout,
                              void* d, void* d_layout, const lt::Algorithm* algorithm, void* workspace,
                              size_t, void*) {
  if (*static_cast<int*>(handle) != 7 || algorithm->data[0] != 42 || !workspace) return 7;
  const Desc& op = *static_cast<Desc*>(desc);
  const Layout &la = *static_cast<Layout*>(a_layout), &lb = *static_cast<Layout*>(b_layout);
  const Layout &lc = *static_cast<Layout*>(c_layout), &ld = *static_cast<Layout*>(d_layout);
  const uint64_t k = op.trans_a ? la.rows : la.cols;
  if ((op.trans_a ? la.cols : la.rows) != ld.rows || (op.trans_b ? lb.rows : lb.cols) != ld.cols ||
      (op.trans_b ? lb.cols : lb.rows) != k || lc.rows != ld.rows || lc.cols != ld.cols)
    return 7;
  const float scale = *static_cast<const float*>(alpha), keep = *static_cast<const float*>(beta);
  for (uint64_t j = 0; j < ld.cols; ++j) {
    for (uint64_t i = 0; i < ld.rows; ++i) {
      const auto at = [](const Layout& l, uint64_t row, uint64_t col) {
        return static_cast<int64_t>(row) + static_cast<int64_t>(col) * l.ld;
      };
      float sum = 0;
      for (uint64_t t = 0; t < k; ++t)
        sum += load(a, la.type, op.trans_a ? at(la, t, i) : at(la, i, t)) *
               load(b, lb.type, op.trans_b ? at(lb, j, t) : at(lb, t, j));
      sum *= scale;
      if (keep != 0) sum += keep * load(c, lc.type, at(lc, i, j));
      if (op.epilogue == lt::kEpilogueBias) sum += load(op.bias, op.bias_type, static_cast<int64_t>(i));
      if (ld.type == lt::kTypeF32) {
        static_cast<float*>(d)[at(ld, i, j)] = sum;
      } else {
        static_cast<uint16_t*>(d)[at(ld, i, j)] = dn::f32_to_bf16(sum);
      }
    }
  }
  ++products;
  return 0;
}
