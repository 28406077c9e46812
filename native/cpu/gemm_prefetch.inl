// What a tile of a matrix product asks for ahead of time, and how the fp32 product spreads it over its
// multiply-adds. Included after immintrin.h by the sources of instruction sets; everything has internal
// linkage.

#include "cpu/gemm_kernels.h"

namespace dn::cpu {
namespace {

// `slots` places, `gap` steps of the reduction each, with `burst` lines in each of them: slots * gap <=
// depth.
struct PrefetchPlan {
  int64_t slots;
  int64_t burst;
  int64_t gap;
};

inline PrefetchPlan plan_prefetch(int64_t depth, int64_t lines) {
  PrefetchPlan plan = {0, 1, 1};
  if (lines <= 0) return plan;
  plan.burst = (lines + depth - 1) / depth;
  plan.slots = (lines + plan.burst - 1) / plan.burst;
  plan.gap = depth / plan.slots;
  return plan;
}

// One row of a tile of C, or of what is laid out as C. It has three lines where rows do not begin at one, as
// those of (R, 50257) logits.
__attribute__((always_inline)) inline void prefetch_row(const float* c) {
  _mm_prefetch(reinterpret_cast<const char*>(c), _MM_HINT_T0);
  _mm_prefetch(reinterpret_cast<const char*>(c + 16), _MM_HINT_T0);
  _mm_prefetch(reinterpret_cast<const char*>(c + kGemmPanel - 1), _MM_HINT_T0);
}

// The line of a plain B that is read some steps after the one at b: no hardware prefetcher follows its
// stride.
__attribute__((always_inline)) inline void prefetch_plain(const float* b, int64_t b_stride) {
  constexpr int64_t kSteps = 12;
  _mm_prefetch(reinterpret_cast<const char*>(b + kSteps * b_stride), _MM_HINT_T1);
}

// What the finish of a tile reads and writes besides C.
__attribute__((always_inline)) inline void prefetch_finish(const GemmFinish* f) {
  if (!f) return;
  for (int64_t r = 0; f->residual && r < f->rows; ++r) prefetch_row(f->residual + r * f->extra_stride);
  for (int64_t r = 0; f->pre && r < f->rows; ++r) prefetch_row(f->pre + r * f->extra_stride);
}

__attribute__((always_inline)) inline void take_lines(GemmPrefetch* p, int64_t count) {
  p->lines -= count;
  for (; count > 0; --count) {
    _mm_prefetch(reinterpret_cast<const char*>(p->at), _MM_HINT_T1);
    p->at += 16;
    if (--p->left == 0) {
      p->left = p->run;
      p->at += p->jump;
    }
  }
}

// The line that lies kBytes behind the one at `at`.
template <int64_t kBytes>
__attribute__((always_inline)) inline void fetch_line(const void* at) {
  _mm_prefetch(static_cast<const char*>(at) + kBytes, _MM_HINT_T1);
}

// Lines of t.prefetch, some at every pair of the reduction, for a tile with a weight of bf16.
class PairPrefetch {
 public:
  PairPrefetch(const GemmTile& t, int64_t lines) : ahead_(*t.prefetch), lines_(lines) {
    const int64_t pairs = (t.depth + 1) / 2;
    burst_ = (lines_ + pairs - 1) / pairs;
  }
  __attribute__((always_inline)) void pair() {
    if (lines_ <= 0) return;
    take_lines(&ahead_, lines_ < burst_ ? lines_ : burst_);
    lines_ -= burst_;
  }
  void end(const GemmTile& t) { *t.prefetch = ahead_; }

 private:
  GemmPrefetch ahead_;
  int64_t lines_;
  int64_t burst_;
};

}  // namespace
}  // namespace dn::cpu
