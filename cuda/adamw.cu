// The optimiser: AdamW over a list of segments in one launch, and the sum of squares that clipping needs.

#include "cuda/common.cuh"
#include "cuda/rows.h"

namespace dn::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kPerBlock = kThreads * 4;
constexpr int64_t kPerSum = kThreads * 64;  // elements of a partial sum of squares

struct AdamWParams {
  const AdamWSegment* segments;
  int64_t count;
  AdamWConstants k;
};

DN_KERNEL(kThreads) adamw_kernel(AdamWParams p) {
  // The last segment that begins at or before this block.
  int64_t low = 0, high = p.count;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (p.segments[middle].first_block <= block_x()) {
      low = middle;
    } else {
      high = middle;
    }
  }
  const AdamWSegment s = p.segments[low];
  const int64_t first = (block_x() - s.first_block) * kPerBlock + thread_index();
  DN_UNROLL
  for (int64_t i = first; i < first + kPerBlock; i += kThreads) {
    if (i >= s.n) return;
    const float g = s.gradients[i] * p.k.gradient_scale;
    const float m = p.k.beta1 * s.m[i] + (1 - p.k.beta1) * g;
    const float v = p.k.beta2 * s.v[i] + (1 - p.k.beta2) * g * g;
    const float param = s.decay * s.params[i] - p.k.step_size * m / (sqrtf(v * p.k.v_scale) + p.k.eps);
    s.m[i] = m;
    s.v[i] = v;
    s.params[i] = param;
    if (s.shadow) static_cast<bf16*>(s.shadow)[i] = to_bf16(param);
  }
}

struct SquareParams {
  double* sum;
  const float* x;
  const double* partial;
  int64_t n;
};

DN_KERNEL(kThreads) squares_kernel(SquareParams p) {
  const int64_t first = block_x() * kPerSum;
  const int64_t end = first + kPerSum < p.n ? first + kPerSum : p.n;
  double sum = 0;
  for (int64_t i = first + thread_index(); i < end; i += kThreads)
    sum += static_cast<double>(p.x[i]) * static_cast<double>(p.x[i]);
  sum = block_sum(sum, shared_memory<double>());
  if (thread_index() == 0) p.sum[block_x()] = sum;
}

DN_KERNEL(kThreads) add_doubles_kernel(SquareParams p) {
  double sum = 0;
  for (int64_t i = thread_index(); i < p.n; i += kThreads) sum += p.partial[i];
  sum = block_sum(sum, shared_memory<double>());
  if (thread_index() == 0) *p.sum = sum;
}

constexpr size_t kSumShared = kThreads / kWarp * sizeof(double);

}  // namespace

int64_t adamw_blocks(int64_t n) { return blocks_of(n, kPerBlock); }

void adamw(const AdamWSegment* segments, int64_t count, int64_t blocks, const AdamWConstants& constants,
           Stream stream) {
  launch(adamw_kernel, Grid{static_cast<unsigned>(blocks)}, kThreads, 0, stream,
         AdamWParams{segments, count, constants});
}

int64_t square_partials(int64_t n) { return blocks_of(n, kPerSum); }

void sum_of_squares(double* sum, const float* x, int64_t n, double* partial, Stream stream) {
  const int64_t partials = square_partials(n);
  launch(squares_kernel, Grid{static_cast<unsigned>(partials)}, kThreads, kSumShared, stream,
         SquareParams{partial, x, nullptr, n});
  launch(add_doubles_kernel, Grid{1}, kThreads, kSumShared, stream,
         SquareParams{sum, nullptr, partial, partials});
}

}  // namespace dn::cuda
