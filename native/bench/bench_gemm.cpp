// Matrix products at the shapes of GPT-2 124M and of a small model, as a share of the fp32 peak that is
// measured before and after every call: forward with packed weights, and both backward products from plain
// weights, fp32 and bf16, one thread and all. Usage: bench_gemm [filter] [seconds per case = 0.15]; the
// filter picks lines whose name contains it. Figures are medians; one thread is timed by its processor time,
// which says the same on a machine with other work.

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <iterator>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "bench/bench_clock.h"
#include "bench/fma_loops.h"
#include "core/pages.h"
#include "cpu/gemm.h"
#include "cpu/isa.h"
#include "cpu/ops.h"
#include "cpu/thread_pool.h"

namespace {

using namespace dn;
using namespace dn::cpu;
using namespace dn::bench;
constexpr int64_t kPeakLoops = 20000;

// fp32 multiply-adds from registers once, in GFLOP/s; 0 where the instruction set has no such loop.
double fma_peak(const Cpu& cpu) {
#if defined(__x86_64__)
  if (cpu.isa == Isa::kPortable) return 0;
  const bool wide = cpu.isa >= Isa::kAvx512;
  std::vector<double> flop(static_cast<size_t>(cpu.threads));
  const double start = seconds_now(cpu.threads);
  parallel(cpu.threads, cpu.threads, [&](int64_t task, int) {
    flop[static_cast<size_t>(task)] = wide ? fma_loop_avx512(kPeakLoops) : fma_loop_avx2(kPeakLoops);
  });
  const double seconds = seconds_now(cpu.threads) - start;
  return std::accumulate(flop.begin(), flop.end(), 0.0) / seconds * 1e-9;
#else
  (void)cpu;
  return 0;
#endif
}

// Operands in memory as the backend takes it.
class Floats {
 public:
  explicit Floats(int64_t n)
      : pages_(std::make_unique<Pages>(static_cast<size_t>(n) * sizeof(float))), size_(n) {}
  float* data() { return static_cast<float*>(pages_->data()); }
  const float* data() const { return static_cast<const float*>(pages_->data()); }
  float* begin() { return data(); }
  float* end() { return data() + size_; }

