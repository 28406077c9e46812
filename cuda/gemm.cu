// The own tensor-core product: bf16 operands, fp32 accumulation, epilogues fused; compiled for the
// combinations of transposed operands that the model has. Blocks of 128 x 128 or, when those would leave the
// device idle, 64 x 64; a ring of kStages slices of 32 k hides the copies. Both block sizes add over k in the
// same order.

#include "cuda/cublaslt.h"
#include "cuda/epilogue.cuh"
#include "cuda/gemm.h"
#include "cuda/tile.cuh"

namespace dn::cuda {
namespace {

constexpr int kSlice = 32;  // k per stage
constexpr int kStages = 4;

template <typename T>
struct GemmParams {
  int64_t M, N, K;
  int64_t b_rows;  // of B stored (K, N): fewer than K where A is padded along k
  const bf16* a;
  const bf16* b;
  int64_t a_stride, b_stride;
  EpilogueParams<T> epilogue;
  LiveRows live;
};

// Blocks of kBlock x kBlock by (kBlock / 32)^2 / 2 warps of 64 x 32, or for 64: four warps of 32 x 32.
template <int kBlock>
struct BlockShape {
  static constexpr int kWarpM = kBlock == 128 ? 64 : 32;
  static constexpr int kWarpN = 32;
  static constexpr int kWarpsM = kBlock / kWarpM;
  static constexpr int kWarpsN = kBlock / kWarpN;
  static constexpr int kThreads = kWarpsM * kWarpsN * kWarp;
  static constexpr size_t kSharedBytes = size_t{kStages} * 2 * kBlock * kSlice * sizeof(bf16);
};

// kTransA: A is stored (K, M); kTransB: B is stored (N, K).
template <typename T, int kBlock, bool kTransA, bool kTransB>
DN_KERNEL(BlockShape<kBlock>::kThreads)
gemm_kernel(GemmParams<T> p) {
  using Shape = BlockShape<kBlock>;
  constexpr int kTileElements = kBlock * kSlice, kTilesM = Shape::kWarpM / 16, kTilesN = Shape::kWarpN / 8;
  bf16* const tiles_a = shared_memory<bf16>();
  bf16* const tiles_b = tiles_a + kStages * kTileElements;
  const int thread = thread_index(), warp = thread / kWarp, lane = thread % kWarp;
  const int warp_m = warp % Shape::kWarpsM * Shape::kWarpM, warp_n = warp / Shape::kWarpsM * Shape::kWarpN;
  const int64_t block_n = static_cast<int64_t>(block_x()) * kBlock,
                block_m = static_cast<int64_t>(block_y()) * kBlock;
  if (beyond(p.live, block_m)) return;
  const int slices = static_cast<int>((p.K + kSlice - 1) / kSlice);

  const auto load = [&](int slice) {
    bf16* const a = tiles_a + slice % kStages * kTileElements;
    bf16* const b = tiles_b + slice % kStages * kTileElements;
    const int64_t k = static_cast<int64_t>(slice) * kSlice;
    if constexpr (kTransA) {
      load_tile<kSlice, kBlock, Shape::kThreads>(a, p.a, p.a_stride, k, p.K, block_m, p.M, thread);
    } else {
      load_tile<kBlock, kSlice, Shape::kThreads>(a, p.a, p.a_stride, block_m, p.M, k, p.K, thread);
    }
    if constexpr (kTransB) {
      load_tile<kBlock, kSlice, Shape::kThreads>(b, p.b, p.b_stride, block_n, p.N, k, p.K, thread);
    } else {
      load_tile<kSlice, kBlock, Shape::kThreads>(b, p.b, p.b_stride, k, kTransA ? p.K : p.b_rows, block_n,
                                                 p.N, thread);
    }
  };
  for (int slice = 0; slice < kStages - 1; ++slice) {
    if (slice < slices) load(slice);
    commit_copies();
  }

  float c[kTilesM][kTilesN][4];
  DN_UNROLL
  for (int i = 0; i < kTilesM; ++i) {
    DN_UNROLL
    for (int j = 0; j < kTilesN; ++j) {
      DN_UNROLL
      for (int e = 0; e < 4; ++e) c[i][j][e] = 0;
    }
  }

  for (int slice = 0; slice < slices; ++slice) {
    if (DN_PLANTED(8)) {
      wait_copies<kStages - 1>();  // one group too few
    } else {
      wait_copies<kStages - 2>();
    }
    // Everybody has this slice, and has finished with the one before it, whose place is loaded next.
    sync_block();
    if (slice + kStages - 1 < slices) load(slice + kStages - 1);
    commit_copies();
    const bf16* const a = tiles_a + slice % kStages * kTileElements;
    const bf16* const b = tiles_b + slice % kStages * kTileElements;
    DN_UNROLL
    for (int kk = 0; kk < kSlice / 16; ++kk) {
      uint32_t fa[kTilesM][4];
      DN_UNROLL
      for (int i = 0; i < kTilesM; ++i) {
        if constexpr (kTransA) {
          load_a_trans<kBlock>(fa[i], a, kk * 16, (warp_m + i * 16) / kChunk, lane);
        } else {
          load_a<kSlice>(fa[i], a, warp_m + i * 16, kk * 2, lane);
        }
      }
      DN_UNROLL
      for (int j = 0; j < kTilesN / 2; ++j) {
        uint32_t fb[4];
        if constexpr (kTransB) {
          load_b<kSlice>(fb, b, warp_n + j * 16, kk * 2, lane);
        } else {
          load_b_trans<kBlock>(fb, b, kk * 16, (warp_n + j * 16) / kChunk, lane);
        }
        DN_UNROLL
        for (int i = 0; i < kTilesM; ++i) {
          mma_bf16(c[i][2 * j], fa[i], fb[0], fb[1]);
          mma_bf16(c[i][2 * j + 1], fa[i], fb[2], fb[3]);
        }
      }
    }
  }
  wait_copies<0>();

  DN_UNROLL
  for (int i = 0; i < kTilesM; ++i) {
    DN_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int64_t m = block_m + warp_m + i * 16 + half * 8 + lane / 4;
      if (m >= p.M) continue;
      DN_UNROLL
      for (int j = 0; j < kTilesN; ++j) {
        const int64_t n = block_n + warp_n + j * 8 + (lane & 3) * 2;
        if (n < p.N) store_pair(p.epilogue, c[i][j][2 * half], c[i][j][2 * half + 1], m, n, p.N);
      }
    }
  }
}

template <typename T, int kBlock>
void run(const Product& p, Stream stream) {
  using Shape = BlockShape<kBlock>;
  GemmParams<T> g;
  g.M = p.M;
  g.N = p.N;
  g.K = p.padded_k ? (p.K + kChunk - 1) / kChunk * kChunk : p.K;
  g.b_rows = p.K;
  g.a = static_cast<const bf16*>(p.a.data);
  g.b = static_cast<const bf16*>(p.b.data);
  g.a_stride = p.a.stride;
  g.b_stride = p.b.stride;
  g.epilogue = epilogue_of<T>(p);
  g.live = p.live;
  const Grid grid{blocks_of(p.N, kBlock), blocks_of(p.M, kBlock)};
  // What the model asks for: activations times a weight in either order, fp32 logits, and fp32 gradients of
  // weights.
  void (*kernel)(GemmParams<T>) = nullptr;
  if constexpr (sizeof(T) == sizeof(bf16)) {
    kernel = p.b.transposed ? gemm_kernel<T, kBlock, false, true> : gemm_kernel<T, kBlock, false, false>;
  } else {
    kernel = p.b.transposed ? gemm_kernel<T, kBlock, false, true> : gemm_kernel<T, kBlock, true, false>;
  }
  launch(kernel, grid, Shape::kThreads, Shape::kSharedBytes, stream, g);
}

}  // namespace

