// The host's side of a device over cudart, linked statically: loading the library needs no driver, only using
// it does.

#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <utility>

#include "core/error.h"
#include "cuda/runtime.h"

namespace dn::cuda {
namespace {

void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // an error that is not sticky must not show up in the next call
  throw Error(
      status == cudaErrorMemoryAllocation ? Code::kOutOfMemory : Code::kDevice,
      std::string(what) + " failed: " + cudaGetErrorName(status) + " (" + cudaGetErrorString(status) + ")");
}

cudaStream_t native(Stream stream) { return static_cast<cudaStream_t>(stream); }

thread_local bool capturing = false;
void refuse_in_capture(const char* what) {
  if (capturing) throw Error(Code::kDevice, std::string(what) + " while a graph is captured");
}

}  // namespace

std::vector<Device> list_devices(std::string* reason) {
  std::vector<Device> devices;
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess) {
    cudaGetLastError();
    *reason = status == cudaErrorInsufficientDriver
                  ? "no usable NVIDIA driver was found (the library was built with CUDA " +
                        std::to_string(CUDART_VERSION / 1000) + "." +
                        std::to_string(CUDART_VERSION % 1000 / 10) + ", which needs driver " +
                        (CUDART_VERSION >= 13000 ? "R580" : "R525") + " or newer)"
                  : std::string("no CUDA device: ") + cudaGetErrorString(status);
    return devices;
  }
  for (int i = 0; i < count; ++i) {
    cudaDeviceProp properties;
    Device device;
    if (cudaGetDeviceProperties(&properties, i) != cudaSuccess) {
      // It keeps its number, so that those after it keep theirs; nobody can choose it.
      cudaGetLastError();
      device.name = "a device that does not answer";
      devices.push_back(device);
      continue;
    }
    device.name = properties.name;
    device.memory = properties.totalGlobalMem;
    device.major = properties.major;
    device.minor = properties.minor;
    device.multiprocessors = properties.multiProcessorCount;
    devices.push_back(device);
  }
  if (devices.empty()) *reason = "the driver reports no CUDA device";
  return devices;
}

void select_device(int device) { check(cudaSetDevice(device), "selecting the device"); }

Stream create_stream() {
  cudaStream_t stream = nullptr;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "creating a stream");
  return stream;
}
void destroy_stream(Stream stream) { cudaStreamDestroy(native(stream)); }
void synchronize(Stream stream) {
  refuse_in_capture("waiting for the device");
  check(cudaStreamSynchronize(native(stream)), "waiting for the device");
}

void* device_alloc(size_t bytes) {
  refuse_in_capture("allocating device memory");
  void* p = nullptr;
  const cudaError_t status = cudaMalloc(&p, bytes > 0 ? bytes : 1);
  if (status == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    size_t free_bytes = 0, total_bytes = 0;
    cudaMemGetInfo(&free_bytes, &total_bytes);
    throw Error(Code::kOutOfMemory, "the device has " + std::to_string(free_bytes) + " of " +
                                        std::to_string(total_bytes) + " bytes free, " +
                                        std::to_string(bytes) + " were asked for");
  }
  check(status, "allocating device memory");
  return p;
}
void device_free(void* p) { cudaFree(p); }
void free_memory(size_t* free_bytes, size_t* total_bytes) {
  check(cudaMemGetInfo(free_bytes, total_bytes), "asking for free memory");
}
void* pinned_alloc(size_t bytes) {
  refuse_in_capture("allocating page-locked memory");
  void* p = nullptr;
  check(cudaHostAlloc(&p, bytes > 0 ? bytes : 1, cudaHostAllocDefault), "allocating page-locked memory");
  return p;
}
void pinned_free(void* p) { cudaFreeHost(p); }

// Asked for at every launch, told to the driver once per kernel and device.
void allow_shared_memory(const void* kernel, size_t bytes) {
  static std::mutex mutex;
  static std::map<std::pair<int, const void*>, size_t> allowed;
  int device = 0;
  check(cudaGetDevice(&device), "asking for the device");
  const std::lock_guard<std::mutex> lock(mutex);
  size_t& known = allowed[{device, kernel}];
  if (known >= bytes) return;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
        "allowing a kernel its shared memory");
  known = bytes;
}

void copy_to_device(void* dst, const void* host, size_t bytes, Stream stream) {
  refuse_in_capture("copying from the host");
  check(cudaMemcpyAsync(dst, host, bytes, cudaMemcpyHostToDevice, native(stream)), "copying to the device");
}
void copy_to_host(void* host, const void* src, size_t bytes, Stream stream) {
  refuse_in_capture("copying to the host");
  check(cudaMemcpyAsync(host, src, bytes, cudaMemcpyDeviceToHost, native(stream)), "copying from the device");
}
void copy_on_device(void* dst, const void* src, size_t bytes, Stream stream) {
  check(cudaMemcpyAsync(dst, src, bytes, cudaMemcpyDeviceToDevice, native(stream)), "copying on the device");
}
void copy_rows_on_device(void* dst, size_t dst_pitch, const void* src, size_t src_pitch, size_t width,
                         size_t rows, Stream stream) {
  check(cudaMemcpy2DAsync(dst, dst_pitch, src, src_pitch, width, rows, cudaMemcpyDeviceToDevice,
                          native(stream)),
        "copying rows on the device");
}
void fill_zero(void* dst, size_t bytes, Stream stream) {
  check(cudaMemsetAsync(dst, 0, bytes, native(stream)), "clearing device memory");
}

// Other threads may use the device meanwhile: what they call does not concern this capture.
void begin_capture(Stream stream) {
  check(cudaStreamBeginCapture(native(stream), cudaStreamCaptureModeThreadLocal), "beginning a capture");
  capturing = true;
}
Graph end_capture(Stream stream) {
  capturing = false;
  cudaGraph_t graph = nullptr;
  check(cudaStreamEndCapture(native(stream), &graph), "capturing a graph");
  cudaGraphExec_t executable = nullptr;
  const cudaError_t status = cudaGraphInstantiate(&executable, graph, 0);
  cudaGraphDestroy(graph);
  check(status, "instantiating a graph");
  return executable;
}
void cancel_capture(Stream stream) {
  capturing = false;
  cudaGraph_t graph = nullptr;
  if (cudaStreamEndCapture(native(stream), &graph) == cudaSuccess && graph) cudaGraphDestroy(graph);
  cudaGetLastError();
}
void launch_graph(Graph graph, Stream stream) {
  check(cudaGraphLaunch(static_cast<cudaGraphExec_t>(graph), native(stream)), "launching a graph");
}
void destroy_graph(Graph graph) { cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(graph)); }

}  // namespace dn::cuda
