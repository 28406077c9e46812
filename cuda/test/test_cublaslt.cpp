// The way through cuBLASLt, with a library of ours in its place (fake_cublaslt.cpp): it is found by its
// variable, rows and columns change places rightly, and what it cannot do is done by our kernels. Only under
// the emulator.

#ifdef DN_CUDA_EMULATOR

#include <dlfcn.h>

#include <cstdlib>
#include <cstring>

#include "cuda/cublaslt.h"
#include "cuda/test/support.h"

namespace dn::cuda_test {
namespace {

// Sets the variable for the life of the object.
class Setting {
 public:
  explicit Setting(const char* value) {
    if (const char* old = std::getenv(kName)) old_ = old;
    setenv(kName, value, 1);
  }
  ~Setting() { old_.empty() ? unsetenv(kName) : setenv(kName, old_.c_str(), 1); }
  Setting(const Setting&) = delete;
  Setting& operator=(const Setting&) = delete;

 private:
  static constexpr const char* kName = "DIFFUSION_NATIVE_CUBLASLT";
  std::string old_;
};

// Products that the stand-in, which is loaded, has done.
int64_t products_done() {
  void* const library = dlopen(DN_FAKE_CUBLASLT, RTLD_NOW | RTLD_NOLOAD);
  void* const symbol = library ? dlsym(library, "fakeCublasLtProducts") : nullptr;
  if (!symbol) return -1;
  int64_t (*count)() = nullptr;
  std::memcpy(&count, &symbol, sizeof symbol);
  return count();
}

DN_TEST(cuda_cublaslt_is_found_or_says_why) {
  {
    const Setting setting("off");
    CHECK(cuda::CublasLt::open() == nullptr);
    CHECK(cuda::CublasLt::describe().find("switched off") != std::string::npos);
  }
  const Setting setting(DN_FAKE_CUBLASLT);
  CHECK(cuda::CublasLt::open() != nullptr);
  CHECK(cuda::CublasLt::describe() == "cuBLASLt 999");
  CHECK(cuda_products() == "cuBLASLt 999");
  // A library that is found and cannot be used, as with a driver that is too old for it.
  setenv("DN_FAKE_CUBLASLT_FAILS", "1", 1);
  CHECK(cuda::CublasLt::open() == nullptr);
  unsetenv("DN_FAKE_CUBLASLT_FAILS");
  CHECK(cuda_products().find("does not work with this driver") != std::string::npos);
}

DN_TEST(cuda_cublaslt_products) {
  Backend& without = backend(Dtype::kBF16);  // kept for other tests: made before the setting
  const Setting setting(DN_FAKE_CUBLASLT);
  const emulator::DeviceAccess access;  // the stand-in reads and writes device memory from the host
  const std::unique_ptr<Backend> with = make_cuda_backend(0);
  const int64_t before = products_done();
  for (const WeightOrder order : {WeightOrder::kInOut, WeightOrder::kOutIn}) {
    for (const int64_t N : {24, 136}) {  // 136 with a bias has no algorithm
      const int64_t M = 9, K = 16;
      std::vector<std::vector<float>> results[2];
      for (Backend* device : {with.get(), &without}) {
        Array w(*device, Dtype::kF32, K, N, random_values(K * N, 1)),
            x(*device, Dtype::kBF16, M, K, random_values(M * K, 2));
        Array bias(*device, Dtype::kF32, 1, N, random_values(N, 3)),
            extra(*device, Dtype::kBF16, M, N, random_values(M * N, 4));
        Array out(*device, Dtype::kBF16, M, N), dx(*device, Dtype::kBF16, M, K),
            dbias(*device, Dtype::kF32, 1, N, random_values(N, 5));
        const bool in_out = order == WeightOrder::kInOut;
        Array dw(*device, Dtype::kF32, in_out ? K : N, in_out ? N : K, random_values(K * N, 6));
        Weight weight;
        weight.data = w.data();
        weight.order = order;
        weight.K = K;
        weight.N = N;
        std::vector<std::vector<float>>& list = results[device == &without];
        for (const Epilogue epilogue : {Epilogue::kNone, Epilogue::kResidual, Epilogue::kGelu}) {
          device->matmul_forward(out.tensor(), x.tensor(), weight, bias.tensor(), epilogue, extra.tensor(),
                                 MatmulPrecision::kBF16);
          list.push_back(out.get());
          list.push_back(extra.get());
        }
        device->matmul_forward(out.tensor(), x.tensor(), weight, Tensor(), Epilogue::kNone, Tensor(),
                               MatmulPrecision::kBF16);
        list.push_back(out.get());
        device->matmul_backward(dx.tensor(), dw.tensor(), dbias.tensor(), out.tensor(), x.tensor(), weight,
                                MatmulPrecision::kBF16, Store::kAdd);
        list.push_back(dx.get());
        list.push_back(dw.get());
      }
      for (size_t i = 0; i < results[0].size(); ++i)
        CHECK_ERROR(results[0][i], to_doubles(results[1][i]), 1e-2,
                    "result " + std::to_string(i) + ", N = " + std::to_string(N));
    }
  }
  // Where the library refuses, our kernels give the same results: four forward products, dx and dw were its
  // own.
  const int64_t done = products_done() - before;
  CHECK_MSG(before >= 0 && done == 4 * 6, std::to_string(done) + " products by the library, expected 24");
}

}  // namespace
}  // namespace dn::cuda_test

#endif
