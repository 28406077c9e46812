// int8 products at the shapes of GPT-2 124M by every kernel of this machine, as a share of the peak of that
// kernel's instruction, measured from registers before and after every call. The quantisation of the inputs
// is included, a bias is added (not by the head), fp32 is written. Usage: bench_int8 [filter] [seconds per
// case = 0.15] [threads = 1]; the filter picks lines whose name contains it. Figures are medians of calls
// that no other process interrupted; one thread is timed by its processor time.

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

#include "bench/bench_clock.h"
#include "cpu/gemm_int8.h"
#include "cpu/isa.h"
#include "cpu/thread_pool.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

using namespace dn;
using namespace dn::cpu;
using namespace dn::bench;

constexpr int64_t kPeakLoops = 20000;
// Independent sums: more than latency times ports, few enough for the registers.
constexpr int kChains = 24;
constexpr int kChainsAvx2 = 12;

#if defined(__x86_64__)
__attribute__((target("avx512f"))) void int8_loop_avx512() {
  __m512i sum[kChains];
#pragma GCC unroll 24
  for (int c = 0; c < kChains; ++c) sum[c] = _mm512_setzero_si512();
  const __m512i a = _mm512_set1_epi32(0x01010101), b = a;
  for (int64_t i = 0; i < kPeakLoops; ++i) {
#pragma GCC unroll 24
    for (int c = 0; c < kChains; ++c) asm volatile("vpdpbusd %2, %1, %0" : "+v"(sum[c]) : "v"(a), "v"(b));
  }
#pragma GCC unroll 24
  for (int c = 0; c < kChains; ++c) asm volatile("" : "+v"(sum[c]));
}

__attribute__((target("avx2"))) void int8_loop_avx_vnni() {
  __m256i sum[kChainsAvx2];
#pragma GCC unroll 12
  for (int c = 0; c < kChainsAvx2; ++c) sum[c] = _mm256_setzero_si256();
  const __m256i a = _mm256_set1_epi32(0x01010101), b = a;
  for (int64_t i = 0; i < kPeakLoops; ++i) {
#pragma GCC unroll 12
    for (int c = 0; c < kChainsAvx2; ++c)
      asm volatile("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum[c]) : "x"(a), "x"(b));
  }
#pragma GCC unroll 12
  for (int c = 0; c < kChainsAvx2; ++c) asm volatile("" : "+x"(sum[c]));
}

// What plain AVX2 has that is exact: pairs of int16 and an addition.
__attribute__((target("avx2"))) void int8_loop_avx2() {
  __m256i sum[kChainsAvx2];
#pragma GCC unroll 12
  for (int c = 0; c < kChainsAvx2; ++c) sum[c] = _mm256_setzero_si256();
  __m256i a = _mm256_set1_epi32(0x00010001), b = a;
  for (int64_t i = 0; i < kPeakLoops; ++i) {
#pragma GCC unroll 12
    for (int c = 0; c < kChainsAvx2; ++c) {
      sum[c] = _mm256_add_epi32(sum[c], _mm256_madd_epi16(a, b));
      asm volatile("" : "+x"(a), "+x"(b));
    }
  }
#pragma GCC unroll 12
  for (int c = 0; c < kChainsAvx2; ++c) asm volatile("" : "+x"(sum[c]));
}

// Four sums of tiles; tiles loaded once.
__attribute__((target("amx-tile,amx-int8"))) void int8_loop_amx() {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } config;
  alignas(64) static const uint8_t zeros[1024] = {};
  asm volatile("" : : "r"(&config) : "memory");
  _tile_loadconfig(&config);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_loadd(4, zeros, 64);
  _tile_loadd(5, zeros, 64);
  _tile_loadd(6, zeros, 64);
  _tile_loadd(7, zeros, 64);
  for (int64_t i = 0; i < kPeakLoops / 8; ++i) {
    _tile_dpbusd(0, 4, 6);
    _tile_dpbusd(1, 4, 7);
    _tile_dpbusd(2, 5, 6);
    _tile_dpbusd(3, 5, 7);
  }
  _tile_release();
}
#endif

