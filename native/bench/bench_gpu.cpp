// GPT-2 124M on a GPU, through the backend's interface and without Node: the ceilings of the machine (copy,
// one large product), products at the model's shapes, attention, a training step, a denoising step and the
// denoising loop. One line of JSON per case on standard output. Usage: bench_gpu [filter] [seconds per case =
// 0.5]; the filter picks lines whose name contains it. Exits with 2 and the reason where there is no usable
// GPU.

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "core/backend.h"
#include "core/error.h"
#include "core/model.h"

namespace {

using namespace dn;
using Clock = std::chrono::steady_clock;

const ModelConfig kGpt2{12, 12, 768, 1024, 50257};

struct Bench {
  std::string filter;
  double budget = 0.5;

  bool wants(const std::string& name) const { return name.find(filter) != std::string::npos; }

  // Median, fastest and slowest seconds of a call that may leave work in flight; `device` waits for it. Calls
  // are timed in groups of about 20 ms, so that a wait costs nothing.
  void run(const std::string& name, Backend& device, double tokens, double flops, double bytes,
           const std::function<void()>& call) const {
    if (!wants(name)) return;
    const auto group = [&](int count) {
      const auto start = Clock::now();
      for (int i = 0; i < count; ++i) call();
      device.synchronize();
      return std::chrono::duration<double>(Clock::now() - start).count() / count;
    };
    group(2);
    const int count = std::clamp(static_cast<int>(0.02 / group(1)), 1, 1000);
    std::vector<double> times;
    const auto start = Clock::now();
    do {
      times.push_back(group(count));
    } while (std::chrono::duration<double>(Clock::now() - start).count() < budget || times.size() < 3);
    std::sort(times.begin(), times.end());
    const double median = times[times.size() / 2];
    std::printf("{\"name\": \"%s\", \"ms\": %.5f, \"fastest_ms\": %.5f, \"slowest_ms\": %.5f", name.c_str(),
                median * 1e3, times.front() * 1e3, times.back() * 1e3);
    if (tokens > 0) std::printf(", \"tokens_per_second\": %.0f", tokens / median);
    if (flops > 0) std::printf(", \"tflops\": %.2f", flops / median * 1e-12);
    if (bytes > 0) std::printf(", \"gigabytes_per_second\": %.1f", bytes / median * 1e-9);
    std::printf("}\n");
    std::fflush(stdout);
  }
};

// Device memory with numbers in it: zeros draw less power than a model does and run faster.
class Filled {
 public:
  Filled(Backend& backend, Dtype dtype, int64_t rows, int64_t cols) : tensor_(nullptr, dtype, rows, cols) {
    const size_t bytes = static_cast<size_t>(rows * cols) * dtype_bytes(dtype);
    buffer_ = backend.alloc(bytes);
    tensor_.data = buffer_->data();
    std::vector<uint16_t> chunk(1 << 20);
    uint32_t state = 1;
    for (size_t i = 0; i < chunk.size(); ++i) {
      state = state * 1664525u + 1013904223u;
      // Of every number the half that holds sign and exponent: magnitudes from 2^-8 to 2.
      chunk[i] = dtype == Dtype::kBF16 || i % 2 == 1
                     ? static_cast<uint16_t>((state >> 16 & 0x807F) | (119 + (state >> 8) % 8) << 7)
                     : static_cast<uint16_t>(state >> 16);
    }
    for (size_t at = 0; at < bytes; at += chunk.size() * 2)
      backend.upload(static_cast<char*>(buffer_->data()) + at, chunk.data(),
                     std::min(chunk.size() * 2, bytes - at));
  }
  Tensor tensor() const { return tensor_; }

