// Training knows the rows that have a loss: in any order, none, all, and nothing else beyond attention in the
// last block.

#include <cstring>

#include "core/model.h"
#include "test/check.h"
#include "test/proxy_backend.h"
#include "test/training_task.h"

using namespace dn;
using namespace dn::test;

namespace {

// The same with all rows asked for, the list beginning at `start` and ending before it.
Task of_all_rows(Task task, const ModelConfig& config, size_t start) {
  const size_t N = task.batch.ids.size();
  LossRows rows;
  for (size_t i = 0; i < N; ++i) {
    const size_t row = (start + i) % N;
    rows.rows.push_back(static_cast<int64_t>(row));
    rows.targets.push_back(static_cast<int32_t>(row * 7) % config.vocab);
    rows.weights.push_back(0.25f + 0.125f * static_cast<float>(row));
  }
  task.rows = rows;
  return task;
}

// Counts the rows that go through the last product of the blocks, forward and backward.
class RowCounter : public ProxyBackend {
 public:
  using ProxyBackend::ProxyBackend;
  void matmul_forward(Tensor out, Tensor inp, const Weight& w, Tensor bias, Epilogue epilogue, Tensor extra,
                      MatmulPrecision precision) override {
    if (w.K == 4 * w.N) forward += out.rows;
    ProxyBackend::matmul_forward(out, inp, w, bias, epilogue, extra, precision);
  }
  void matmul_backward(Tensor dinp, Tensor dweight, Tensor dbias, Tensor dout, Tensor inp, const Weight& w,
                       MatmulPrecision precision, Store store) override {
    if (w.K == 4 * w.N) backward += dout.rows;
    ProxyBackend::matmul_backward(dinp, dweight, dbias, dout, inp, w, precision, store);
  }
  int64_t forward = 0, backward = 0;
};

}  // namespace

// Losses of a sequence do not know their neighbours.
DN_TEST(training_losses_do_not_depend_on_the_batch) {
  const NaiveGpt2 naive = random_weights(tiny_config(20, 37), 8);
  const auto model = make_model(naive);
  model->begin_training();
  const Task both = make_task(naive.config, all_masks()[0].mask, 40, 8, 5);
  Task one = make_task(naive.config, all_masks()[0].mask, 40, 8, 0);
  one.rows = both.rows;
  one.rows.rows.resize(4);
  one.rows.targets.resize(4);
  one.rows.weights.resize(4);
  Floats together = run(*model, both);
  together.resize(4);
  CHECK(same_bits(together, run(*model, one)));
}

// All rows in order go through the last block as they lie, any other list gathered; nothing else may differ.
DN_TEST(training_takes_rows_in_any_order) {
  const NaiveGpt2 naive = random_weights(tiny_config(20, 37), 15);
  const auto model = make_model(naive);
  model->begin_training();
  for (const NamedMask& named : all_masks()) {
    const Task task = make_task(naive.config, named.mask, 46);
    const size_t N = task.batch.ids.size(), start = 5;
    model->zero_gradients();
    const Floats in_order = run(*model, of_all_rows(task, naive.config, 0));
    const State expected = gradients(*model);
    model->zero_gradients();
    const Floats turned = run(*model, of_all_rows(task, naive.config, start));
    const State got = gradients(*model);
    for (size_t r = 0; r < N; ++r) {
      CHECK_MSG(std::memcmp(&turned[r], &in_order[(start + r) % N], sizeof(float)) == 0,
                std::string(named.name) + ": loss of row " + std::to_string((start + r) % N) + " differs");
    }
    for (size_t i = 0; i < got.size(); ++i) {
      const Doubles wanted(expected[i].begin(), expected[i].end());
      CHECK_CLOSE(got[i].data(), wanted.data(), static_cast<int64_t>(wanted.size()),
                  1e-5 * root_sum_of_squares(expected[i]) + 1e-6,
                  std::string(named.name) + ", " + model->parameters()[i].name);
    }
  }
}

// Beyond attention the last block knows only rows that have a loss.
DN_TEST(training_leaves_rows_without_a_loss_out_of_the_last_block) {
  const NaiveGpt2 naive = random_weights(tiny_config(20, 37), 16);
  ProxyControl control;
  auto owned = std::make_unique<RowCounter>(make_cpu_backend(2), &control);
  RowCounter& counter = *owned;
  Model model(std::move(owned), naive.config);
  set_weights(model, naive);
  model.begin_training();
  const Task some = make_task(naive.config, all_masks()[0].mask, 47);
  const int64_t N = static_cast<int64_t>(some.batch.ids.size()),
                R = static_cast<int64_t>(some.rows.rows.size()), L = naive.config.layers;
  CHECK(R < N);
  for (const bool recompute : {false, true}) {
    TrainingOptions options;
    options.recompute = recompute;
    counter.forward = counter.backward = 0;
    run(model, some, options);
    CHECK(counter.forward == (L - 1) * N + R);
    CHECK(counter.backward == (L - 1) * N + R);
    counter.forward = counter.backward = 0;
    run(model, of_all_rows(some, naive.config, 0), options);
    CHECK(counter.forward == L * N);
    CHECK(counter.backward == L * N);
  }
}

DN_TEST(training_without_rows_changes_nothing) {
  const NaiveGpt2 naive = random_weights(tiny_config(), 11);
  const auto model = make_model(naive);
  Task task = make_task(naive.config, all_masks()[0].mask, 42);
  task.rows = LossRows();
  model->loss(task.batch, task.rows, {}, nullptr);
  model->begin_training();
  run(*model, task);
  CHECK(model->gradient_sum_of_squares() == 0);
}
