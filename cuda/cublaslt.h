// Products through NVIDIA's cuBLASLt, opened at run time: nothing of NVIDIA's is linked, and where the
// library is missing the own kernels do the work. Only what is needed is declared here; the numbers are the
// library's ABI, unchanged since version 11. test/cublaslt_abi.cu compares them with NVIDIA's header wherever
// that header is found.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <tuple>

#include "cuda/gemm.h"

namespace dn::cuda {

// The part of cublasLt.h that is used.
namespace lt {

using Handle = void*;
using MatmulDesc = void*;
using MatrixLayout = void*;
using Preference = void*;
using Status = int32_t;

struct Algorithm {
  uint64_t data[8];
};
struct HeuristicResult {
  Algorithm algorithm;
  size_t workspace_bytes;
  Status state;
  float waves;
  int32_t reserved[4];
};

constexpr int32_t kComputeF32 = 68;
constexpr int32_t kTypeF32 = 0, kTypeBF16 = 14;
constexpr int32_t kDescTransA = 3, kDescTransB = 4, kDescEpilogue = 7, kDescBiasPointer = 8,
                  kDescBiasType = 26;
constexpr int32_t kPreferenceMaxWorkspace = 1;
constexpr int32_t kPreferenceAlignmentA = 5, kPreferenceAlignmentB = 6, kPreferenceAlignmentC = 7,
                  kPreferenceAlignmentD = 8;
constexpr int32_t kEpilogueDefault = 1, kEpilogueBias = 4;
constexpr int32_t kOperationN = 0, kOperationT = 1;

}  // namespace lt

class CublasLt {
 public:
  // Null when no library was found or it does not work. DIFFUSION_NATIVE_CUBLASLT names a file to try first,
  // or is "off".
  static std::unique_ptr<CublasLt> open();
  // What the last open() of the process found, or before the first one, what it will probably find:
  // "cuBLASLt 130100", or "own kernels" and why.
  static std::string describe();
  ~CublasLt();
  CublasLt(const CublasLt&) = delete;
  CublasLt& operator=(const CublasLt&) = delete;

  // True when it ran the product: kNone or kResidual, with or without bias. False when the library has no
  // algorithm.
  bool multiply(const Product& product, Stream stream);

 private:
  struct Functions;
  // What the choice of an algorithm depends on.
  using Key = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int>;
  struct Plan {
    bool usable = false;
    lt::Algorithm algorithm = {};
  };

  CublasLt() = default;
  static bool load(const std::string& name, Functions* functions, std::string* reason);
  Plan choose(const Product& product, lt::MatmulDesc desc, lt::MatrixLayout a, lt::MatrixLayout b,
              lt::MatrixLayout c);

  std::unique_ptr<Functions> functions_;
  lt::Handle handle_ = nullptr;
  void* workspace_ = nullptr;
  std::map<Key, Plan> plans_;
};

}  // namespace dn::cuda
