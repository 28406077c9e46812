// What kernels are written in: thread coordinates, barriers, shuffles, asynchronous copies and the tensor
// core, as thin names over PTX. emulator/device.h has the same names in plain C++, so that one kernel source
// runs on both.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#define DN_DEVICE __device__ __forceinline__
// Threads of a block and, where it matters, how many blocks a multiprocessor should hold.
#define DN_KERNEL(...) __global__ void __launch_bounds__(__VA_ARGS__)
#define DN_UNROLL _Pragma("unroll")
// A deliberate mistake that only the emulator can switch on.
#define DN_PLANTED(number) false

namespace dn::cuda {

struct bf16 {
  uint16_t bits;
};

using Bytes8 = uint2;
using Bytes16 = uint4;

DN_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
DN_DEVICE int block_threads() { return static_cast<int>(blockDim.x); }
DN_DEVICE int block_x() { return static_cast<int>(blockIdx.x); }
DN_DEVICE int block_y() { return static_cast<int>(blockIdx.y); }
DN_DEVICE int block_z() { return static_cast<int>(blockIdx.z); }
template <typename T>
DN_DEVICE T* shared_memory() {
  extern __shared__ __align__(128) unsigned char dn_shared[];
  return reinterpret_cast<T*>(dn_shared);
}

DN_DEVICE void sync_block() { __syncthreads(); }
DN_DEVICE void sync_warp() { __syncwarp(); }
template <typename T>
DN_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xFFFFFFFFu, value, mask);
}
// The value of another lane.
template <typename T>
DN_DEVICE T shuffle(T value, int lane) {
  return __shfl_sync(0xFFFFFFFFu, value, lane);
}

DN_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DN_DEVICE float to_float(bf16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
DN_DEVICE float to_float(float x) { return x; }
DN_DEVICE bf16 to_bf16(float x) {
  bf16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}
// Two numbers as bf16, the first in the low half.
DN_DEVICE uint32_t pack_bf16(float low, float high) {
  uint32_t y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
DN_DEVICE float uint_as_float(uint32_t x) { return __uint_as_float(x); }
DN_DEVICE uint32_t float_as_uint(float x) { return __float_as_uint(x); }

DN_DEVICE uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// 16 bytes from global to shared memory, zeros when not valid; `global` must be a readable address either
// way.
DN_DEVICE void copy_async16(void* shared, const void* global, bool valid) {
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(bytes)
               : "memory");
}
DN_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kGroupsLeft>
DN_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroupsLeft) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements; lane l names row l % 8 of matrix l / 8.
DN_DEVICE void ldmatrix(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
DN_DEVICE void ldmatrix_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
// d (16 x 8, fp32) += a (16 x 16, bf16) * b (16 x 8, bf16).
DN_DEVICE void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace dn::cuda
