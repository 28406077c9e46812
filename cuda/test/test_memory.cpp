// Device memory: estimates before it is taken, running out, giving back. Only under the emulator, which can
// limit it.

#ifdef DN_CUDA_EMULATOR

#include <cmath>
#include <memory>
#include <string>
#include <vector>

#include "cuda/test/model_case.h"

namespace dn::cuda_test {
namespace {

// Limits the device's memory for the life of the object.
class Limit {
 public:
  explicit Limit(size_t bytes) : old_(emulator::memory().limit) { emulator::memory().limit = bytes; }
  ~Limit() { emulator::memory().limit = old_; }
  Limit(const Limit&) = delete;
  Limit& operator=(const Limit&) = delete;

 private:
  size_t old_;
};

// What a step will take is known before it takes anything: with a little less memory than it turns out to
// need it is refused and nothing has changed, with a tenth more than that it runs.
void check_estimate(Dtype dtype, bool training, const std::string& advice) {
  emulator::MemoryState& memory = emulator::memory();
  const Batch small = make_batch({5}), large = make_batch({70, 33, 70});
  const LossRows few = make_rows(5), many = make_rows(173);
  std::vector<DenoiseRow> draws(40);
  for (size_t r = 0; r < draws.size(); ++r) draws[r].row = static_cast<int64_t>(r);
  std::vector<DenoiseStats> stats(draws.size());
  std::vector<float> losses(many.rows.size());
  const auto make = [&] {
    auto model = std::make_unique<Model>(make_cuda_backend(0, dtype), kConfig);
    model->initialise(1);
    if (training) model->begin_training();
    return model;
  };
  const auto step = [&](Model& model, const Batch& batch, const LossRows& rows) {
    if (training) {
      model.loss_and_gradients(batch, rows, {}, losses.data());
    } else {
      model.forward(batch, {});
      model.denoise(stats.data(), nullptr, draws.data(), static_cast<int64_t>(batch.ids.size() > 5 ? 40 : 1),
                    nullptr, 0);
    }
  };
  size_t grown = 0;
  {
    const auto model = make();
    step(*model, small, few);
    const size_t before = memory.used;
    step(*model, large, many);
    model->backend().synchronize();
    grown = memory.used - before;
  }
  const auto model = make();
  step(*model, small, few);
  const size_t before = memory.used;
  if (training) {
    const Limit limit(before + grown - 1);
    CHECK_THROWS(step(*model, large, many), Code::kOutOfMemory, "needs about");
    CHECK_THROWS(step(*model, large, many), Code::kOutOfMemory, advice);
    CHECK(memory.used == before);
    step(*model, small, few);
  } else {
    const Limit limit(before + (size_t{1} << 12));
    CHECK_THROWS(step(*model, large, many), Code::kOutOfMemory, advice);
    CHECK(memory.used == before);
    step(*model, small, few);
  }
  const Limit limit(before + grown + grown / 10);
  step(*model, large, many);
}

DN_TEST(cuda_memory_is_estimated_before_it_is_taken) {
  for (const Dtype dtype : {Dtype::kF32, Dtype::kBF16}) {
    check_estimate(dtype, true, "recompute activations");
    check_estimate(dtype, false, "lower the batch size");
  }
}

// Rows of two sequences by turns are an entry of the attention's plan each.
DN_TEST(cuda_memory_estimates_listed_rows) {
  emulator::MemoryState& memory = emulator::memory();
  const Batch batch = make_batch({4, 4});
  std::vector<int64_t> rows;
  for (int64_t r = 0; r < 2000; ++r) rows.push_back(r % 2 * 4);
  size_t grown = 0;
  for (const bool limited : {false, true}) {
    Model model(make_cuda_backend(0, Dtype::kBF16), kConfig);
    model.initialise(1);
    model.forward(batch, {});
    const size_t before = memory.used;
    if (limited) {
      const Limit limit(before + grown - 1);
      CHECK_THROWS(model.forward(batch, rows), Code::kOutOfMemory, "needs about");
      CHECK(memory.used == before);
    } else {
      model.forward(batch, rows);
      model.backend().synchronize();
      grown = memory.used - before;
    }
  }
}

// Room for logits is only asked for where they will be stored.
DN_TEST(cuda_memory_estimates_logits_where_they_are_stored) {
  StepShape shape;
  shape.R = 512;
  shape.C = 64;
  shape.V = 50000;
  const size_t logits = sizeof(float) * 512 * 50000;
  const auto estimate = [](Dtype dtype, const StepShape& s) { return backend(dtype).step_bytes(s); };
  const size_t fused = estimate(Dtype::kBF16, shape);
  CHECK(fused > 0 && fused < logits / 16);
  StepShape some = shape;
  some.logit_rows = 64;
  CHECK(estimate(Dtype::kBF16, some) >= fused + logits / 16);
  shape.logit_rows = shape.R;
  CHECK(estimate(Dtype::kBF16, shape) >= logits);
  shape.logit_rows = 0;
  CHECK(estimate(Dtype::kF32, shape) >= logits);
  shape.C = 60;
  CHECK(estimate(Dtype::kBF16, shape) >= logits);
}

// Loading and beginning to train are refused before they take anything, and by how much is said.
DN_TEST(cuda_memory_is_refused_to_models_that_do_not_fit) {
  emulator::MemoryState& memory = emulator::memory();
  Model model(make_cuda_backend(0), kConfig);
  model.initialise(1);
  const LossRows rows = make_rows(20);
  std::vector<float> losses(rows.rows.size());
  model.loss(make_batch({20}), rows, {}, losses.data());
  const size_t before = memory.used, parameters = model.memory().parameters;
  {
    auto backend = make_cuda_backend(0);
    const Limit limit(memory.used + parameters * 3 / 2 - 1);
    CHECK_THROWS(Model(std::move(backend), kConfig), Code::kOutOfMemory, "free; use a smaller model");
  }
  {
    const Limit limit(before + 3 * parameters - 1);
    CHECK_THROWS(model.begin_training(), Code::kOutOfMemory, "training (gradients and two moments");
    CHECK(!model.training());
    model.loss(make_batch({20}), rows, {}, losses.data());
  }
  model.begin_training();
  model.loss_and_gradients(make_batch({20}), rows, {}, losses.data());
  CHECK(std::isfinite(losses[0]));
}

// Running out where no estimate foresaw it (a mask's matrix, here) is the same error and as harmless, and in
// the end everything is given back: device memory, page-locked memory, streams.
DN_TEST(cuda_memory_is_given_back) {
  emulator::MemoryState& memory = emulator::memory();
  backend(Dtype::kBF16);
  backend(Dtype::kF32);
  const size_t before = memory.used, pieces = memory.pieces.size();
  const int handles = memory.handles;
  {
    Model model(make_cuda_backend(0), kConfig);
    fill(model);
    model.begin_training();
    const LossRows rows = make_rows(64);
    std::vector<float> losses(rows.rows.size());
    Batch matrix = make_batch({60});
    const std::vector<uint8_t> visible(size_t{2000} * 2000, 1);
    matrix.sequences[0].mask.kind = MaskKind::kMatrix;
    matrix.sequences[0].mask.matrix = visible.data();
    matrix.sequences[0].mask.matrix_width = 2000;
    model.loss_and_gradients(make_batch({64}), rows, {}, losses.data());
    {
      const Limit limit(memory.used + (size_t{1} << 20));
      CHECK_THROWS(model.loss_and_gradients(matrix, make_rows(60), {}, losses.data()), Code::kOutOfMemory,
                   "lower the batch size");
    }
    model.loss_and_gradients(make_batch({64}), rows, {}, losses.data());
    CHECK(std::isfinite(losses[0]));
  }
  CHECK(memory.used == before);
  CHECK(memory.pieces.size() == pieces);
  CHECK(memory.handles == handles);
}

// A thousand times load, sample, now and then train, dispose: the most that a cycle holds and what it leaves
// are the same in the last one as in the first.
DN_TEST(cuda_memory_stays_flat_over_a_thousand_cycles) {
  emulator::MemoryState& memory = emulator::memory();
  backend(Dtype::kBF16);
  backend(Dtype::kF32);
  const ModelConfig config{1, 1, 8, 8, 11};
  const size_t before = memory.used, pieces = memory.pieces.size();
  const int handles = memory.handles;
  Batch batch = make_batch({3});
  for (int32_t& id : batch.ids) id %= 11;
  DenoiseRow row;
  DenoiseStats stats;
  size_t held[2] = {0, 0};
  int uneven = 0;
  for (int cycle = 0; cycle < 1000; ++cycle) {
    const bool training = cycle % 50 == 0;
    {
      Model model(make_cuda_backend(0), config);
      model.initialise(1);
      model.forward(batch, {});
      model.denoise(&stats, nullptr, &row, 1, nullptr, 0);
      if (training) {
        LossRows rows;
        rows.rows = {1};
        rows.targets = {7};
        rows.weights = {1};
        float loss = 0;
        model.begin_training();
        model.loss_and_gradients(batch, rows, {}, &loss);
        AdamWStep adamw;
        adamw.learning_rate = 1e-3f;
        model.adamw(adamw, 0.1f);
        model.gradient_sum_of_squares();
      }
      size_t& first = held[training ? 1 : 0];
      if (first == 0) first = memory.used;
      if (memory.used != first) ++uneven;
    }
    if (memory.used != before || memory.pieces.size() != pieces || memory.handles != handles) ++uneven;
  }
  CHECK_MSG(uneven == 0, std::to_string(uneven) + " of 1000 cycles held or left another amount of memory");
  CHECK(memory.overruns == 0);
}

}  // namespace
}  // namespace dn::cuda_test

#endif
