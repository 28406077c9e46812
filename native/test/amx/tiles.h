// AMX in plain C++, for machines without it: what the intrinsics do to eight tiles of 16 rows of 64 bytes, so
// that the kernels written with them run as they are (Intel's Instruction Set Reference: TILELOADD,
// TILESTORED, TDPBF16PS, TDPBUSD). Included before a kernel's source, which then finds these instead of the
// compiler's. Denormal numbers are whatever the thread's MXCSR makes of them.
#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#undef _tile_dpbusd

namespace dn::test::amx {
namespace {

struct Tile {
  uint8_t rows[16][64];
};
thread_local Tile tiles[8];

inline void load(int tile, const void* from, size_t stride) {
  for (size_t r = 0; r < 16; ++r)
    memcpy(tiles[tile].rows[r], static_cast<const char*>(from) + r * stride, 64);
}

inline void store(int tile, void* to, size_t stride) {
  for (size_t r = 0; r < 16; ++r) memcpy(static_cast<char*>(to) + r * stride, tiles[tile].rows[r], 64);
}

// The even or the odd numbers of a row of pairs of bf16, as fp32.
inline void widen(float* to, const uint8_t* row, bool odd) {
  uint32_t words[16];
  memcpy(words, row, sizeof words);
  for (uint32_t& word : words) word = odd ? word & 0xffff0000u : word << 16;
  memcpy(to, words, sizeof words);
}

// Even and odd numbers of the step in a chain of fused multiply-adds each, from zero; then their sum is
// added.
inline void multiply_bf16(int c, int a, int b) {
  float left[2][16], right[2][16][16];
  for (int odd = 0; odd < 2; ++odd) {
    for (int k = 0; k < 16; ++k) widen(right[odd][k], tiles[b].rows[k], odd);
  }
  for (int m = 0; m < 16; ++m) {
    float chain[2][16] = {}, sum[16];
    memcpy(sum, tiles[c].rows[m], sizeof sum);
    for (int odd = 0; odd < 2; ++odd) {
      widen(left[odd], tiles[a].rows[m], odd);
      for (int k = 0; k < 16; ++k) {
        for (int n = 0; n < 16; ++n)
          chain[odd][n] = __builtin_fmaf(left[odd][k], right[odd][k][n], chain[odd][n]);
      }
    }
    for (int n = 0; n < 16; ++n) sum[n] += chain[0][n] + chain[1][n];
    memcpy(tiles[c].rows[m], sum, sizeof sum);
  }
}

// Four products of an unsigned byte of a and a signed one of b at a time.
inline void multiply_int8(int c, int a, int b) {
  for (int m = 0; m < 16; ++m) {
    int32_t sum[16];
    memcpy(sum, tiles[c].rows[m], sizeof sum);
    for (int k = 0; k < 64; ++k) {
      const int32_t left = tiles[a].rows[m][k];
      for (int n = 0; n < 16; ++n) sum[n] += left * static_cast<int8_t>(tiles[b].rows[k / 4][4 * n + k % 4]);
    }
    memcpy(tiles[c].rows[m], sum, sizeof sum);
  }
}

}  // namespace
}  // namespace dn::test::amx

#define _tile_loadconfig(config) static_cast<void>(config)
#define _tile_release() static_cast<void>(0)
#define _tile_zero(tile) memset(&dn::test::amx::tiles[tile], 0, sizeof(dn::test::amx::Tile))
#define _tile_loadd(tile, from, stride) dn::test::amx::load(tile, from, stride)
#define _tile_stored(tile, to, stride) dn::test::amx::store(tile, to, stride)
#define _tile_dpbf16ps(c, a, b) dn::test::amx::multiply_bf16(c, a, b)
#define _tile_dpbusd(c, a, b) dn::test::amx::multiply_int8(c, a, b)
