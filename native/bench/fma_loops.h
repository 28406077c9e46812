// fp32 multiply-adds from registers: the peak that the benchmarks' shares refer to.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace dn::bench {

#if defined(__x86_64__)
// Floating point operations done. Independent sums: more than latency times ports, few enough for the
// registers.
__attribute__((target("avx512f"))) inline double fma_loop_avx512(int64_t loops) {
  constexpr int kChains = 24;
  __m512 sum[kChains];
  for (auto& s : sum) s = _mm512_setzero_ps();
  __m512 a = _mm512_set1_ps(1e-3f), b = _mm512_set1_ps(0.5f);
  for (int64_t i = 0; i < loops; ++i) {
#pragma GCC unroll 24
    for (int c = 0; c < kChains; ++c) sum[c] = _mm512_fmadd_ps(a, b, sum[c]);
    asm volatile("" : "+v"(a), "+v"(b));
  }
  for (int c = 1; c < kChains; ++c) sum[0] = _mm512_add_ps(sum[0], sum[c]);
  asm volatile("" : "+v"(sum[0]));
  return 2.0 * 16 * kChains * static_cast<double>(loops);
}

__attribute__((target("avx2,fma"))) inline double fma_loop_avx2(int64_t loops) {
  constexpr int kChains = 12;
  __m256 sum[kChains];
  for (auto& s : sum) s = _mm256_setzero_ps();
  __m256 a = _mm256_set1_ps(1e-3f), b = _mm256_set1_ps(0.5f);
  for (int64_t i = 0; i < loops; ++i) {
#pragma GCC unroll 12
    for (int c = 0; c < kChains; ++c) sum[c] = _mm256_fmadd_ps(a, b, sum[c]);
    asm volatile("" : "+x"(a), "+x"(b));
  }
  for (int c = 1; c < kChains; ++c) sum[0] = _mm256_add_ps(sum[0], sum[c]);
  asm volatile("" : "+x"(sum[0]));
  return 2.0 * 8 * kChains * static_cast<double>(loops);
}
#endif

}  // namespace dn::bench
