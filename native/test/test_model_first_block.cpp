// What a forward keeps of the first block for the next one: the bits of a model that keeps nothing, whatever
// came before, and no more rows computed than have changed.

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "core/model.h"
#include "cpu/ops.h"
#include "test/check.h"
#include "test/naive_gpt2.h"
#include "test/narrow_model.h"
#include "test/proxy_backend.h"
#include "test/training_task.h"

namespace {

using namespace dn;
using namespace dn::test;
using dn::test::narrow::forward_logits;

// Counts the rows of products with as many columns as queries, keys and values have.
class CountingBackend : public ProxyBackend {
 public:
  CountingBackend(ProxyControl* control, int64_t columns, std::vector<int64_t>* rows)
      : ProxyBackend(make_cpu_backend(2), control), columns_(columns), rows_(rows) {}
  void matmul_forward(Tensor out, Tensor inp, const Weight& w, Tensor bias, Epilogue epilogue, Tensor extra,
                      MatmulPrecision precision) override {
    if (out.cols == columns_) rows_->push_back(out.rows);
    ProxyBackend::matmul_forward(out, inp, w, bias, epilogue, extra, precision);
  }

 private:
  int64_t columns_;
  std::vector<int64_t>* rows_;
};

const ModelConfig kConfig = {2, 2, 32, 48, 61};  // layers, heads, channels, context, vocabulary

void append(Batch& batch, int64_t T, uint64_t seed, int32_t first_position = 0) {
  const Batch one = narrow::one_sequence(T, kConfig.vocab, seed);
  Sequence s;
  s.begin = static_cast<int64_t>(batch.ids.size());
  s.end = s.begin + T;
  batch.ids.insert(batch.ids.end(), one.ids.begin(), one.ids.end());
  for (int64_t t = 0; t < T; ++t) batch.positions.push_back(first_position + static_cast<int32_t>(t));
  batch.sequences.push_back(s);
}

Batch sequence(int64_t T, uint64_t seed) {
  Batch batch;
  append(batch, T, seed);
  return batch;
}

// The batch on this model, whatever it has seen, and on one that has seen nothing.
void check_bits(Model& model, Dtype dtype, const Batch& batch, const std::vector<int64_t>& rows,
                const std::string& what) {
  const std::vector<float> got = forward_logits(model, batch, rows);
  Model fresh(make_cpu_backend(1), kConfig, dtype);
  narrow::copy_parameters(fresh, model);
  CHECK_MSG(same_bits(got, forward_logits(fresh, batch, rows)), what);
}

// The bits, and how many rows the first block computes.
void check_rows(Model& model, std::vector<int64_t>& rows, const Batch& batch, int64_t computed,
                const std::string& what, const std::vector<int64_t>& kept = {}) {
  rows.clear();
  check_bits(model, Dtype::kF32, batch, kept, what);
  const int64_t found = rows.size() == static_cast<size_t>(kConfig.layers) ? rows[0] : 0;
  CHECK_MSG(found == computed, what + ": " + std::to_string(found) + " rows computed");
}

}  // namespace

DN_TEST(first_block_computes_the_rows_that_changed) {
  ProxyControl control;
  std::vector<int64_t> rows;
  Model model(std::make_unique<CountingBackend>(&control, 3 * kConfig.channels, &rows), kConfig);
  model.initialise(5);
  Batch batch = sequence(40, 1);
  check_rows(model, rows, batch, 40, "the first forward");
  check_rows(model, rows, batch, 0, "the same once more");
  for (const size_t i : {3, 4, 5, 17, 39}) batch.ids[i] = (batch.ids[i] + 1) % kConfig.vocab;
  check_rows(model, rows, batch, 5, "five tokens", {2, 39, 2});
  batch.positions[20] = 47;
  check_rows(model, rows, batch, 1, "a position");
  // As the first, which of what has changed since has four tokens and the position.
  check_rows(model, rows, sequence(30, 1), 5, "a shorter one");
  append(batch, 18, 2);
  check_rows(model, rows, batch, 58, "a longer one, for which memory has to grow");
  Batch two_alike = batch;
  for (size_t i = 40; i < 58; ++i) two_alike.ids[i] = (two_alike.ids[i] + 1) % kConfig.vocab;
  check_rows(model, rows, two_alike, 18, "one that begins alike");
  check_rows(model, rows, batch, 18, "and back");
  for (int32_t& position : batch.positions) position = (position + 1) % kConfig.context;
  check_rows(model, rows, batch, 58, "all moved by one");

  // Few rows are computed as ever, and leave what is kept alone.
  check_rows(model, rows, sequence(15, 7), 15, "few rows");
  check_rows(model, rows, sequence(15, 7), 15, "few rows again");
  check_rows(model, rows, batch, 0, "after few rows");

  // Keys and values go to a cache as if they had been computed.
  KvCache cache(model.backend(), kConfig, 40), fresh_cache(model.backend(), kConfig, 40);
  Batch cached = sequence(40, 1);
  model.forward(cached, {});
  cached.sequences[0].cache = &cache;
  cached.sequences[0].k_len = 40;
  rows.clear();
  forward_logits(model, cached);
  CHECK(rows.size() == 1);
  Model fresh(make_cpu_backend(1), kConfig);
  narrow::copy_parameters(fresh, model);
  cached.sequences[0].cache = &fresh_cache;
  forward_logits(fresh, cached);
  CHECK(std::memcmp(cache.layer(0), fresh_cache.layer(0), cache.bytes()) == 0);
}

