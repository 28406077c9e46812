// Inference: the forward pass and what may follow it, with the cost of every op.
// Usage: bench_forward [shape = all] [threads = 1] [repeats = 3] [dtype = fp32]. Shapes: tiny, small, 124m;
// each at T = 256 with all logits, with a denoising step over half the rows, and with one over four listed
// rows where no other token has changed since the one before; 124m also at T = 1024, and as it decodes a
// token after 96 and after 1,000 others. dtype: of the weights, fp32, bf16 or int8; shares are of the fp32
// peak in all.

#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "bench/op_timer.h"

namespace {

using namespace dn;
using namespace dn::bench;

constexpr int kTokens = 20;  // decoded a repeat

enum class After { kLogits, kDenoise, kFewRows };

template <typename Call>
void measure(OpTimer& timer, const std::string& what, int threads, int repeats, Call&& call) {
  call();
  timer.reset();
  double peak = fma_peak(timer.name());
  const double cpu = cpu_seconds(), wall = wall_seconds();
  for (int i = 0; i < repeats; ++i) call();
  const double cpu_spent = cpu_seconds() - cpu, wall_spent = wall_seconds() - wall;
  peak = std::max(peak, fma_peak(timer.name()));
  std::printf("%s: %s, %d thread%s, fp32 peak of a core %.0f GFLOP/s; %.2f ms cpu, %.2f ms wall\n",
              what.c_str(), timer.name().c_str(), threads, threads == 1 ? "" : "s", peak,
              cpu_spent / repeats * 1e3, wall_spent / repeats * 1e3);
  timer.print(cpu_spent, repeats, peak);
}

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
  const char* const what = after == After::kLogits    ? "all logits"
                           : after == After::kDenoise ? "denoise half the rows, top-p 0.9"
                                                      : "denoise four rows, top-p 0.9";
  measure(timer, std::string(shape) + " T = " + std::to_string(T) + ", " + what, threads, repeats, call);
}

// The best token after T others, whose keys and values are in a cache.
void run_decoding(Model& model, OpTimer& timer, const char* shape, int32_t T, int threads, int repeats) {
  KvCache cache(model.backend(), model.config(), T + 1);
  Batch batch;
  Sequence sequence;
  sequence.end = sequence.k_len = T;
  sequence.cache = &cache;
  sequence.mask.kind = MaskKind::kCausal;
  batch.sequences.push_back(sequence);
  for (int32_t t = 0; t < T; ++t) {
    batch.ids.push_back(t);
    batch.positions.push_back(t);
  }
  model.forward(batch, {0});
  batch.ids = {1};
  batch.positions = {T};
  batch.sequences[0].end = 1;
  ++batch.sequences[0].k_len;
  DenoiseRow row;
  row.temperature = 0;
  row.position = static_cast<uint32_t>(T);
  DenoiseStats stats;
  measure(timer, std::string(shape) + ", a token after " + std::to_string(T), threads, repeats, [&] {
    model.forward(batch, {0});
    model.denoise(&stats, nullptr, &row, 1, nullptr, 0);
  });
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
    if (std::string(shape) != "124m") continue;
    run(model, timer, shape, 1024, After::kLogits, threads, std::max(1, repeats));
    for (const int32_t T : {96, 1000})
      run_decoding(model, timer, shape, T, threads, kTokens * std::max(1, repeats));
  }
  if (!found) std::fprintf(stderr, "no shape '%s'\n", wanted.c_str());
  return found ? 0 : 1;
}