 private:
  std::unique_ptr<Pages> pages_;
  int64_t size_;
};

Weight weight(const Floats& v, int64_t K, int64_t N, WeightOrder order, bool packed) {
  Weight w;
  w.data = v.data();
  w.K = K;
  w.N = N;
  w.order = order;
  w.packed = packed;
  return w;
}

Floats numbers(int64_t n) {
  Floats v(n);
  uint32_t state = 12345;
  for (float& x : v) x = static_cast<float>((state = state * 1664525u + 1013904223u) >> 8) * 0x1p-24f - 0.5f;
  return v;
}

struct Options {
  const char* filter;
  double seconds;
};

void report(const Options& options, const Cpu& cpu, const std::string& name, double flop, double bytes,
            const std::function<void()>& call) {
  if (name.find(options.filter) == std::string::npos) return;
  call();
  // Calls that another process interrupted, which leaves the caches cold, count only when all were.
  std::vector<double> seconds, shares, disturbed_seconds, disturbed_shares;
  double before = fma_peak(cpu), spent = 0;
  for (int64_t seen = interruptions();
       spent < options.seconds || seconds.size() + disturbed_seconds.size() < 5;) {
    const double start = seconds_now(cpu.threads);
    call();
    const double passed = seconds_now(cpu.threads) - start, after = fma_peak(cpu);
    const int64_t now = interruptions();
    (now == seen ? seconds : disturbed_seconds).push_back(passed);
    if (before + after > 0)
      (now == seen ? shares : disturbed_shares).push_back(flop / passed * 2e-9 / (before + after));
    before = after;
    spent += passed;
    if (now != seen) {
      call();
      before = fma_peak(cpu);
      seen = interruptions();
    }
  }
  const size_t clean = seconds.size();
  if (clean < 3) {
    seconds.insert(seconds.end(), disturbed_seconds.begin(), disturbed_seconds.end());
    shares.insert(shares.end(), disturbed_shares.begin(), disturbed_shares.end());
  }
  const double typical = median(seconds);
  std::printf("%-44s %9.3f ms %8.1f GFLOP/s %6.1f %% of peak %7.1f GB/s of weights, %zu calls\n",
              name.c_str(), typical * 1e3, flop / typical * 1e-9, shares.empty() ? 0.0 : 100 * median(shares),
              bytes / typical * 1e-9, clean);
  std::fflush(stdout);
}

void bench_shape(const Options& options, const Cpu& cpu, int64_t M, int64_t K, int64_t N, bool training) {
  const std::string where = " t" + std::to_string(cpu.threads) + " M=" + std::to_string(M) + " " +
                            std::to_string(K) + "x" + std::to_string(N);
  const char* const kinds[] = {"forward packed fp32", "forward plain fp32", "dinp fp32",   "dweight fp32",
                               "forward plain bf16",  "dinp bf16",          "dweight bf16"};
  const auto wanted = [&](const char* kind) {
    return (kind + where).find(options.filter) != std::string::npos;
  };
  if (std::none_of(std::begin(kinds), std::end(kinds), wanted)) return;
  Floats inp = numbers(M * K), w = numbers(K * N), out(M * N), bias = numbers(N);
  Floats panels(packed_elements(K, N));
  const WeightOrder order = N > 4096 ? WeightOrder::kOutIn : WeightOrder::kInOut;  // the head is an embedding
  const Weight plain = weight(w, K, N, order, false), packed = weight(panels, K, N, order, true);
  pack_weight(cpu, panels.data(), plain);
  const auto tensor = [](Floats& v, int64_t rows, int64_t cols) {
    return Tensor(v.data(), Dtype::kF32, rows, cols);
  };
  const double flop = 2.0 * static_cast<double>(M) * static_cast<double>(K) * static_cast<double>(N);
  const double bytes = 4.0 * static_cast<double>(K) * static_cast<double>(N);
  const auto forward = [&](const Weight& weight_used, MatmulPrecision precision) {
    matmul_forward(cpu, tensor(out, M, N), tensor(inp, M, K), weight_used, tensor(bias, 1, N),
                   Epilogue::kNone, {}, precision);
  };
  report(options, cpu, "forward packed fp32" + where, flop, bytes,
         [&] { forward(packed, MatmulPrecision::kFP32); });
  if (!training) return;
  report(options, cpu, "forward plain fp32" + where, flop, bytes,
         [&] { forward(plain, MatmulPrecision::kFP32); });
  Floats dinp(M * K), dw(K * N);
  const auto backward = [&](bool to_input, MatmulPrecision precision) {
    matmul_backward(cpu, to_input ? tensor(dinp, M, K) : Tensor(),
                    to_input                       ? Tensor()
                    : order == WeightOrder::kInOut ? tensor(dw, K, N)
                                                   : tensor(dw, N, K),
                    {}, tensor(out, M, N), tensor(inp, M, K), plain, precision);
  };
  report(options, cpu, "dinp fp32" + where, flop, bytes, [&] { backward(true, MatmulPrecision::kFP32); });
  report(options, cpu, "dweight fp32" + where, flop, bytes, [&] { backward(false, MatmulPrecision::kFP32); });
  if (!bf16_kernels(cpu.isa)) return;
  report(options, cpu, "forward plain bf16" + where, flop, bytes,
         [&] { forward(plain, MatmulPrecision::kBF16); });
  report(options, cpu, "dinp bf16" + where, flop, bytes, [&] { backward(true, MatmulPrecision::kBF16); });
  report(options, cpu, "dweight bf16" + where, flop, bytes, [&] { backward(false, MatmulPrecision::kBF16); });
}

}  // namespace

int main(int argc, char** argv) {
  const Options options{argc > 1 ? argv[1] : "", argc > 2 ? std::atof(argv[2]) : 0.15};
  std::vector<int> counts = {1};
  if (available_threads() > 1) counts.push_back(available_threads());
  for (const int threads : counts) {
    const Cpu cpu{threads, active_isa()};
    std::vector<double> peaks;
    for (int i = 0; i < 25; ++i) peaks.push_back(fma_peak(cpu));
    std::printf("%s, %d thread%s: %.1f GFLOP/s fp32 from registers\n", isa_name(cpu.isa), threads,
                threads > 1 ? "s" : "", median(peaks));
    for (const int64_t M : {int64_t{1}, int64_t{4}, int64_t{8}, int64_t{16}, int64_t{64}, int64_t{256}})
      bench_shape(options, cpu, M, 768, 50257, false);
    for (const int64_t M : {int64_t{64}, int64_t{256}, int64_t{1024}}) {
      const int64_t shapes[][2] = {{768, 2304}, {768, 768},  {768, 3072},
                                   {3072, 768}, {256, 1024}, {256, 8192}};
      for (const auto& s : shapes) bench_shape(options, cpu, M, s[0], s[1], true);
    }
    report(options, cpu, "parallel region t" + std::to_string(threads), 0, 0,
           [&] { parallel(threads, 64, [](int64_t, int) {}); });
  }
  return 0;
}
