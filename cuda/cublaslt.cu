// cuBLASLt behind our own declarations. The library is column-major: a row-major (M, N) matrix is its (N, M),
// so the product is asked for as C^T (N, M) = B^T (N, K) * A^T (K, M), and a bias over our columns is its
// bias over rows.

#include <dlfcn.h>

#include <cstdlib>
#include <cstring>
#include <mutex>
#include <vector>

#include "core/error.h"
#include "cuda/cublaslt.h"

namespace dn::cuda {
namespace {

constexpr size_t kWorkspaceBytes = size_t{32} << 20;  // what NVIDIA recommends for Hopper

}  // namespace

struct CublasLt::Functions {
  void* library = nullptr;
  lt::Status (*create)(lt::Handle*) = nullptr;
  lt::Status (*destroy)(lt::Handle) = nullptr;
  size_t (*get_version)() = nullptr;
  lt::Status (*desc_create)(lt::MatmulDesc*, int32_t compute, int32_t scale) = nullptr;
  lt::Status (*desc_set)(lt::MatmulDesc, int32_t attribute, const void*, size_t) = nullptr;
  lt::Status (*desc_destroy)(lt::MatmulDesc) = nullptr;
  lt::Status (*layout_create)(lt::MatrixLayout*, int32_t type, uint64_t rows, uint64_t cols,
                              int64_t ld) = nullptr;
  lt::Status (*layout_destroy)(lt::MatrixLayout) = nullptr;
  lt::Status (*preference_create)(lt::Preference*) = nullptr;
  lt::Status (*preference_set)(lt::Preference, int32_t attribute, const void*, size_t) = nullptr;
  lt::Status (*preference_destroy)(lt::Preference) = nullptr;
  lt::Status (*heuristic)(lt::Handle, lt::MatmulDesc, lt::MatrixLayout, lt::MatrixLayout, lt::MatrixLayout,
                          lt::MatrixLayout, lt::Preference, int requested, lt::HeuristicResult*,
                          int* found) = nullptr;
  lt::Status (*matmul)(lt::Handle, lt::MatmulDesc, const void* alpha, const void* a, lt::MatrixLayout,
                       const void* b, lt::MatrixLayout, const void* beta, const void* c, lt::MatrixLayout,
                       void* d, lt::MatrixLayout, const lt::Algorithm*, void* workspace,
                       size_t workspace_bytes, void* stream) = nullptr;

  template <typename F>
  bool find(F*& function, const char* name) {
    void* const symbol = dlsym(library, name);
    std::memcpy(&function, &symbol, sizeof symbol);
    return symbol != nullptr;
  }
  bool find_all() {
    return find(create, "cublasLtCreate") && find(destroy, "cublasLtDestroy") &&
           find(get_version, "cublasLtGetVersion") && find(desc_create, "cublasLtMatmulDescCreate") &&
           find(desc_set, "cublasLtMatmulDescSetAttribute") &&
           find(desc_destroy, "cublasLtMatmulDescDestroy") &&
           find(layout_create, "cublasLtMatrixLayoutCreate") &&
           find(layout_destroy, "cublasLtMatrixLayoutDestroy") &&
           find(preference_create, "cublasLtMatmulPreferenceCreate") &&
           find(preference_set, "cublasLtMatmulPreferenceSetAttribute") &&
           find(preference_destroy, "cublasLtMatmulPreferenceDestroy") &&
           find(heuristic, "cublasLtMatmulAlgoGetHeuristic") && find(matmul, "cublasLtMatmul");
  }
};

namespace {

// The files to try, in this order; none when the library is switched off.
std::vector<std::string> candidates(std::string* reason) {
  std::vector<std::string> names;
  const char* const setting = std::getenv("DIFFUSION_NATIVE_CUBLASLT");
  if (setting && std::strcmp(setting, "off") == 0) {
    *reason = "switched off by DIFFUSION_NATIVE_CUBLASLT";
    return names;
  }
  *reason = "libcublasLt was not found";
  if (setting && *setting) names.push_back(setting);
#ifndef DN_CUDA_EMULATOR  // NVIDIA's library cannot see the emulator's memory
  for (const char* version : {"13", "12"}) {
    names.push_back(std::string("libcublasLt.so.") + version);
    names.push_back(std::string("/usr/local/cuda/lib64/libcublasLt.so.") + version);
  }
#endif
  return names;
}

// What the last open() of this process found.
std::mutex opened_mutex;
std::string opened;

void remember(const std::string& description) {
  const std::lock_guard<std::mutex> lock(opened_mutex);
  opened = description;
}

}  // namespace

// A library stays loaded for the life of the process: unloading it is not safe.
bool CublasLt::load(const std::string& name, Functions* functions, std::string* reason) {
  functions->library = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!functions->library) return false;
  if (functions->find_all()) return true;
  *reason = name + " lacks a function that is needed";
  return false;
}