 private:
  std::unique_ptr<Buffer> buffer_;
  Tensor tensor_;
};

void bench_ceilings(const Bench& bench, Backend& gpu) {
  const Dtype dtype = gpu.activation_dtype();
  if (bench.wants("ceiling/copy")) {
    const int64_t n = int64_t{1} << 29;
    Filled a(gpu, Dtype::kF32, 1, n), b(gpu, Dtype::kF32, 1, n);
    bench.run("ceiling/copy", gpu, 0, 0, 8.0 * static_cast<double>(n),
              [&] { gpu.copy(b.tensor(), a.tensor()); });
  }
  if (bench.wants("ceiling/product-8192")) {
    const int64_t n = 8192;
    Filled w(gpu, Dtype::kF32, n, n), x(gpu, dtype, n, n), y(gpu, dtype, n, n);
    Weight weight;
    weight.data = w.tensor().data;
    weight.K = weight.N = n;
    bench.run("ceiling/product-8192", gpu, 0, 2.0 * std::pow(static_cast<double>(n), 3), 0, [&] {
      gpu.matmul_forward(y.tensor(), x.tensor(), weight, Tensor(), Epilogue::kNone, Tensor(),
                         MatmulPrecision::kBF16);
    });
  }
}

void bench_products(const Bench& bench, Backend& gpu) {
  const Dtype dtype = gpu.activation_dtype();
  for (const int64_t M : {256, 4096, 16384, 65536}) {
    for (const auto& [K, N] :
         {std::pair<int64_t, int64_t>{768, 2304}, {768, 768}, {768, 3072}, {3072, 768}}) {
      const std::string shape = std::to_string(M) + "x" + std::to_string(K) + "x" + std::to_string(N);
      if (!bench.wants("product/" + shape)) continue;
      Filled w(gpu, Dtype::kF32, K, N), dw(gpu, Dtype::kF32, K, N), b(gpu, Dtype::kF32, 1, N),
          db(gpu, Dtype::kF32, 1, N);
      Filled x(gpu, dtype, M, K), y(gpu, dtype, M, N), dx(gpu, dtype, M, K);
      Weight weight;
      weight.data = w.tensor().data;
      weight.K = K;
      weight.N = N;
      const double flops = 2.0 * static_cast<double>(M) * static_cast<double>(K) * static_cast<double>(N);
      bench.run("product/" + shape + "/forward", gpu, 0, flops, 0, [&] {
        gpu.matmul_forward(y.tensor(), x.tensor(), weight, b.tensor(), Epilogue::kNone, Tensor(),
                           MatmulPrecision::kBF16);
      });
      bench.run("product/" + shape + "/backward", gpu, 0, 2 * flops, 0, [&] {
        gpu.matmul_backward(dx.tensor(), dw.tensor(), db.tensor(), y.tensor(), x.tensor(), weight,
                            MatmulPrecision::kBF16, Store::kAdd);
      });
    }
  }
}

void bench_attention(const Bench& bench, Backend& gpu) {
  const Dtype dtype = gpu.activation_dtype();
  const int64_t C = 768, NH = 12;
  for (const int64_t T : {256, 512, 1024}) {
    for (const MaskKind kind : {MaskKind::kFull, MaskKind::kAnnealed}) {
      const std::string name =
          "attention/T" + std::to_string(T) + (kind == MaskKind::kFull ? "/full" : "/annealed");
      if (!bench.wants(name)) continue;
      const int64_t S = 32768 / T, N = S * T;
      Filled qkv(gpu, dtype, N, 3 * C), dout(gpu, dtype, N, C), out(gpu, dtype, N, C),
          dqkv(gpu, dtype, N, 3 * C);
      Filled lse(gpu, Dtype::kF32, N, NH);
      std::vector<AttentionSequence> sequences(static_cast<size_t>(S));
      std::vector<int32_t> positions;
      for (int64_t s = 0; s < S; ++s) {
        AttentionSequence& a = sequences[static_cast<size_t>(s)];
        a.q_begin = a.kv_begin = s * T;
        a.q_end = (s + 1) * T;
        a.k_len = T;
        a.mask.kind = kind;
        a.mask.threshold = annealing_threshold(0.5);
        for (int64_t t = 0; t < T; ++t) positions.push_back(static_cast<int32_t>(t));
      }
      const double flops = 4.0 * static_cast<double>(N) * static_cast<double>(T) * static_cast<double>(C);
      bench.run(name + "/forward", gpu, 0, flops, 0, [&] {
        gpu.attention_forward(out.tensor(), lse.tensor(), qkv.tensor().columns(0, C),
                              qkv.tensor().columns(C, 2 * C), sequences.data(), S, positions.data(), NH);
      });
      // Counted as five products, although dq recomputes two.
      bench.run(name + "/backward", gpu, 0, 2.5 * flops, 0, [&] {
        gpu.attention_backward(dqkv.tensor(), dout.tensor(), qkv.tensor(), out.tensor(), lse.tensor(),
                               sequences.data(), S, positions.data(), NH);
      });
    }
  }
}

// The head of a denoising step at GPT-2's shape, every row drawn: fused, and with its logits stored in
// chunks, which hidden states take whose rows are not aligned to 16 bytes.
void bench_head(const Bench& bench, Backend& gpu) {
  const std::vector<int64_t> counts = {16, 128, 512, 4096, 32768};
  const auto name = [](const char* way, int64_t R) {
    return std::string("head/") + way + "/R" + std::to_string(R);
  };
  if (std::none_of(counts.begin(), counts.end(), [&](int64_t R) {
        return bench.wants(name("fused", R)) || bench.wants(name("stored", R));
      }))
    return;
  const Dtype dtype = gpu.activation_dtype();
  const int64_t C = kGpt2.channels, V = kGpt2.vocab, most = counts.back();
  Filled wte(gpu, Dtype::kF32, V, C), aligned(gpu, dtype, most, C), apart(gpu, dtype, most, C + 4);
  Weight head;
  head.data = wte.tensor().data;
  head.order = WeightOrder::kOutIn;
  head.K = C;
  head.N = V;
  for (const int64_t R : counts) {
    std::vector<DenoiseRow> rows(static_cast<size_t>(R));
    for (int64_t r = 0; r < R; ++r) {
      DenoiseRow& row = rows[static_cast<size_t>(r)];
      row.row = r;
      row.banned = 811;
      row.position = static_cast<uint32_t>(r);
    }
    std::vector<DenoiseStats> stats(rows.size());
    const double flops = 2.0 * static_cast<double>(R) * static_cast<double>(C) * static_cast<double>(V);
    bench.run(name("fused", R), gpu, 0, flops, 0, [&] {
      gpu.head_denoise(stats.data(), nullptr, aligned.tensor(), rows.data(), R, nullptr, 0, head);
    });
    bench.run(name("stored", R), gpu, 0, flops, 0, [&] {
      gpu.head_denoise(stats.data(), nullptr, apart.tensor().columns(0, C), rows.data(), R, nullptr, 0, head);
    });
  }
}

Batch make_batch(int64_t S, int64_t T) {
  Batch batch;
  for (int64_t s = 0; s < S; ++s) {
    Sequence sequence;
    sequence.begin = s * T;
    sequence.end = (s + 1) * T;
    batch.sequences.push_back(sequence);
    for (int64_t t = 0; t < T; ++t) {
      batch.ids.push_back(static_cast<int32_t>((s * 7919 + t * 104729) % kGpt2.vocab));
      batch.positions.push_back(static_cast<int32_t>(t));
    }
  }
  return batch;
}

// Floating-point operations of a forward pass: trunk, attention, and the head on R rows.
double forward_flops(int64_t N, int64_t T, int64_t R) {
  const double C = kGpt2.channels, L = kGpt2.layers, V = kGpt2.vocab;
  return static_cast<double>(N) * (24 * C * C * L + 4 * static_cast<double>(T) * C * L) +
         2 * C * V * static_cast<double>(R);
}

// Forward, backward and the optimiser, half of the tokens masked, 64 Ki tokens a step.
void bench_training(const Bench& bench, std::unique_ptr<Backend> backend) {
  if (!bench.wants("training/T512") && !bench.wants("training/T1024")) return;
  Model model(std::move(backend), kGpt2);
  model.initialise(1);
  model.begin_training();
  for (const int64_t T : {512, 1024}) {
    const int64_t S = 65536 / T, N = S * T;
    const Batch batch = make_batch(S, T);
    LossRows rows;
    for (int64_t n = 0; n < N; n += 2) {
      rows.rows.push_back(n);
      rows.targets.push_back(static_cast<int32_t>(n * 31 % kGpt2.vocab));
      rows.weights.push_back(1.0f / static_cast<float>(N));
    }
    std::vector<float> losses(rows.rows.size());
    int64_t step = 0;
    bench.run("training/T" + std::to_string(T), model.backend(), static_cast<double>(N),
              3 * forward_flops(N, T, N / 2), 0, [&] {
                model.zero_gradients();
                model.loss_and_gradients(batch, rows, {}, losses.data());
                AdamWStep adamw;
                adamw.learning_rate = 1e-4f;
                adamw.gradient_scale =
                    static_cast<float>(1 / std::max(1.0, std::sqrt(model.gradient_sum_of_squares())));
                adamw.step = ++step;
                model.adamw(adamw, 0.1f);
              });
  }
}

// Half of the rows, as an ancestral sampler's step in the middle of a run: a forward pass and the head,
// issued and brought back by the host (denoise/...), and a step of the loop that stays on the device, eight
// to a call, with graphs and without. A step of the loop looks at every open position and fills the fewest
// that it can, so that all eight do nearly the same work.
void bench_denoising(const Bench& bench, std::unique_ptr<Backend> backend) {
  Model model(std::move(backend), kGpt2);
  model.initialise(1);
  for (const auto& [S, T] : {std::pair<int64_t, int64_t>{1, 256}, {1, 1024}, {64, 256}, {64, 1024}}) {
    const std::string shape = "/B" + std::to_string(S) + "/T" + std::to_string(T);
    const Batch batch = make_batch(S, T);
    std::vector<int64_t> kept;
    std::vector<DenoiseRow> rows;
    LoopRequest loop;
    loop.ids = batch.ids;
    loop.open.assign(batch.ids.size(), 0);
    loop.steps = 8;
    for (int64_t n = 0; n < S * T; n += 2) {
      DenoiseRow row;
      row.row = static_cast<int64_t>(kept.size());
      row.banned = 811;
      row.seed = 1;
      row.position = static_cast<uint32_t>(n % T);
      rows.push_back(row);
      kept.push_back(n);
      loop.open[static_cast<size_t>(n)] = 1;
    }
    for (const Sequence& sequence : batch.sequences) {
      LoopSequence q;
      q.begin = sequence.begin;
      q.end = sequence.end;
      q.sampler = LoopSampler::kThreshold;
      q.parameter = 2;  // above every probability: one token a step
      q.banned = 811;
      q.seed = 1;
      q.window_begin = static_cast<int32_t>(loop.windows.size());
      q.window_end = q.window_begin + 1;
      loop.windows.push_back({0, static_cast<int32_t>(T), 0});
      loop.sequences.push_back(q);
    }
    const int64_t R = static_cast<int64_t>(rows.size());
    const double flops = forward_flops(S * T, T, R);
    std::vector<DenoiseStats> stats(rows.size());
    bench.run("denoise" + shape, model.backend(), 0, flops, 0, [&] {
      model.forward(batch, kept);
      model.denoise(stats.data(), nullptr, rows.data(), R, nullptr, 0);
    });
    LoopLog log;
    for (const bool graphs : {true, false}) {
      model.use_graphs(graphs);
      bench.run(std::string(graphs ? "loop-of-8/graphs" : "loop-of-8/launches") + shape, model.backend(), 0,
                loop.steps * flops, 0, [&] { model.denoise_steps(loop, &log); });
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  Bench bench;
  if (argc > 1) bench.filter = argv[1];
  if (argc > 2) bench.budget = std::atof(argv[2]);
  std::string reason;
  const std::vector<CudaDevice> devices = cuda_devices(&reason);
  if (devices.empty()) {
    std::fprintf(stderr, "bench_gpu: %s\n", reason.c_str());
    return 2;
  }
  try {
    const std::unique_ptr<Backend> gpu = make_cuda_backend(0);
    std::printf("{\"name\": \"machine\", \"device\": \"%s\", \"backend\": \"%s\", \"memory\": %zu}\n",
                devices[0].name.c_str(), gpu->name().c_str(), devices[0].memory);
    bench_ceilings(bench, *gpu);
    bench_products(bench, *gpu);
    bench_attention(bench, *gpu);
    bench_head(bench, *gpu);
    bench_training(bench, make_cuda_backend(0));
    bench_denoising(bench, make_cuda_backend(0));
  } catch (const Error& e) {
    std::fprintf(stderr, "bench_gpu: %s: %s\n", code_name(e.code()), e.what());
    return 1;
  }
  return 0;
}
