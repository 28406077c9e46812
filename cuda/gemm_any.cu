// A plain product for what tensor cores do not take: fp32 (the mode for checking) and operands that are not
// aligned. Blocks of 64 x 64, a thread 4 x 4; one sum per element over k in ascending order.

#include "cuda/epilogue.cuh"
#include "cuda/gemm.h"

namespace dn::cuda {
namespace {

constexpr int kBlock = 64;
constexpr int kSlice = 16;
constexpr int kThreads = 256;
constexpr int kPer = 4;

template <typename In, typename Out>
struct AnyParams {
  int64_t M, N, K;
  const In* a;
  const In* b;
  int64_t a_m, a_k, b_k, b_n;  // elements from one row or column to the next
  EpilogueParams<Out> epilogue;
};

template <typename In, typename Out>
DN_KERNEL(kThreads)
gemm_any_kernel(AnyParams<In, Out> p) {
  float* const a = shared_memory<float>();  // (kSlice, kBlock)
  float* const b = a + kSlice * kBlock;
  const int thread = thread_index(), tm = thread / 16 * kPer, tn = thread % 16;
  const int64_t block_n = static_cast<int64_t>(block_x()) * kBlock,
                block_m = static_cast<int64_t>(block_y()) * kBlock;
  float c[kPer][kPer] = {};
  for (int64_t begin = 0; begin < p.K; begin += kSlice) {
    for (int i = thread; i < kSlice * kBlock; i += kThreads) {
      const int64_t k = begin + i / kBlock, m = block_m + i % kBlock, n = block_n + i % kBlock;
      a[i] = k < p.K && m < p.M ? to_float(p.a[m * p.a_m + k * p.a_k]) : 0.0f;
      b[i] = k < p.K && n < p.N ? to_float(p.b[k * p.b_k + n * p.b_n]) : 0.0f;
    }
    sync_block();
    for (int k = 0; k < kSlice; ++k) {
      DN_UNROLL
      for (int i = 0; i < kPer; ++i) {
        DN_UNROLL
        for (int j = 0; j < kPer; ++j) c[i][j] += a[k * kBlock + tm + i] * b[k * kBlock + tn + j * 16];
      }
    }
    sync_block();
  }
  DN_UNROLL
  for (int i = 0; i < kPer; ++i) {
    DN_UNROLL
    for (int j = 0; j < kPer; ++j) {
      const int64_t m = block_m + tm + i, n = block_n + tn + j * 16;
      if (m < p.M && n < p.N) store_element(p.epilogue, c[i][j], m, n);
    }
  }
}

template <typename In, typename Out>
void run(const Product& p, Stream stream) {
  AnyParams<In, Out> g;
  g.M = p.M;
  g.N = p.N;
  g.K = p.K;
  g.a = static_cast<const In*>(p.a.data);
  g.b = static_cast<const In*>(p.b.data);
  g.a_m = p.a.transposed ? 1 : p.a.stride;
  g.a_k = p.a.transposed ? p.a.stride : 1;
  g.b_k = p.b.transposed ? 1 : p.b.stride;
  g.b_n = p.b.transposed ? p.b.stride : 1;
  g.epilogue = epilogue_of<Out>(p);
  launch(gemm_any_kernel<In, Out>, Grid{blocks_of(p.N, kBlock), blocks_of(p.M, kBlock)}, kThreads,
         2 * kSlice * kBlock * sizeof(float), stream, g);
}

}  // namespace

void multiply_any(const Product& p, Stream stream) {
  if (p.input == Dtype::kF32) {
    run<float, float>(p, stream);
  } else if (p.output == Dtype::kF32) {
    run<bf16, float>(p, stream);
  } else {
    run<bf16, bf16>(p, stream);
  }
}

}  // namespace dn::cuda