std::string CublasLt::describe() {
  {
    const std::lock_guard<std::mutex> lock(opened_mutex);
    if (!opened.empty()) return opened;
  }
  std::string reason;
  for (const std::string& name : candidates(&reason)) {
    Functions functions;
    if (load(name, &functions, &reason)) return "cuBLASLt " + std::to_string(functions.get_version());
  }
  return "own kernels: " + reason;
}

std::unique_ptr<CublasLt> CublasLt::open() {
  std::unique_ptr<CublasLt> result(new CublasLt);
  result->functions_ = std::make_unique<Functions>();
  Functions& f = *result->functions_;
  std::string reason;
  for (const std::string& name : candidates(&reason)) {
    if (!load(name, &f, &reason)) continue;
    // Of two versions that are installed, the newer may want another driver.
    if (f.create(&result->handle_) == 0) {
      result->workspace_ = device_alloc(kWorkspaceBytes);
      remember("cuBLASLt " + std::to_string(f.get_version()));
      return result;
    }
    result->handle_ = nullptr;
    reason = name + " does not work with this driver";
  }
  remember("own kernels: " + reason);
  return nullptr;
}

CublasLt::~CublasLt() {
  if (workspace_) device_free(workspace_);
  if (handle_) functions_->destroy(handle_);
}

CublasLt::Plan CublasLt::choose(const Product& p, lt::MatmulDesc desc, lt::MatrixLayout a, lt::MatrixLayout b,
                                lt::MatrixLayout c) {
  const int flags = (p.a.transposed ? 1 : 0) | (p.b.transposed ? 2 : 0) | (p.bias ? 4 : 0) |
                    (p.output == Dtype::kF32 ? 8 : 0) | (p.input == Dtype::kF32 ? 16 : 0);
  const Key key{p.M, p.N, p.K, p.a.stride, p.b.stride, p.c_stride, p.epilogue == Epilogue::kResidual, flags};
  const auto known = plans_.find(key);
  if (known != plans_.end()) return known->second;
  Plan plan;
  lt::Preference preference = nullptr;
  if (functions_->preference_create(&preference) == 0) {
    functions_->preference_set(preference, lt::kPreferenceMaxWorkspace, &kWorkspaceBytes,
                               sizeof kWorkspaceBytes);
    // Views into activations begin at any 16 bytes; the library assumes 256 unless told.
    const uint32_t alignment = 16;
    for (const int32_t attribute : {lt::kPreferenceAlignmentA, lt::kPreferenceAlignmentB,
                                    lt::kPreferenceAlignmentC, lt::kPreferenceAlignmentD}) {
      functions_->preference_set(preference, attribute, &alignment, sizeof alignment);
    }
    lt::HeuristicResult result = {};
    int found = 0;
    if (functions_->heuristic(handle_, desc, b, a, c, c, preference, 1, &result, &found) == 0 && found > 0 &&
        result.state == 0) {
      plan.usable = true;
      plan.algorithm = result.algorithm;
    }
    functions_->preference_destroy(preference);
  }
  plans_[key] = plan;
  return plan;
}

