// What the machine can do, which every share in the other benchmarks refers to: multiply-adds from registers
// in fp32 and int8, reading and copying memory, and starting a parallel region, on one thread and on all. One
// line of JSON per figure on standard output. Usage: bench_machine [seconds per figure = 0.2]

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

#include "bench/fma_loops.h"
#include "core/pages.h"
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

// Work per second of the best of repeated calls: other work on the machine only ever adds time. call does the
// work of one thread, whose number it is given, and returns how much that was.
double best_rate(double budget, int threads, const std::function<double(int64_t)>& call) {
  double best = 0;
  const auto start = Clock::now();
  do {
    std::vector<double> work(static_cast<size_t>(threads));
    const auto begin = Clock::now();
    parallel(threads, threads, [&](int64_t task, int) { work[static_cast<size_t>(task)] = call(task); });
    const double seconds = seconds_since(begin);
    double sum = 0;
    for (const double w : work) sum += w;
    best = std::max(best, sum / seconds);
  } while (seconds_since(start) < budget);
  return best;
}

#if defined(__x86_64__)
constexpr int64_t kPeakLoops = 100000;

double fma_avx512(int64_t) { return bench::fma_loop_avx512(kPeakLoops); }
double fma_avx2(int64_t) { return bench::fma_loop_avx2(kPeakLoops); }

// Twelve independent sums, more than latency times ports. In assembly: the compiler would copy them.
__attribute__((target("avx512f,avx512vnni"))) double dot_products_vnni(int64_t) {
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

// A thread's memory, taken as the backend takes its own: more than any cache a core can count on. It is
// passed over in several streams, as the ops do, since one alone does not keep the memory busy.
constexpr size_t kStreams = 4;
constexpr size_t kStreamWords = (size_t{64} << 20) / sizeof(uint64_t);
constexpr size_t kLineWords = 8;

// Bytes read.
double read_streams(uint64_t* part) {
  uint64_t sum[kLineWords] = {};
  for (size_t i = 0; i < kStreamWords; i += kLineWords) {
    for (size_t s = 0; s < kStreams; ++s) {
      const uint64_t* const line = part + s * kStreamWords + i;
      __builtin_prefetch(line + 16 * kLineWords);
      for (size_t k = 0; k < kLineWords; ++k) sum[k] ^= line[k];
    }
  }
  for (const uint64_t s : sum) part[0] ^= s;
  return static_cast<double>(kStreams * kStreamWords * sizeof(uint64_t));
}

// Bytes read and written: half of the streams to the others. The stores pass the caches where the machine has
// such, as those of results do that are not read again soon.
double copy_streams(uint64_t* part) {
  for (size_t i = 0; i < kStreamWords; i += kLineWords) {
    for (size_t s = 0; s < kStreams / 2; ++s) {
      const uint64_t* const from = part + s * kStreamWords + i;
      uint64_t* const to = part + (s + kStreams / 2) * kStreamWords + i;
#if defined(__x86_64__)
      for (size_t k = 0; k < kLineWords; k += 2) {
        _mm_stream_si128(reinterpret_cast<__m128i*>(to + k),
                         _mm_load_si128(reinterpret_cast<const __m128i*>(from + k)));
      }
#else
      std::copy(from, from + kLineWords, to);
#endif
    }
  }
#if defined(__x86_64__)
  _mm_sfence();
#endif
  return static_cast<double>(kStreams * kStreamWords * sizeof(uint64_t));
}

// One part for each thread, first written by the thread that uses it.
class Parts {
 public:
  explicit Parts(int threads) : pages_(static_cast<size_t>(threads)) {
    constexpr size_t kWords = kStreams * kStreamWords;
    parallel(threads, threads, [&](int64_t task, int) {
      pages_[static_cast<size_t>(task)] = std::make_unique<Pages>(kWords * sizeof(uint64_t));
      uint64_t* const part = (*this)[task];
      for (size_t i = 0; i < kWords; ++i) part[i] = i;
    });
  }
  uint64_t* operator[](int64_t task) const {
    return static_cast<uint64_t*>(pages_[static_cast<size_t>(task)]->data());
  }

 private:
  std::vector<std::unique_ptr<Pages>> pages_;
};

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
    const Parts parts(threads);
    const auto memory = [&](const char* name, double (*pass)(uint64_t*)) {
      const double rate = best_rate(budget, threads, [&](int64_t task) { return pass(parts[task]); });
      report(name, threads, rate * 1e-9, "GB/s");
    };
    memory("memory read", read_streams);
    memory("memory copy", copy_streams);
    if (threads == 1) continue;
    report("parallel region, back to back", threads, region(threads, 2000, 0) * 1e6, "us");
    report("parallel region, after 2 ms of rest", threads, region(threads, 100, 2e-3) * 1e6, "us");
  }
  return 0;
}