bool on_tensor_cores(const Product& p) {
  const auto aligned = [](const Operand& o) {
    return o.stride % kChunk == 0 && reinterpret_cast<uintptr_t>(o.data) % 16 == 0;
  };
  // Along k a chunk must not run past the end; along m and n what it brings too much is never stored, but it
  // must lie inside the row.
  const bool k_whole = p.K % kChunk == 0 || (p.padded_k && !p.a.transposed && !p.b.transposed) ||
                       (p.a.transposed && !p.b.transposed);
  const auto covers = [](int64_t extent, int64_t stride) {
    return (extent + kChunk - 1) / kChunk * kChunk <= stride;
  };
  const bool compiled = p.output == Dtype::kBF16 ? !p.a.transposed : p.a.transposed != p.b.transposed;
  return p.input == Dtype::kBF16 && compiled && aligned(p.a) && aligned(p.b) && k_whole &&
         (!p.a.transposed || covers(p.M, p.a.stride)) && (p.b.transposed || covers(p.N, p.b.stride));
}

void multiply_tensor_cores(const Product& p, int multiprocessors, Stream stream) {
  const bool small = static_cast<int64_t>(blocks_of(p.N, 128)) * blocks_of(p.M, 128) < multiprocessors;
  if (p.output == Dtype::kBF16) {
    small ? run<bf16, 64>(p, stream) : run<bf16, 128>(p, stream);
  } else {
    small ? run<float, 64>(p, stream) : run<float, 128>(p, stream);
  }
}

}  // namespace dn::cuda
