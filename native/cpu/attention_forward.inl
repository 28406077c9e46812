// What attention's forward pass has in common on vectors and on tiles: the base of its exponentials and what
// it asks the caches for. Everything has internal linkage.
#include "cpu/attention_kernels.h"
#include "cpu/simd.inl"

namespace dn::cpu {
namespace {

// Scores are taken in base 2: e^x = 2^(x log2 e).
constexpr float kLog2E = 1.44269504f;
constexpr float kLn2 = 0.693147181f;

constexpr int64_t kLineFloats = 16;  // of a cache line

// Requests for a row of a head, which need not begin at a line.
__attribute__((always_inline)) inline void ask_row(const float* row, int64_t HS) {
  for (int64_t d = 0; d < HS; d += kLineFloats) simd::prefetch(row + d);
  simd::prefetch(row + HS - 1);
}
__attribute__((always_inline)) inline void ask_row_to_write(const float* row, int64_t HS) {
  for (int64_t d = 0; d < HS; d += kLineFloats) simd::prefetch_to_write(row + d);
  simd::prefetch_to_write(row + HS - 1);
}

}  // namespace
}  // namespace dn::cpu
