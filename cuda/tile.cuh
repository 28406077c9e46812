// Tiles of bf16 in shared memory and their way into tensor-core fragments. Rows are cut into 16-byte chunks
// that are stored at places xor-ed with the row, so that the eight rows of an ldmatrix lie in different
// banks.
#pragma once

#include "cuda/common.cuh"

namespace dn::cuda {

constexpr int kChunk = 8;  // bf16 elements in 16 bytes

// Element offset of a chunk of a (rows, kCols) tile.
template <int kCols>
DN_DEVICE int tile_offset(int row, int chunk) {
  constexpr int kChunks = kCols / kChunk;
  static_assert(kChunks == 4 || kChunks == 8 || kChunks == 16, "rows of 64, 128 or 256 bytes");
  const int swizzle = kChunks == 4 ? (row >> 1) & 3 : row & 7;
  return (row * kChunks + (chunk ^ swizzle)) * kChunk;
}

// Starts copying rows [row, row + kRows) and columns [col, col + kCols) of a row-major matrix; what lies
// outside of row_end and col_end becomes zero. The first element of every chunk decides for the chunk.
template <int kRows, int kCols, int kThreads>
DN_DEVICE void load_tile(bf16* tile, const bf16* matrix, int64_t stride, int64_t row, int64_t row_end,
                         int64_t col, int64_t col_end, int thread) {
  constexpr int kChunks = kCols / kChunk;
  static_assert(kRows * kChunks % kThreads == 0, "every thread copies as much");
  DN_UNROLL
  for (int i = 0; i < kRows * kChunks / kThreads; ++i) {
    const int id = thread + i * kThreads, r = id / kChunks, c = id % kChunks;
    const bool valid = row + r < row_end && col + c * kChunk < col_end;
    copy_async16(tile + tile_offset<kCols>(r, c),
                 valid ? matrix + (row + r) * stride + col + c * kChunk : matrix, valid);
  }
}

// A (16 x 16) of a tile that is row-major in (m, k), at row m and chunk k.
template <int kCols>
DN_DEVICE void load_a(uint32_t (&f)[4], const bf16* tile, int m, int k_chunk, int lane) {
  ldmatrix(f, tile + tile_offset<kCols>(m + (lane & 15), k_chunk + (lane >> 4)));
}
// The same of a tile that is row-major in (k, m).
template <int kCols>
DN_DEVICE void load_a_trans(uint32_t (&f)[4], const bf16* tile, int k, int m_chunk, int lane) {
  ldmatrix_trans(f,
                 tile + tile_offset<kCols>(k + (lane & 7) + ((lane >> 4) << 3), m_chunk + ((lane >> 3) & 1)));
}
// B (16 x 16: two n-tiles, f[0..1] and f[2..3]) of a tile that is row-major in (n, k).
template <int kCols>
DN_DEVICE void load_b(uint32_t (&f)[4], const bf16* tile, int n, int k_chunk, int lane) {
  const int from = DN_PLANTED(3) ? lane & 8 : lane >> 4 << 3;
  ldmatrix(f, tile + tile_offset<kCols>(n + (lane & 7) + from, k_chunk + ((lane >> 3) & 1)));
}
// The same of a tile that is row-major in (k, n).
template <int kCols>
DN_DEVICE void load_b_trans(uint32_t (&f)[4], const bf16* tile, int k, int n_chunk, int lane) {
  const int chunk = DN_PLANTED(9) ? lane & 1 : lane >> 4;
  ldmatrix_trans(f, tile + tile_offset<kCols>(k + (lane & 15), n_chunk + chunk));
}

}  // namespace dn::cuda