// Every weight that the first block depends on, one by one, and the others.
DN_TEST(first_block_forgets_when_a_weight_changes) {
  for (const Dtype dtype : {Dtype::kF32, Dtype::kBF16, Dtype::kI8}) {
    Model model(make_cpu_backend(2), kConfig, dtype);
    model.initialise(5);
    const Batch batch = sequence(40, 1);
    const std::string name = "dtype " + std::to_string(static_cast<int>(dtype));
    check_bits(model, dtype, batch, {}, name);
    for (size_t i = 0; i < model.parameters().size(); ++i) {
      std::vector<float> values(static_cast<size_t>(model.parameters()[i].count));
      model.get_parameter(i, values.data());
      for (float& x : values) x = 0.5f - x;
      if (i % 2 == 0) {
        model.set_parameter(i, values.data());
      } else {
        model.set_parameter(i, [&](int64_t begin, int64_t count, float* out) {
          std::copy_n(values.data() + begin, count, out);
        });
      }
      check_bits(model, dtype, batch, {}, name + " " + model.parameters()[i].name);
    }
    if (dtype != Dtype::kI8) continue;
    const size_t index = model.find_parameter("h.0.attn.c_attn.weight");
    std::vector<int8_t> values(static_cast<size_t>(model.parameters()[index].count), 3);
    const std::vector<float> scales(static_cast<size_t>(model.int8_columns(index)), 0.01f);
    model.set_int8(index, values.data(), scales.data());
    Model fresh(make_cpu_backend(1), kConfig, dtype);
    narrow::copy_parameters(fresh, model);
    fresh.set_int8(index, values.data(), scales.data());
    CHECK(same_bits(forward_logits(model, batch), forward_logits(fresh, batch)));
  }
}

// Training changes weights between forwards; nothing is kept while a model trains.
DN_TEST(first_block_is_computed_while_a_model_trains) {
  ProxyControl control;
  std::vector<int64_t> rows;
  Model model(std::make_unique<CountingBackend>(&control, 3 * kConfig.channels, &rows), kConfig);
  model.initialise(5);
  const Batch batch = sequence(40, 1);
  check_rows(model, rows, batch, 40, "before");
  model.begin_training();
  check_rows(model, rows, batch, 40, "in training");
  LossRows loss_rows;
  loss_rows.rows = {3, 9};
  loss_rows.targets = {1, 2};
  loss_rows.weights = {1, 1};
  Floats losses(2);
  model.loss_and_gradients(batch, loss_rows, {}, losses.data());
  AdamWStep step;
  step.learning_rate = 0.1f;
  model.adamw(step, 0);
  check_rows(model, rows, batch, 40, "after a step");
  model.end_training();
  check_rows(model, rows, batch, 40, "after training");
  check_rows(model, rows, batch, 0, "again after training");
}

// What the reuse costs in memory, and that it is done without where memory is not the host's, or missing.
DN_TEST(first_block_memory) {
  ProxyControl control;
  std::vector<int64_t> rows;
  const size_t of_row = sizeof(float) * 3 * static_cast<size_t>(kConfig.channels);
  const auto make = [&] {
    auto model = std::make_unique<Model>(
        std::make_unique<CountingBackend>(&control, 3 * kConfig.channels, &rows), kConfig);
    model->initialise(5);
    return model;
  };
  const auto with = make(), without = make();
  with->forward(sequence(16, 1), {});
  without->forward(sequence(15, 1), {});
  const size_t activations = (16 - 15) * sizeof(float) * 11 * static_cast<size_t>(kConfig.channels);
  CHECK(with->memory().workspace == without->memory().workspace + activations + 16 * of_row);

  control.host_memory = false;
  const auto device = make();
  for (int i = 0; i < 2; ++i) {
    rows.clear();
    device->forward(sequence(40, 1), {});
    CHECK(rows.size() == 2 && rows[0] == 40);
  }
  // Sharing what the host does not: 7 C numbers a token.
  CHECK(device->memory().workspace == 40 * sizeof(float) * 7 * static_cast<size_t>(kConfig.channels));
  control.host_memory = true;

  const auto model = make();
  model->prepare_inference();
  model->forward(sequence(12, 1), {});
  control.fail_at = 1;  // the activations; then what would be kept
  rows.clear();
  model->forward(sequence(40, 1), {});
  control.fail_at = -1;
  CHECK_MSG(rows.size() == 2 && rows[0] == 40, "the first block is computed");
  check_rows(*model, rows, sequence(40, 1), 40, "with memory again");
  check_rows(*model, rows, sequence(40, 1), 0, "and kept");
}

// A single block, of which some rows are listed.
DN_TEST(first_block_that_is_the_last) {
  const ModelConfig config = {1, 2, 32, 48, 61};
  const auto make = [&] {
    auto model = std::make_unique<Model>(make_cpu_backend(2), config);
    model->initialise(6);
    return model;
  };
  const auto model = make();
  Batch batch = sequence(40, 1);
  model->forward(batch, {});
  batch.ids[8] = (batch.ids[8] + 1) % config.vocab;
  const std::vector<int64_t> listed = {30, 2, 8};
  CHECK(same_bits(forward_logits(*model, batch, listed), forward_logits(*make(), batch, listed)));
}

// A forward that fails half way leaves nothing that looks as if it were known.
DN_TEST(first_block_after_a_failure) {
  ProxyControl control;
  std::vector<int64_t> rows;
  Model model(std::make_unique<CountingBackend>(&control, 3 * kConfig.channels, &rows), kConfig);
  model.initialise(5);
  model.forward(sequence(20, 1), {});
  control.fail_at = 0;
  CHECK_THROWS(model.forward(sequence(40, 1), {}), Code::kOutOfMemory, "the activations of a forward pass");
  control.fail_at = -1;
  check_bits(model, Dtype::kF32, sequence(20, 1), {}, "after a failure");
  check_rows(model, rows, sequence(48, 1), 48, "a longer one, after all");
}
