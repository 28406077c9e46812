// A training step (corrupt, loss and gradients, gradient norm, AdamW) with the cost of every op.
// Usage: bench_train [case = all] [threads = 1] [steps = 2]. Cases: tiny, tiny-fp32 (8192 packed tokens in
// sequences of 20 to 70), tiny-1k (1024), small, small-4x128, 124m-4x64, 124m-2x256, 124m-1x1024 (fp32),
// 124m-bf16. Processor time, not wall time, is what shares refer to: it says the same on a machine with other
// work.

#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "bench/op_timer.h"
#include "core/noise.h"

namespace {

using namespace dn;
using namespace dn::bench;

struct Case {
  const char* name;
  const char* shape;
  MatmulPrecision precision;
  int64_t tokens;
  int64_t shortest, longest;  // lengths of sequences, both included
};

const Case kCases[] = {
    {"tiny", "tiny", MatmulPrecision::kBF16, 8192, 20, 70},
    {"tiny-1k", "tiny", MatmulPrecision::kBF16, 1024, 20, 70},
    {"tiny-fp32", "tiny", MatmulPrecision::kFP32, 8192, 20, 70},
    {"small", "small", MatmulPrecision::kFP32, 2048, 256, 256},
    {"small-4x128", "small", MatmulPrecision::kFP32, 512, 128, 128},
    {"124m-4x64", "124m", MatmulPrecision::kFP32, 256, 64, 64},
    {"124m-2x256", "124m", MatmulPrecision::kFP32, 512, 256, 256},
    {"124m-1x1024", "124m", MatmulPrecision::kFP32, 1024, 1024, 1024},
    {"124m-bf16", "124m", MatmulPrecision::kBF16, 1024, 1024, 1024},
};

void run(const Case& c, int threads, int steps) {
  auto owned = std::make_unique<OpTimer>(make_cpu_backend(threads));
  OpTimer& timer = *owned;
  const std::string backend = timer.name();
  const ModelConfig config = shape_named(c.shape);
  Model model(std::move(owned), config);
  model.initialise(1);
  model.begin_training();

  Numbers numbers;
  std::vector<int32_t> ids;
  std::vector<int64_t> offsets = {0};
  while (static_cast<int64_t>(ids.size()) < c.tokens) {
    const int64_t drawn = c.shortest + numbers.below(c.longest - c.shortest + 1);
    const int64_t length = std::min(drawn, c.tokens - static_cast<int64_t>(ids.size()));
    for (int64_t i = 0; i < length; ++i) ids.push_back(static_cast<int32_t>(numbers.below(config.vocab - 1)));
    offsets.push_back(static_cast<int64_t>(ids.size()));
  }
  std::vector<double> t(offsets.size() - 1, 0.5);
  CleanBatch clean;
  clean.ids = ids.data();
  clean.offsets = offsets.data();
  clean.S = static_cast<int64_t>(t.size());
  clean.t = t.data();
  NoiseOptions options;
  options.mask_id = config.vocab - 1;
  TrainingOptions training;
  training.precision = c.precision;

  double loss = 0, corrupt_cpu = 0;
  const auto step = [&](int64_t number) {
    options.step = static_cast<uint32_t>(number);
    const double begin = cpu_seconds();
    const NoisyBatch noisy = corrupt(clean, options);
    corrupt_cpu += cpu_seconds() - begin;
    std::vector<float> losses(noisy.rows.rows.size());
    model.zero_gradients();
    model.loss_and_gradients(noisy.batch, noisy.rows, training, losses.data());
    AdamWStep adamw;
    adamw.learning_rate = 1e-4f;
    adamw.step = number;
    adamw.gradient_scale = 1.0f / static_cast<float>(1.0 + model.gradient_sum_of_squares() * 1e-12);
    model.adamw(adamw, 0.1f);
    loss = 0;
    for (const float l : losses) loss += static_cast<double>(l);
    loss /= static_cast<double>(losses.size());
  };
  step(1);  // allocates
  timer.reset();
  corrupt_cpu = 0;
  double peak = fma_peak(backend);
  const double cpu = cpu_seconds(), wall = wall_seconds();
  for (int i = 0; i < steps; ++i) step(i + 2);
  const double cpu_spent = cpu_seconds() - cpu, wall_spent = wall_seconds() - wall;
  peak = std::max(peak, fma_peak(backend));
  const double tokens = static_cast<double>(c.tokens) * steps;
  std::printf("%s: %s, %d thread%s, fp32 peak of a core %.0f GFLOP/s\n", c.name, backend.c_str(), threads,
              threads == 1 ? "" : "s", peak);
  std::printf(
      "  step: %.1f ms cpu, %.1f ms wall; %.0f tokens a second of cpu, %.0f of wall; corrupt %.2f ms; loss "
      "%.4f\n",
      cpu_spent / steps * 1e3, wall_spent / steps * 1e3, tokens / cpu_spent, tokens / wall_spent,
      corrupt_cpu / steps * 1e3, loss);
  timer.print(cpu_spent, steps, peak);
}

}  // namespace

int main(int argc, char** argv) {
  const std::string wanted = argc > 1 ? argv[1] : "all";
  const int threads = argc > 2 ? std::atoi(argv[2]) : 1, steps = argc > 3 ? std::atoi(argv[3]) : 2;
  bool found = false;
  for (const Case& c : kCases) {
    if (wanted != "all" && wanted != c.name) continue;
    run(c, threads, std::max(1, steps));
    found = true;
  }
  if (!found) std::fprintf(stderr, "no case '%s'\n", wanted.c_str());
  return found ? 0 : 1;
}