// int8 multiply-adds of the kernels' instruction from registers once, in GOP/s; 0 where there is no such
// loop.
double int8_peak(int threads, const Int8Kernels& kernels) {
#if defined(__x86_64__)
  void (*loop)() = nullptr;
  double macs = 0;  // of a call
  if (&kernels == &kInt8Avx512) {
    loop = int8_loop_avx512;
    macs = 64.0 * kChains * kPeakLoops;
  } else if (&kernels == &kInt8AvxVnni) {
    loop = int8_loop_avx_vnni;
    macs = 32.0 * kChainsAvx2 * kPeakLoops;
  } else if (&kernels == &kInt8Avx2) {
    loop = int8_loop_avx2;
    macs = 16.0 * kChainsAvx2 * kPeakLoops;
  } else if (&kernels == &kInt8Amx) {
    loop = int8_loop_amx;
    macs = 4 * 16.0 * 16 * 64 * (kPeakLoops / 8);
  }
  if (loop == nullptr) return 0;
  const double start = seconds_now(threads);
  parallel(threads, threads, [&](int64_t, int) { loop(); });
  return 2.0 * macs * threads / (seconds_now(threads) - start) * 1e-9;
#else
  (void)threads, (void)kernels;
  return 0;
#endif
}

void run_case(const char* filter, double budget, int threads, const Int8Kernels& kernels, int64_t M,
              int64_t K, int64_t N) {
  const std::string name = std::string(kernels.name) + " t" + std::to_string(threads) +
                           " M=" + std::to_string(M) + " " + std::to_string(K) + "x" + std::to_string(N);
  if (name.find(filter) == std::string::npos) return;
  const auto numbers = [](int64_t n) {
    std::vector<float> v(static_cast<size_t>(n));
    uint32_t state = 12345;
    for (float& x : v)
      x = static_cast<float>((state = state * 1664525u + 1013904223u) >> 8) * 0x1p-24f - 0.5f;
    return v;
  };
  const Cpu cpu{threads, active_isa()};
  const bool is_head = N > 4096;
  const std::vector<float> inp = numbers(M * K), bias = numbers(N), w = numbers(K * N);
  std::vector<float> out(static_cast<size_t>(M * N)), scales(static_cast<size_t>(N));
  std::vector<int8_t> quantised(w.size());
  const Int8Matrix plain = {quantised.data(), scales.data(),
                            is_head ? WeightOrder::kOutIn : WeightOrder::kInOut, K, N};
  quantise(plain, w.data());
  std::vector<char> memory(static_cast<size_t>(int8_bytes(K, N)) + 64);
  void* const packed = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
  pack_int8(cpu, packed, plain, 0);
  GemmProduct p;
  p.c = out.data();
  p.c_stride = N;
  p.a = inp.data();
  p.a_stride = K;
  p.M = M;
  p.N = N;
  p.K = K;
  p.bias = is_head ? nullptr : bias.data();
  const double operations = 2.0 * static_cast<double>(M) * static_cast<double>(K) * static_cast<double>(N);

  gemm_int8(cpu, p, packed, kernels);
  std::vector<double> seconds, shares, peaks;
  size_t disturbed = 0;
  for (double spent = 0; spent < budget || seconds.size() < 5;) {
    gemm_int8(cpu, p, packed, kernels);  // warms the caches, if somebody else had the core
    const int64_t seen = interruptions();
    const double before = int8_peak(threads, kernels), start = seconds_now(threads);
    gemm_int8(cpu, p, packed, kernels);
    const double passed = seconds_now(threads) - start, after = int8_peak(threads, kernels);
    spent += passed;
    if (interruptions() != seen && ++disturbed < 30) continue;
    seconds.push_back(passed);
    peaks.push_back((before + after) / 2);
    if (before + after > 0) shares.push_back(operations / passed * 2e-9 / (before + after));
  }
  const double typical = median(seconds);
  std::printf("%-38s %9.3f ms %8.1f GOP/s %6.1f %% of %7.1f %7.1f GB/s of weights, %zu calls\n", name.c_str(),
              typical * 1e3, operations / typical * 1e-9, 100 * median(shares), median(peaks),
              static_cast<double>(K * N) / typical * 1e-9, seconds.size());
  std::fflush(stdout);
}

}  // namespace

int main(int argc, char** argv) {
  const char* const filter = argc > 1 ? argv[1] : "";
  const double budget = argc > 2 ? std::atof(argv[2]) : 0.15;
  const int threads = argc > 3 ? std::max(1, std::atoi(argv[3])) : 1;
  for (const Int8Kernels* kernels : all_int8_kernels()) {
    for (const int64_t M : {int64_t{1}, int64_t{4}, int64_t{8}, int64_t{16}, int64_t{256}, int64_t{1024}}) {
      const int64_t shapes[][2] = {{768, 2304}, {768, 768}, {768, 3072}, {3072, 768}, {768, 50257}};
      for (const auto& s : shapes) {
        if (M * s[1] > 256 * 50257) continue;
        run_case(filter, budget, threads, *kernels, M, s[0], s[1]);
      }
    }
  }
  return 0;
}