bool CublasLt::multiply(const Product& p, Stream stream) {
  const int32_t input = p.input == Dtype::kF32 ? lt::kTypeF32 : lt::kTypeBF16;
  const int32_t output = p.output == Dtype::kF32 ? lt::kTypeF32 : lt::kTypeBF16;
  const Functions& f = *functions_;
  lt::MatmulDesc desc = nullptr;
  lt::MatrixLayout a = nullptr, b = nullptr, c = nullptr, extra = nullptr;
  const auto layout = [&](lt::MatrixLayout* out, int32_t type, int64_t rows, int64_t cols, int64_t stride) {
    return f.layout_create(out, type, static_cast<uint64_t>(cols), static_cast<uint64_t>(rows), stride) == 0;
  };
  bool done = f.desc_create(&desc, lt::kComputeF32, lt::kTypeF32) == 0;
  // The library's A is our B, its B our A, and rows and columns change places.
  const int32_t trans_a = p.b.transposed ? lt::kOperationT : lt::kOperationN;
  const int32_t trans_b = p.a.transposed ? lt::kOperationT : lt::kOperationN;
  done = done && f.desc_set(desc, lt::kDescTransA, &trans_a, sizeof trans_a) == 0 &&
         f.desc_set(desc, lt::kDescTransB, &trans_b, sizeof trans_b) == 0;
  if (done && p.bias) {
    const int32_t epilogue = lt::kEpilogueBias, type = lt::kTypeF32;
    done = f.desc_set(desc, lt::kDescEpilogue, &epilogue, sizeof epilogue) == 0 &&
           f.desc_set(desc, lt::kDescBiasPointer, &p.bias, sizeof p.bias) == 0 &&
           f.desc_set(desc, lt::kDescBiasType, &type, sizeof type) == 0;
  }
  done = done && layout(&a, input, p.a.transposed ? p.K : p.M, p.a.transposed ? p.M : p.K, p.a.stride) &&
         layout(&b, input, p.b.transposed ? p.N : p.K, p.b.transposed ? p.K : p.N, p.b.stride) &&
         layout(&c, output, p.M, p.N, p.c_stride);
  const bool residual = p.epilogue == Epilogue::kResidual;
  if (residual) done = done && layout(&extra, output, p.M, p.N, p.extra_stride);
  if (done) {
    const Plan plan = choose(p, desc, a, b, c);
    const float one = 1, beta = residual || p.accumulate ? 1.0f : 0.0f;
    done = plan.usable &&
           f.matmul(handle_, desc, &one, p.b.data, b, p.a.data, a, &beta, residual ? p.extra : p.c,
                    residual ? extra : c, p.c, c, &plan.algorithm, workspace_, kWorkspaceBytes, stream) == 0;
  }
  for (lt::MatrixLayout each : {a, b, c, extra}) {
    if (each) f.layout_destroy(each);
  }
  if (desc) f.desc_destroy(desc);
  return done;
}

void multiply(const Product& p, CublasLt* library, int multiprocessors, Stream stream) {
  if (p.M == 0 || p.N == 0) return;
  if (library && on_tensor_cores(p)) {
    // What the library does not do itself follows in a pass of its own.
    Product whole = p;
    const bool gelu = p.epilogue == Epilogue::kGelu;
    if (gelu) whole.epilogue = Epilogue::kNone;
    if (library->multiply(whole, stream)) {
      if (gelu) finish_product(p, false, stream);
      return;
    }
    whole.bias = nullptr;
    if (p.bias && library->multiply(whole, stream)) {
      finish_product(p, true, stream);
      return;
    }
  }
  if (on_tensor_cores(p)) {
    multiply_tensor_cores(p, multiprocessors, stream);
  } else {
    multiply_any(p, stream);
  }
}

}  // namespace dn::cuda
