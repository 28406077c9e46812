// Inference: the forward pass and what may follow it, with the cost of every op.
// Usage: bench_forward [shape = all] [threads = 1] [repeats = 3] [dtype = fp32]. Shapes: tiny, small, 124m;
// each at T = 256 with all logits, with a denoising step over half the rows, and with one over four listed
// rows where no other token has changed since the one before; 124m also at T = 1024. dtype: of the weights,
// fp32, bf16 or int8; shares are of the fp32 peak in all.

#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "bench/op_timer.h"

namespace {

using namespace dn;
using namespace dn::bench;

enum class After { kLogits, kDenoise, kFewRows };

void run(Model& model, OpTimer& timer, const char* shape, int64_t T, After after, int threads, int repeats) {
  const ModelConfig& config = model.config();
  Numbers numbers;
  Batch batch;
  for (int64_t i = 0; i < T; ++i) {
    batch.ids.push_back(static_cast<int32_t>(numbers.below(config.vocab)));
    batch.positions.push_back(static_cast<int32_t>(i));
  }
  Sequence sequence;
  sequence.end = T;
  batch.sequences.push_back(sequence);
  std::vector<int64_t> kept;  // rows of the batch
  const int64_t spacing = after == After::kLogits ? 1 : after == After::kDenoise ? 2 : T / 4;
  for (int64_t row = 0; row < T; row += spacing) kept.push_back(row);
  const int64_t R = static_cast<int64_t>(kept.size());
  std::vector<int64_t> rows;
  std::vector<DenoiseRow> asked;
  for (int64_t r = 0; r < R; ++r) {
    rows.push_back(r);
    DenoiseRow row;
    row.row = r;
    row.top_p = 0.9f;
    row.position = static_cast<uint32_t>(kept[static_cast<size_t>(r)]);
    asked.push_back(row);
  }
  std::vector<float> logits(after == After::kLogits ? static_cast<size_t>(R * config.vocab) : 0);
  std::vector<DenoiseStats> stats(static_cast<size_t>(R));
  // Tokens that change between calls, as in a model's work: all, or those of a denoising step.
  const auto call = [&] {
    for (int64_t t = 0; t < T; t += after == After::kFewRows ? spacing : 1) {
      int32_t& id = batch.ids[static_cast<size_t>(t)];
      id = (id + 1) % static_cast<int32_t>(config.vocab);
    }
    model.forward(batch, kept);
    if (after == After::kLogits) {
      model.logits(logits.data(), rows.data(), R);
    } else {
      model.denoise(stats.data(), nullptr, asked.data(), R, nullptr, 0);
    }
  };
  call();
  timer.reset();
  double peak = fma_peak(timer.name());
  const double cpu = cpu_seconds(), wall = wall_seconds();
  for (int i = 0; i < repeats; ++i) call();
  const double cpu_spent = cpu_seconds() - cpu, wall_spent = wall_seconds() - wall;
  peak = std::max(peak, fma_peak(timer.name()));
  const char* const what = after == After::kLogits    ? "all logits"
                           : after == After::kDenoise ? "denoise half the rows, top-p 0.9"
                                                      : "denoise four rows, top-p 0.9";
  std::printf(
      "%s T = %lld, %s: %s, %d thread%s, fp32 peak of a core %.0f GFLOP/s; %.1f ms cpu, %.1f ms wall\n",
      shape, static_cast<long long>(T), what, timer.name().c_str(), threads, threads == 1 ? "" : "s", peak,
      cpu_spent / repeats * 1e3, wall_spent / repeats * 1e3);
  timer.print(cpu_spent, repeats, peak);
}

}  // namespace

int main(int argc, char** argv) {
  const std::string wanted = argc > 1 ? argv[1] : "all";
  const int threads = argc > 2 ? std::atoi(argv[2]) : 1, repeats = argc > 3 ? std::atoi(argv[3]) : 3;
  const std::string dtype = argc > 4 ? argv[4] : "fp32";
  if (dtype != "fp32" && dtype != "bf16" && dtype != "int8") {
    std::fprintf(stderr, "no dtype '%s'\n", dtype.c_str());
    return 1;
  }
  bool found = false;
  for (const char* const shape : {"tiny", "small", "124m"}) {
    if (wanted != "all" && wanted != shape) continue;
    found = true;
    auto owned = std::make_unique<OpTimer>(make_cpu_backend(threads));
    OpTimer& timer = *owned;
    const Dtype weights = dtype == "int8" ? Dtype::kI8 : dtype == "bf16" ? Dtype::kBF16 : Dtype::kF32;
    Model model(std::move(owned), shape_named(shape), weights);
    model.initialise(1);
    for (const After after : {After::kLogits, After::kDenoise, After::kFewRows}) {
      run(model, timer, shape, 256, after, threads, std::max(1, repeats));
    }
    if (std::string(shape) == "124m")
      run(model, timer, shape, 1024, After::kLogits, threads, std::max(1, repeats));
  }
  if (!found) std::fprintf(stderr, "no shape '%s'\n", wanted.c_str());
  return found ? 0 : 1;
}
