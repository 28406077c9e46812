// Takes the place of cuda/ in builds without it, so that asking for a GPU gives a reason instead of a link
// error.

#include "core/backend.h"
#include "core/error.h"

namespace dn {

std::vector<CudaDevice> cuda_devices(std::string* reason) {
  *reason = "this build has no CUDA support";
  return {};
}

std::string cuda_products() { return {}; }

std::unique_ptr<Backend> make_cuda_backend(int device, Dtype) {
  throw Error(Code::kDevice,
              "this build has no CUDA support, so device cuda:" + std::to_string(device) +
                  " cannot be used; build with npm run build:cuda where the CUDA toolkit is installed");
}

}  // namespace dn
