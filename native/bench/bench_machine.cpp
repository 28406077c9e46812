// What the machine can do, which every share in the other benchmarks refers to: multiply-adds from registers
// in fp32 and int8, reading memory, and starting a parallel region, on one thread and on all. One line of
// JSON per figure on standard output. Usage: bench_machine [seconds per figure = 0.2]

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include "bench/op_timer.h"
#include "cpu/isa.h"
#include "cpu/thread_pool.h"

namespace {

using namespace dn;
using namespace dn::cpu;
using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

void report(const char* name, int threads, double value, const char* unit) {
  std::printf("{\"name\": \"%s\", \"threads\": %d, \"value\": %.6g, \"unit\": \"%s\"}\n", name, threads,
              value, unit);
  std::fflush(stdout);
}

// Work per second of the best of repeated calls: other work on the machine only ever adds time. call returns
// the work that one thread did; all threads do the same.
double best_rate(double budget, int threads, double (*call)()) {
  double best = 0;
  const auto start = Clock::now();
  do {
    std::vector<double> work(static_cast<size_t>(threads));
    const auto begin = Clock::now();
    parallel(threads, threads, [&](int64_t task, int) { work[static_cast<size_t>(task)] = call(); });
    const double seconds = seconds_since(begin);
    double sum = 0;
    for (const double w : work) sum += w;
    best = std::max(best, sum / seconds);
  } while (seconds_since(start) < budget);
  return best;
}

#if defined(__x86_64__)
constexpr int64_t kPeakLoops = 100000;

double fma_avx512() { return bench::fma_loop_avx512(kPeakLoops); }
double fma_avx2() { return bench::fma_loop_avx2(kPeakLoops); }

// Twelve independent sums, more than latency times ports. In assembly: the compiler would copy them.
__attribute__((target("avx512f,avx512vnni"))) double dot_products_vnni() {
  const __m512i a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(-1);
  __m512i s0{}, s1{}, s2{}, s3{}, s4{}, s5{}, s6{}, s7{}, s8{}, s9{}, s10{}, s11{};
  for (int64_t i = 0; i < kPeakLoops; ++i) {
    asm volatile(
        "vpdpbusd %12, %13, %0\n\t"
        "vpdpbusd %12, %13, %1\n\t"
        "vpdpbusd %12, %13, %2\n\t"
        "vpdpbusd %12, %13, %3\n\t"
        "vpdpbusd %12, %13, %4\n\t"
        "vpdpbusd %12, %13, %5\n\t"
        "vpdpbusd %12, %13, %6\n\t"
        "vpdpbusd %12, %13, %7\n\t"
        "vpdpbusd %12, %13, %8\n\t"
        "vpdpbusd %12, %13, %9\n\t"
        "vpdpbusd %12, %13, %10\n\t"
        "vpdpbusd %12, %13, %11\n\t"
        : "+v"(s0), "+v"(s1), "+v"(s2), "+v"(s3), "+v"(s4), "+v"(s5), "+v"(s6), "+v"(s7), "+v"(s8), "+v"(s9),
          "+v"(s10), "+v"(s11)
        : "v"(a), "v"(b));
  }
  return 2.0 * 64 * 12 * static_cast<double>(kPeakLoops);
}
#endif

// Each thread reads a part of its own: more than any cache a core can count on.
double read_bandwidth(double budget, int threads) {
  constexpr size_t kWords = (size_t{256} << 20) / sizeof(uint64_t);
  std::vector<std::unique_ptr<uint64_t[]>> parts(static_cast<size_t>(threads));
  parallel(threads, threads, [&](int64_t task, int) {
    auto& part = parts[static_cast<size_t>(task)];
    part.reset(new uint64_t[kWords]);
    for (size_t i = 0; i < kWords; ++i) part[i] = i;
  });
  double best = 0;
  const auto start = Clock::now();
  do {
    std::vector<uint64_t> sums(static_cast<size_t>(threads));
    const auto begin = Clock::now();
    parallel(threads, threads, [&](int64_t task, int) {
      const uint64_t* const part = parts[static_cast<size_t>(task)].get();
      uint64_t sum[8] = {};
      for (size_t i = 0; i < kWords; i += 8)
        for (size_t k = 0; k < 8; ++k) sum[k] ^= part[i + k];
      for (const uint64_t s : sum) sums[static_cast<size_t>(task)] ^= s;
    });
    const double seconds = seconds_since(begin);
    volatile uint64_t sink = sums[0];
    (void)sink;
    best = std::max(best, static_cast<double>(kWords * sizeof(uint64_t)) * threads / seconds);
  } while (seconds_since(start) < budget);
  return best;
}

double median(std::vector<double>& values) {
  std::nth_element(values.begin(), values.begin() + static_cast<long>(values.size() / 2), values.end());
  return values[values.size() / 2];
}

// Seconds from the call to the return of a region in which every thread waits until all have begun: what
// starting it costs. Empty tasks would not show it, since the caller can do them all before a worker is
// awake. pause: seconds between regions, in which idle threads may fall asleep.
double region(int threads, int count, double pause) {
  std::vector<double> times;
  for (int i = 0; i < count; ++i) {
    if (pause > 0) std::this_thread::sleep_for(std::chrono::duration<double>(pause));
    std::atomic<int> begun{0};
    const auto begin = Clock::now();
    parallel(threads, threads, [&](int64_t, int) {
      begun.fetch_add(1);
      while (begun.load() < threads) {
      }
    });
    times.push_back(seconds_since(begin));
  }
  return median(times);
}

}  // namespace

int main(int argc, char** argv) {
  const double budget = argc > 1 ? std::atof(argv[1]) : 0.2;
  const Isa isa = active_isa();
  std::vector<int> counts = {1};
  if (available_threads() > 1) counts.push_back(available_threads());
  for (const int threads : counts) {
#if defined(__x86_64__)
    if (isa >= Isa::kAvx2) {
      const double rate = best_rate(budget, threads, isa >= Isa::kAvx512 ? fma_avx512 : fma_avx2);
      report("fp32 peak", threads, rate * 1e-9, "GFLOP/s");
    }
    if (isa >= Isa::kAvx512 && __builtin_cpu_supports("avx512vnni")) {
      report("int8 peak", threads, best_rate(budget, threads, dot_products_vnni) * 1e-9, "GOP/s");
    }
#endif
    report("memory read", threads, read_bandwidth(budget, threads) * 1e-9, "GB/s");
    if (threads == 1) continue;
    report("parallel region, back to back", threads, region(threads, 2000, 0) * 1e6, "us");
    report("parallel region, after 2 ms of rest", threads, region(threads, 100, 2e-3) * 1e6, "us");
  }
  return 0;
}
