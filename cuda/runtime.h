// The host's side of a device: memory, copies and launches, over cudart in the real build (runtime.cu) and
// over plain memory under the emulator (emulator/runtime.cpp). Nothing else in cuda/ calls cudart. Functions
// throw Error: kDevice when the device fails, kOutOfMemory when memory does not suffice.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace dn::cuda {

using Stream = void*;  // a cudaStream_t

struct Device {
  std::string name;
  size_t memory = 0;  // bytes
  int major = 0, minor = 0;
  int multiprocessors = 0;
};

// The devices of this machine; none, and why, when there is no usable driver or device. Never throws.
std::vector<Device> list_devices(std::string* reason);

// Makes `device` the one that the calling thread talks to.
void select_device(int device);
Stream create_stream();
void destroy_stream(Stream stream);
void synchronize(Stream stream);

// Device memory, not initialised, aligned to 256 bytes. Throws Error(kOutOfMemory) with what is free.
void* device_alloc(size_t bytes);
void device_free(void* p);
void free_memory(size_t* free_bytes, size_t* total_bytes);
// Page-locked host memory, so that copies run beside kernels.
void* pinned_alloc(size_t bytes);
void pinned_free(void* p);

// Allows a kernel that much dynamic shared memory, more than the 48 KiB that need no permission.
void allow_shared_memory(const void* kernel, size_t bytes);

// In stream order. To and from the device: `host` must stay as it is until the stream has reached the copy,
// unless it is ordinary (pageable) memory, which is staged before the call returns.
void copy_to_device(void* dst, const void* host, size_t bytes, Stream stream);
void copy_to_host(void* host, const void* src, size_t bytes, Stream stream);
void copy_on_device(void* dst, const void* src, size_t bytes, Stream stream);
// `rows` runs of `width` bytes, the pitches are bytes between their beginnings.
void copy_rows_on_device(void* dst, size_t dst_pitch, const void* src, size_t src_pitch, size_t width,
                         size_t rows, Stream stream);
void fill_zero(void* dst, size_t bytes, Stream stream);

// Work recorded once and replayed as one. Between begin_capture and end_capture what the calling thread
// issues to the stream (launches with their arguments, copies and fills on the device) is recorded and not
// run. Waiting for the device, taking or giving back memory and copies from or to the host throw
// Error(kDevice) meanwhile: a replay would not repeat them, or would read the host's memory of another call.
using Graph = void*;  // a cudaGraphExec_t
void begin_capture(Stream stream);
Graph end_capture(Stream stream);
// Ends capturing after a failure; what was recorded is dropped. Never throws.
void cancel_capture(Stream stream);
void launch_graph(Graph graph, Stream stream);
void destroy_graph(Graph graph);

}  // namespace dn::cuda
