// What every kernel file includes: the device primitives (or the emulator's), launches, and the few helpers
// that all kernels share. Letters as in core/backend.h.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/error.h"
#include "cuda/live.h"
#include "cuda/runtime.h"

#ifdef DN_CUDA_EMULATOR
#include "cuda/emulator/device.h"
#else
#include "cuda/device.cuh"
#endif

namespace dn::cuda {

constexpr int kWarp = 32;

#ifdef DN_CUDA_EMULATOR
using emulator::Grid;
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), Grid grid, int threads, size_t shared_bytes, Stream stream,
            Arguments... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  if (emulator::record(stream, [=] { launch(kernel, grid, threads, shared_bytes, nullptr, arguments...); }))
    return;
  const emulator::DeviceAccess access;
  emulator::run_grid(grid, threads, shared_bytes, [&] { kernel(arguments...); });
}
#else
struct Grid {
  unsigned x = 1, y = 1, z = 1;
};
template <typename T>
struct Same {
  using Type = T;
};
template <typename... Parameters>
void launch(void (*kernel)(Parameters...), Grid grid, int threads, size_t shared_bytes, Stream stream,
            typename Same<Parameters>::Type... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  const void* const function = reinterpret_cast<const void*>(kernel);
  if (shared_bytes > 48 * 1024) allow_shared_memory(function, shared_bytes);
  void* list[] = {&arguments...};
  cudaLaunchKernel(function, dim3(grid.x, grid.y, grid.z), dim3(static_cast<unsigned>(threads)), list,
                   shared_bytes, static_cast<cudaStream_t>(stream));
  const cudaError_t status = cudaGetLastError();
  if (status != cudaSuccess) {
    throw Error(Code::kDevice, std::string("launching a kernel failed: ") + cudaGetErrorName(status) + " (" +
                                   cudaGetErrorString(status) + ")");
  }
}
#endif

inline unsigned blocks_of(int64_t n, int64_t per_block) {
  return static_cast<unsigned>((n + per_block - 1) / per_block);
}

// Whether a row of the launch lies beyond those that count.
DN_DEVICE bool beyond(const LiveRows& live, int64_t row) {
  return live.count && live.first + row >= *live.count;
}

template <typename T>
DN_DEVICE T from_float(float x);
template <>
DN_DEVICE float from_float<float>(float x) {
  return x;
}
template <>
DN_DEVICE bf16 from_float<bf16>(float x) {
  return to_bf16(x);
}

// kN neighbouring elements as fp32, in one access of 8 or 16 bytes where kN > 1: p must then be aligned to
// it.
template <int kN, typename T>
DN_DEVICE void load_vector(float (&x)[kN], const T* p) {
  if constexpr (kN == 1) {
    x[0] = to_float(p[0]);
  } else if constexpr (kN == 4 && sizeof(T) == 4) {
    const Bytes16 v = *reinterpret_cast<const Bytes16*>(p);
    x[0] = uint_as_float(v.x), x[1] = uint_as_float(v.y), x[2] = uint_as_float(v.z),
    x[3] = uint_as_float(v.w);
  } else {
    static_assert(kN == 4 && sizeof(T) == 2, "vectors have 1 or 4 elements");
    const Bytes8 v = *reinterpret_cast<const Bytes8*>(p);
    x[0] = uint_as_float(v.x << 16), x[1] = uint_as_float(v.x & 0xFFFF0000u);
    x[2] = uint_as_float(v.y << 16), x[3] = uint_as_float(v.y & 0xFFFF0000u);
  }
}
template <int kN, typename T>
DN_DEVICE void store_vector(T* p, const float (&x)[kN]) {
  if constexpr (kN == 1) {
    p[0] = from_float<T>(x[0]);
  } else if constexpr (kN == 4 && sizeof(T) == 4) {
    Bytes16 v;
    v.x = float_as_uint(x[0]), v.y = float_as_uint(x[1]), v.z = float_as_uint(x[2]),
    v.w = float_as_uint(x[3]);
    *reinterpret_cast<Bytes16*>(p) = v;
  } else {
    static_assert(kN == 4 && sizeof(T) == 2, "vectors have 1 or 4 elements");
    Bytes8 v;
    v.x = pack_bf16(x[0], x[1]), v.y = pack_bf16(x[2], x[3]);
    *reinterpret_cast<Bytes8*>(p) = v;
  }
}

template <typename T>
DN_DEVICE T warp_sum(T x) {
  DN_UNROLL
  for (int mask = kWarp / 2; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}
DN_DEVICE float warp_max(float x) {
  DN_UNROLL
  for (int mask = kWarp / 2; mask > 0; mask /= 2) x = fmaxf(x, shuffle_xor(x, mask));
  return x;
}

// Sum over the block, in a fixed order; every thread gets it. `scratch`: a shared T per warp. All threads
// must call.
template <typename T>
DN_DEVICE T block_sum(T x, T* scratch) {
  const int warps = block_threads() / kWarp, thread = thread_index();
  x = warp_sum(x);
  if (thread % kWarp == 0) scratch[thread / kWarp] = x;
  if (!DN_PLANTED(10)) sync_block();
  T sum = 0;
  for (int w = 0; w < warps; ++w) sum += scratch[w];
  sync_block();
  return sum;
}

}  // namespace dn::cuda
