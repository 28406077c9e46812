// Three steps of a reduction in pairs (gemm_kernels.h) for a tile in registers, as products and the scores of
// attention have them. A tile is up to 12 rows of two vectors: 24 sums, the six vectors of three steps of B
// and two of what is added fill the 32 registers. Numbers of A are broadcast by the additions themselves: a
// broadcast into a register would cost them time. Included after immintrin.h; everything has internal
// linkage.
#include <stdint.h>

namespace dn::cpu {
namespace {

// Steps: a pair that is added, a single one, a pair that is subtracted, a single one.
constexpr int64_t kPairGroup = 6;

__attribute__((always_inline)) inline __m512 subtract(__m512 from, const float* a) {
  __m512 difference;
  asm("vsubps %2%{1to16%}, %1, %0" : "=v"(difference) : "v"(from), "m"(*a));
  return difference;
}

// sum += (a1 + b2) (a2 + b1), or -= (a1 - b2) (a2 - b1). One piece: the compiler would move additions away
// from what they are for and run out of registers.
template <bool kSubtract>
__attribute__((always_inline)) inline void multiply_pair(__m512& sum, __m512 b1, __m512 b2, const float* a1,
                                                         const float* a2) {
  __m512 left, right;
  if (kSubtract) {
    asm("vsubps %5%{1to16%}, %4, %1\n\tvsubps %6%{1to16%}, %3, %2\n\tvfnmadd231ps %1, %2, %0"
        : "+v"(sum), "=&v"(left), "=&v"(right)
        : "v"(b1), "v"(b2), "m"(*a1), "m"(*a2));
  } else {
    asm("vaddps %5%{1to16%}, %4, %1\n\tvaddps %6%{1to16%}, %3, %2\n\tvfmadd231ps %1, %2, %0"
        : "+v"(sum), "=&v"(left), "=&v"(right)
        : "v"(b1), "v"(b2), "m"(*a1), "m"(*a2));
  }
}
__attribute__((always_inline)) inline void multiply_add(__m512& sum, __m512 b, const float* a) {
  asm("vfmadd231ps %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(b), "m"(*a));
}

// Three steps: a pair and a single one. Row r of A has its numbers at a[r], a[kStride + r] and a[2 kStride +
// r].
template <int kRows, int V, int kStride, bool kSubtract>
__attribute__((always_inline)) inline void multiply_steps(__m512 (*sum)[V], const __m512* b1,
                                                          const __m512* b2, const __m512* b3,
                                                          const float* a) {
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      multiply_pair<kSubtract>(sum[r][v], b1[v], b2[v], a + r, a + kStride + r);
      multiply_add(sum[r][v], b3[v], a + 2 * kStride + r);
    }
  }
}

}  // namespace
}  // namespace dn::cpu
