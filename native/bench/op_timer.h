// What the benchmarks of whole steps share: a backend that measures every op it passes on (processor time of
// the whole process, wall time, floating point operations, least memory traffic), the fp32 peak that shares
// refer to, and batches of random tokens.
#pragma once

#include <time.h>

#include <algorithm>
#include <cstdio>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "bench/fma_loops.h"
#include "core/model.h"

namespace dn::bench {

inline double clock_seconds(clockid_t clock) {
  timespec t;
  clock_gettime(clock, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}
inline double cpu_seconds() { return clock_seconds(CLOCK_PROCESS_CPUTIME_ID); }
inline double wall_seconds() { return clock_seconds(CLOCK_MONOTONIC); }

// fp32 multiply-adds from registers on one core, GFLOP per second of its time; 0 without vectors. Short, so
// that it can be taken between the calls it is compared with.
inline double fma_peak(const std::string& backend) {
#if defined(__x86_64__)
  if (backend == "cpu/portable") return 0;
  const bool wide = backend != "cpu/avx2";
  double best = 0;
  for (int i = 0; i < 3; ++i) {
    const double begin = clock_seconds(CLOCK_THREAD_CPUTIME_ID);
    const double flop = wide ? fma_loop_avx512(200000) : fma_loop_avx2(200000);
    best = std::max(best, flop / (clock_seconds(CLOCK_THREAD_CPUTIME_ID) - begin) * 1e-9);
  }
  return best;
#else
  (void)backend;
  return 0;
#endif
}

struct OpCost {
  std::string name;
  int64_t calls = 0;
  double cpu = 0, wall = 0;  // seconds
  double flop = 0, bytes = 0;
};

// Passes every op on and adds up what it cost. FLOP are those of the formula; bytes are of every operand
// once.
class OpTimer : public Backend {
 public:
  explicit OpTimer(std::unique_ptr<Backend> inner) : inner_(std::move(inner)) {}

  void reset() { costs_.clear(); }
  const std::vector<OpCost>& costs() const { return costs_; }

  // One line an op, the most expensive first; bench/cases/operations.ts reads it. seconds: processor time of
  // the whole step, repeats: steps measured.
  void print(double seconds, int repeats, double peak) const {
    std::vector<OpCost> sorted = costs_;
    std::sort(sorted.begin(), sorted.end(), [](const OpCost& a, const OpCost& b) { return a.cpu > b.cpu; });
    std::printf("  %-24s %6s %9s %6s %9s %9s %9s %8s %7s %7s\n", "op", "calls", "cpu ms", "share", "wall ms",
                "GFLOP", "MB", "GFLOP/s", "of peak", "GB/s");
    OpCost sum;
    const auto line = [&](const OpCost& c) {
      std::printf("  %-24s %6lld %9.2f %5.1f%% %9.2f %9.2f %9.2f %8.1f %6.1f%% %7.1f\n", c.name.c_str(),
                  static_cast<long long>(c.calls / repeats), c.cpu / repeats * 1e3, c.cpu / seconds * 100,
                  c.wall / repeats * 1e3, c.flop / repeats * 1e-9, c.bytes / repeats * 1e-6,
                  c.flop / c.cpu * 1e-9, peak > 0 ? c.flop / c.cpu * 1e-7 / peak : 0.0,
                  c.bytes / c.cpu * 1e-9);
    };
    for (const OpCost& c : sorted) {
      line(c);
      sum.cpu += c.cpu;
      sum.flop += c.flop;
    }
    std::printf("  %-24s %6s %9.2f %5.1f%%\n", "outside ops", "", (seconds - sum.cpu) / repeats * 1e3,
                (1 - sum.cpu / seconds) * 100);
    std::printf("  %-24s %6s %9.2f %6s %9s %9.2f %9s %8.1f %6.1f%%\n", "all", "", seconds / repeats * 1e3, "",
                "", sum.flop / repeats * 1e-9, "", sum.flop / seconds * 1e-9,
                peak > 0 ? sum.flop / seconds * 1e-7 / peak : 0.0);
  }

  std::string name() const override { return inner_->name(); }
  Dtype activation_dtype() const override { return inner_->activation_dtype(); }
  bool host_memory() const override { return inner_->host_memory(); }
  std::unique_ptr<Buffer> alloc(size_t bytes) override { return inner_->alloc(bytes); }
  void upload(void* dst, const void* host, size_t bytes) override { inner_->upload(dst, host, bytes); }
  void download(void* host, const void* src, size_t bytes) override { inner_->download(host, src, bytes); }
  void zero(void* dst, size_t bytes) override {
    measure("zero", 0, static_cast<double>(bytes), [&] { inner_->zero(dst, bytes); });
  }
  void copy(Tensor dst, Tensor src) override {
    measure("copy", 0, 2 * size(src), [&] { inner_->copy(dst, src); });
  }
  void synchronize() override { inner_->synchronize(); }
  int64_t packed_elements(int64_t K, int64_t N, Dtype to) const override {
    return inner_->packed_elements(K, N, to);
  }
  void pack_weight(void* packed, const Weight& plain, Dtype to) override {
    inner_->pack_weight(packed, plain, to);
  }
  void pack_rows(void* packed, const Weight& whole, const float* rows, int64_t begin, int64_t count,
                 Dtype to) override {
    inner_->pack_rows(packed, whole, rows, begin, count, to);
  }
  void unpack_weight(void* plain, const Weight& packed) override { inner_->unpack_weight(plain, packed); }
  size_t int8_bytes(int64_t K, int64_t N) const override { return inner_->int8_bytes(K, N); }
  void pack_int8(void* packed, const Int8Matrix& plain, int64_t n_begin) override {
    inner_->pack_int8(packed, plain, n_begin);
  }
  void unpack_int8(const Int8Matrix& plain, const void* packed) override {
    inner_->unpack_int8(plain, packed);
  }
  void embedding_forward(Tensor out, const int32_t* ids, const int32_t* positions, const Weight& wte,
                         Tensor wpe) override {
    measure("embedding_forward", 0, 3 * size(out),
            [&] { inner_->embedding_forward(out, ids, positions, wte, wpe); });
  }
  void embedding_backward(Tensor dwte, Tensor dwpe, Tensor dout, const int32_t* ids,
                          const int32_t* positions) override {
    measure("embedding_backward", 0, 5 * size(dout),
            [&] { inner_->embedding_backward(dwte, dwpe, dout, ids, positions); });
  }
  void layernorm_forward(Tensor out, Tensor mean, Tensor rstd, Tensor inp, Tensor weight,
                         Tensor bias) override {
    measure("layernorm_forward", 0, 2 * size(inp),
            [&] { inner_->layernorm_forward(out, mean, rstd, inp, weight, bias); });
  }
  void layernorm_backward(Tensor dinp, Tensor dweight, Tensor dbias, Tensor dout, Tensor inp, Tensor weight,
                          Tensor mean, Tensor rstd) override {
    measure("layernorm_backward", 0, 4 * size(inp),
            [&] { inner_->layernorm_backward(dinp, dweight, dbias, dout, inp, weight, mean, rstd); });
  }
  void matmul_forward(Tensor out, Tensor inp, const Weight& w, Tensor bias, Epilogue epilogue, Tensor extra,
                      MatmulPrecision precision) override {
    measure("matmul " + w.shape(), product(inp.rows, w), size(inp) + size(out) + size(extra) + size(w),
            [&] { inner_->matmul_forward(out, inp, w, bias, epilogue, extra, precision); });
  }
  void matmul_backward(Tensor dinp, Tensor dweight, Tensor dbias, Tensor dout, Tensor inp, const Weight& w,
                       MatmulPrecision precision, Store store) override {
    if (dinp) {
      measure("matmul dinp " + w.shape(), product(dout.rows, w), size(dinp) + size(dout) + size(w),
              [&] { inner_->matmul_backward(dinp, Tensor(), Tensor(), dout, inp, w, precision, store); });
    }
    if (dweight) {
      measure("matmul dweight " + w.shape(), product(dout.rows, w), size(dout) + size(inp) + 2 * size(w),
              [&] { inner_->matmul_backward(Tensor(), dweight, Tensor(), dout, inp, w, precision, store); });
    }
    if (dbias) {
      measure("matmul dbias", 0, size(dout),
              [&] { inner_->matmul_backward(Tensor(), Tensor(), dbias, dout, inp, w, precision, store); });
    }
  }
  void gelu_backward(Tensor dinp, Tensor dout, Tensor inp) override {
    measure("gelu_backward", 0, 3 * size(inp), [&] { inner_->gelu_backward(dinp, dout, inp); });
  }
  size_t kv_cache_bytes(int64_t capacity, int64_t C) const override {
    return inner_->kv_cache_bytes(capacity, C);
  }
  void kv_cache_write(void* cache, int64_t position, Tensor kv, int64_t NH) override {
    measure("kv_cache_write", 0, 2 * size(kv), [&] { inner_->kv_cache_write(cache, position, kv, NH); });
  }
  void attention_forward(Tensor out, Tensor lse, Tensor q, Tensor kv, const AttentionSequence* sequences,
                         int64_t S, const int32_t* query_positions, int64_t NH) override {
    measure("attention_forward", 4 * pairs(sequences, S) * static_cast<double>(q.cols),
            2 * size(q) + (has_cache(sequences, S) ? cached(sequences, S, q.cols) : size(kv)),
            [&] { inner_->attention_forward(out, lse, q, kv, sequences, S, query_positions, NH); });
  }
  void attention_backward(Tensor dqkv, Tensor dout, Tensor qkv, Tensor out, Tensor lse,
                          const AttentionSequence* sequences, int64_t S, const int32_t* query_positions,
                          int64_t NH) override {
    measure("attention_backward", 10 * pairs(sequences, S) * static_cast<double>(out.cols),
            2 * size(qkv) + 2 * size(out), [&] {
              inner_->attention_backward(dqkv, dout, qkv, out, lse, sequences, S, query_positions, NH);
            });
  }
  void head_logits(Tensor logits, Tensor hidden, const int64_t* rows, int64_t R, const Weight& wte) override {
    measure("head_logits", product(R, wte), size(logits) + size(wte),
            [&] { inner_->head_logits(logits, hidden, rows, R, wte); });
  }
  void head_denoise(DenoiseStats* stats, float* watched, Tensor hidden, const DenoiseRow* rows, int64_t R,
                    const int32_t* watch, int64_t watch_count, const Weight& wte) override {
    measure("head_denoise", product(R, wte), size(wte),
            [&] { inner_->head_denoise(stats, watched, hidden, rows, R, watch, watch_count, wte); });
  }
  void head_cross_entropy(float* losses, Tensor dhidden, Tensor dwte, Tensor hidden, const int64_t* rows,
                          const int32_t* targets, const float* weights, int64_t R, const Weight& wte,
                          MatmulPrecision precision, Store store) override {
    measure("head_cross_entropy", (dhidden ? 3 : 1) * product(R, wte), (dhidden ? 3 : 1) * size(wte), [&] {
      inner_->head_cross_entropy(losses, dhidden, dwte, hidden, rows, targets, weights, R, wte, precision,
                                 store);
    });
  }
  void adamw(void* params, const void* gradients, void* m, void* v, int64_t n,
             const AdamWStep& step) override {
    measure("adamw", 0, 28 * static_cast<double>(n),
            [&] { inner_->adamw(params, gradients, m, v, n, step); });
  }
  double sum_of_squares(const void* gradients, int64_t n) override {
    double sum = 0;
    measure("sum_of_squares", 0, 4 * static_cast<double>(n),
            [&] { sum = inner_->sum_of_squares(gradients, n); });
    return sum;
  }

 private:
  static double size(const Tensor& t) {
    return t ? 4 * static_cast<double>(t.rows) * static_cast<double>(t.cols) : 0;
  }
  static double size(const Weight& w) { return 4 * static_cast<double>(w.K) * static_cast<double>(w.N); }
  static double product(int64_t rows, const Weight& w) {
    return 2 * static_cast<double>(rows) * static_cast<double>(w.K) * static_cast<double>(w.N);
  }
  // Pairs of a query and a key, visible or not.
  // Keys and values that are read from caches; a call has them in all of its sequences or in none.
  static bool has_cache(const AttentionSequence* sequences, int64_t S) {
    return S > 0 && sequences[0].cache != nullptr;
  }
  double cached(const AttentionSequence* sequences, int64_t S, int64_t C) const {
    double keys = 0;
    for (int64_t s = 0; s < S; ++s) keys += static_cast<double>(sequences[s].k_len);
    return keys * static_cast<double>(2 * C) * static_cast<double>(dtype_bytes(inner_->activation_dtype()));
  }
  static double pairs(const AttentionSequence* sequences, int64_t S) {
    double sum = 0;
    for (int64_t s = 0; s < S; ++s)
      sum += static_cast<double>(sequences[s].q_end - sequences[s].q_begin) *
             static_cast<double>(sequences[s].k_len);
    return sum;
  }

  template <typename F>
  void measure(const std::string& name, double flop, double bytes, F&& call) {
    const double cpu = cpu_seconds(), wall = wall_seconds();
    call();
    const double cpu_spent = cpu_seconds() - cpu, wall_spent = wall_seconds() - wall;
    auto found = std::find_if(costs_.begin(), costs_.end(), [&](const OpCost& c) { return c.name == name; });
    if (found == costs_.end()) {
      costs_.push_back({name});
      found = costs_.end() - 1;
    }
    found->calls += 1;
    found->cpu += cpu_spent;
    found->wall += wall_spent;
    found->flop += flop;
    found->bytes += bytes;
  }

  std::unique_ptr<Backend> inner_;
  std::vector<OpCost> costs_;
};

// A model shape by name: "tiny" (6 x 256, 4 heads, V 8192), "small" (6 x 384), "124m" (GPT-2).
inline ModelConfig shape_named(const std::string& name) {
  if (name == "124m") return {12, 12, 768, 1024, 50257};
  if (name == "small") return {6, 6, 384, 512, 8192};
  return {6, 4, 256, 320, 8192};
}

// A fixed sequence of numbers below `limit`.
class Numbers {
 public:
  int64_t below(int64_t limit) {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<int64_t>((state_ >> 33) % static_cast<uint64_t>(limit));
  }

 private:
  uint64_t state_ = 1;
};

}  // namespace dn::bench
