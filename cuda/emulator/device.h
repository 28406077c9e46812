// What a kernel sees under the emulator: the same names as device.cuh, in plain C++. Default arguments carry
// the line of the caller, so that a warp whose lanes meet at different calls is found out.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "core/half.h"
#include "cuda/emulator/emulator.h"
#include "cuda/emulator/memory.h"

#define DN_DEVICE inline
#define DN_KERNEL(...) inline void
#define DN_UNROLL
#define DN_PLANTED(number) (dn::emulator::planted == (number))

namespace dn::cuda {

struct bf16 {
  uint16_t bits;
};

struct alignas(8) Bytes8 {
  uint32_t x, y;
};
struct alignas(16) Bytes16 {
  uint32_t x, y, z, w;
};

inline int thread_index() { return emulator::thread_index(); }
inline int block_threads() { return emulator::block_threads(); }
inline int block_x() { return static_cast<int>(emulator::block_index().x); }
inline int block_y() { return static_cast<int>(emulator::block_index().y); }
inline int block_z() { return static_cast<int>(emulator::block_index().z); }
template <typename T>
T* shared_memory() {
  return static_cast<T*>(emulator::shared_memory());
}

enum Call : uint64_t { kBarrier = 1, kSyncWarp, kShuffleXor, kShuffle, kLdmatrix, kLdmatrixTrans, kMma };
inline uint64_t call_id(Call call, int line) {
  return static_cast<uint64_t>(call) << 32 | static_cast<uint32_t>(line);
}

inline void sync_block(int line = __builtin_LINE()) { emulator::block_barrier(call_id(kBarrier, line)); }
inline void sync_warp(int line = __builtin_LINE()) {
  emulator::warp_collective(call_id(kSyncWarp, line), nullptr, [](void**) {});
}

template <typename T>
struct ShuffleArgument {
  T in, out;
  int lane;
};
template <typename T>
T shuffle_xor(T value, int mask, int line = __builtin_LINE()) {
  ShuffleArgument<T> a{value, value, mask};
  emulator::warp_collective(call_id(kShuffleXor, line), &a, [](void** lanes) {
    for (int l = 0; l < 32; ++l) {
      auto* self = static_cast<ShuffleArgument<T>*>(lanes[l]);
      self->out = static_cast<ShuffleArgument<T>*>(lanes[(l ^ self->lane) & 31])->in;
    }
  });
  return a.out;
}
// The value of another lane.
template <typename T>
T shuffle(T value, int lane, int line = __builtin_LINE()) {
  ShuffleArgument<T> a{value, value, lane};
  emulator::warp_collective(call_id(kShuffle, line), &a, [](void** lanes) {
    for (int l = 0; l < 32; ++l) {
      auto* self = static_cast<ShuffleArgument<T>*>(lanes[l]);
      self->out = static_cast<ShuffleArgument<T>*>(lanes[self->lane & 31])->in;
    }
  });
  return a.out;
}

inline float exp2_fast(float x) { return std::exp2(x); }
inline float to_float(bf16 x) { return bf16_to_f32(x.bits); }
inline float to_float(float x) { return x; }
inline bf16 to_bf16(float x) { return {f32_to_bf16(x)}; }
// Two numbers as bf16, the first in the low half.
inline uint32_t pack_bf16(float low, float high) {
  return f32_to_bf16(low) | static_cast<uint32_t>(f32_to_bf16(high)) << 16;
}
inline float uint_as_float(uint32_t x) { return bits_float(x); }
inline uint32_t float_as_uint(float x) { return float_bits(x); }

inline void copy_async16(void* shared, const void* global, bool valid) {
  emulator::issue_copy(shared, global, valid);
}
inline void commit_copies() { emulator::commit_copies(); }
template <int kGroupsLeft>
void wait_copies() {
  emulator::wait_copies(kGroupsLeft);
}

struct LdmatrixArgument {
  uint32_t* registers;
  const uint16_t* row;
};
template <bool kTrans>
void ldmatrix_lanes(void** lanes) {
  for (int l = 0; l < 32; ++l) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      uint16_t e[2];
      for (int half = 0; half < 2; ++half) {
        const int row = kTrans ? 2 * (l % 4) + half : l / 4, col = kTrans ? l / 4 : 2 * (l % 4) + half;
        e[half] = static_cast<LdmatrixArgument*>(lanes[matrix * 8 + row])->row[col];
      }
      static_cast<LdmatrixArgument*>(lanes[l])->registers[matrix] = e[0] | static_cast<uint32_t>(e[1]) << 16;
    }
  }
}
inline void ldmatrix(uint32_t (&registers)[4], const void* row, int line = __builtin_LINE()) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) emulator::fault("ldmatrix row is not aligned to 16 bytes");
  LdmatrixArgument a{registers, static_cast<const uint16_t*>(row)};
  emulator::warp_collective(call_id(kLdmatrix, line), &a, ldmatrix_lanes<false>);
}
inline void ldmatrix_trans(uint32_t (&registers)[4], const void* row, int line = __builtin_LINE()) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) emulator::fault("ldmatrix row is not aligned to 16 bytes");
  LdmatrixArgument a{registers, static_cast<const uint16_t*>(row)};
  emulator::warp_collective(call_id(kLdmatrixTrans, line), &a, ldmatrix_lanes<true>);
}

struct MmaArgument {
  float* d;
  const uint32_t* a;
  uint32_t b[2];
};
// Fragment layouts of mma.sync.m16n8k16 (PTX ISA, "Matrix Fragments for mma.m16n8k16"); sums over k in order.
inline void mma_lanes(void** lanes) {
  float a[16][16], b[16][8], d[16][8];
  for (int l = 0; l < 32; ++l) {
    const MmaArgument& q = *static_cast<MmaArgument*>(lanes[l]);
    const int g = l / 4, t = l % 4;
    for (int i = 0; i < 4; ++i) {
      for (int h = 0; h < 2; ++h) {
        a[g + (i & 1) * 8][2 * t + h + (i >> 1) * 8] = bf16_to_f32(static_cast<uint16_t>(q.a[i] >> (16 * h)));
        d[g + (i >> 1) * 8][2 * t + (i & 1)] = q.d[i];
      }
    }
    for (int i = 0; i < 2; ++i) {
      for (int h = 0; h < 2; ++h)
        b[2 * t + h + i * 8][g] = bf16_to_f32(static_cast<uint16_t>(q.b[i] >> (16 * h)));
    }
  }
  for (int r = 0; r < 16; ++r) {
    for (int k = 0; k < 16; ++k) {
      for (int c = 0; c < 8; ++c) d[r][c] += a[r][k] * b[k][c];
    }
  }
  for (int l = 0; l < 32; ++l) {
    const int g = l / 4, t = l % 4;
    for (int i = 0; i < 4; ++i)
      static_cast<MmaArgument*>(lanes[l])->d[i] = d[g + (i >> 1) * 8][2 * t + (i & 1)];
  }
}
inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                     int line = __builtin_LINE()) {
  MmaArgument argument{d, a, {b0, b1}};
  emulator::warp_collective(call_id(kMma, line), &argument, mma_lanes);
}

}  // namespace dn::cuda
