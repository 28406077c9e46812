// The whole model on the device: hidden states, losses and every gradient against the CPU backend on the same
// weights, training and caches.

#include "cuda/test/model_case.h"

namespace dn::cuda_test {
namespace {

void check_gradients(Dtype dtype, bool recompute) {
  Model gpu(make_cuda_backend(0, dtype), kConfig), cpu(make_cpu_backend(1), kConfig);
  fill(gpu);
  fill(cpu);
  gpu.begin_training();
  cpu.begin_training();
  const Batch batch = make_batch({21, 1, 33, 9});
  const LossRows rows = make_rows(64);
  TrainingOptions options;
  options.recompute = recompute;
  std::vector<float> a(rows.rows.size()), b(rows.rows.size());
  gpu.loss_and_gradients(batch, rows, options, a.data());
  cpu.loss_and_gradients(batch, rows, options, b.data());
  CHECK_ERROR(a, to_doubles(b), dtype == Dtype::kBF16 ? 1e-2 : 2e-6,
              std::string(dtype_name(dtype)) + " losses");
  double worst = 0;
  std::string name;
  for (size_t i = 0; i < gpu.parameters().size(); ++i) {
    const size_t n = idx(gpu.parameters()[i].count);
    std::vector<float> g(n), e(n);
    gpu.get_gradient(i, g.data());
    cpu.get_gradient(i, e.data());
    const double error = relative_error(g, to_doubles(e));
    if (!(error <= worst)) worst = error, name = gpu.parameters()[i].name;
  }
  const double allowed = dtype == Dtype::kBF16 ? 4e-2 : 2e-5;
  CHECK_MSG(worst <= allowed, std::string(dtype_name(dtype)) + ": gradient of " + name + " is off by " +
                                  std::to_string(worst) + ", allowed " + std::to_string(allowed));
}

DN_TEST(cuda_model_gradients_fp32) { check_gradients(Dtype::kF32, false); }
DN_TEST(cuda_model_gradients_bf16) { check_gradients(Dtype::kBF16, false); }
DN_TEST(cuda_model_gradients_recomputed) { check_gradients(Dtype::kF32, true); }

void check_hidden(Model& gpu, Model& cpu, const Batch& batch, const std::vector<int64_t>& rows) {
  std::vector<float> values[2];
  for (Model* model : {&gpu, &cpu}) {
    std::vector<float>& to = values[model == &cpu];
    to.resize(rows.size() * idx(kConfig.channels));
    model->forward(batch, rows);
    model->read_hidden(to.data());
  }
  CHECK_ERROR(values[0], to_doubles(values[1]), 2e-2, gpu.backend().name() + " hidden states");
}

// Listed rows, hidden states, and decoding with a cache in two pieces, give what a plain forward gives.
DN_TEST(cuda_model_forward) {
  for (const Dtype dtype : {Dtype::kF32, Dtype::kBF16}) {
    Model gpu(make_cuda_backend(0, dtype), kConfig), cpu(make_cpu_backend(1), kConfig);
    fill(gpu);
    fill(cpu);
    Batch batch = make_batch({20, 31});
    const std::vector<int64_t> all_rows, listed{44, 3, 19};
    std::vector<int64_t> rows{0, 1, 2};
    std::vector<float> a(3 * 97), b(3 * 97);
    gpu.forward(batch, listed);
    gpu.logits(a.data(), rows.data(), 3);
    cpu.forward(batch, listed);
    cpu.logits(b.data(), rows.data(), 3);
    CHECK_ERROR(a, to_doubles(b), dtype == Dtype::kBF16 ? 2e-2 : 1e-5,
                std::string(dtype_name(dtype)) + " logits of listed rows");
    std::vector<float> whole(3 * 97);
    gpu.forward(batch, all_rows);
    gpu.logits(whole.data(), listed.data(), 3);
    const double allowed = rows_are_exact() ? 0 : dtype == Dtype::kBF16 ? 2e-2 : 1e-5;
    CHECK_ERROR(whole, to_doubles(a), allowed, std::string(dtype_name(dtype)) + " logits of all rows");
    check_hidden(gpu, cpu, batch, listed);

    Batch one = make_batch({30});
    one.sequences[0].mask = AttentionMask();
    one.sequences[0].mask.kind = MaskKind::kCausal;
    gpu.forward(one, {});
    std::vector<float> last(97), cached(97);
    const int64_t row = 29;
    gpu.logits(last.data(), &row, 1);
    KvCache cache(gpu.backend(), kConfig, 40);
    for (const auto& [begin, end] : {std::pair<int, int>{0, 18}, {18, 30}}) {
      Batch piece;
      piece.ids.assign(one.ids.begin() + begin, one.ids.begin() + end);
      piece.positions.assign(one.positions.begin() + begin, one.positions.begin() + end);
      Sequence s = one.sequences[0];
      s.begin = 0;
      s.end = end - begin;
      s.k_len = end;
      s.cache = &cache;
      piece.sequences.push_back(s);
      gpu.forward(piece, {});
    }
    const int64_t last_row = 11;
    gpu.logits(cached.data(), &last_row, 1);
    CHECK_ERROR(cached, to_doubles(last), allowed, std::string(dtype_name(dtype)) + " logits with a cache");
  }
}

// 20 steps on one batch: the loss falls as on the CPU, twice the same, and the weights survive inference in
// between.
DN_TEST(cuda_model_trains) {
  const Batch batch = make_batch({24, 16});
  const LossRows rows = make_rows(40);
  const auto train = [&](std::unique_ptr<Backend> made, std::vector<double>* curve) {
    Model model(std::move(made), kConfig);
    model.initialise(3);
    model.begin_training();
    std::vector<float> losses(rows.rows.size());
    for (int64_t step = 1; step <= 20; ++step) {
      curve->push_back(train_step(model, batch, rows, step));
      if (step == 10) {  // packs and unpacks nothing that matters: master weights stay fp32
        model.loss(batch, rows, {}, losses.data());
      }
    }
    return parameter(model, 0);
  };
  std::vector<double> cpu, gpu, again, f32;
  train(make_cpu_backend(1), &cpu);
  const std::vector<float> first = train(make_cuda_backend(0), &gpu);
  emulate_seed(77);
  const std::vector<float> second = train(make_cuda_backend(0), &again);
  train(make_cuda_backend(0, Dtype::kF32), &f32);
  CHECK(gpu == again);
  CHECK(first == second);
  for (size_t i = 0; i < cpu.size(); ++i) {
    CHECK_MSG(std::fabs(gpu[i] - cpu[i]) < 1e-2 * cpu[i], "bf16 loss of step " + std::to_string(i) + ": " +
                                                              std::to_string(gpu[i]) + ", CPU " +
                                                              std::to_string(cpu[i]));
    CHECK_MSG(std::fabs(f32[i] - cpu[i]) < 1e-3 * cpu[i], "fp32 loss of step " + std::to_string(i) + ": " +
                                                              std::to_string(f32[i]) + ", CPU " +
                                                              std::to_string(cpu[i]));
  }
  CHECK(gpu.back() < gpu.front() - 0.5);
}

// The end of training waits for an update that nothing has asked for yet.
DN_TEST(cuda_model_keeps_the_last_update) {
  std::vector<float> results[2];
  for (const bool on_gpu : {true, false}) {
    Model model(on_gpu ? make_cuda_backend(0, Dtype::kF32) : make_cpu_backend(1), kConfig);
    model.initialise(3);
    model.begin_training();
    train_step(model, make_batch({24, 16}), make_rows(40), 1);
    model.end_training();
    results[on_gpu] = parameter(model, 0);
  }
  CHECK_ERROR(results[1], to_doubles(results[0]), 1e-3, "wte after a step");
}

// Parameters keep their fp32 bits through packing, inference and training.
DN_TEST(cuda_model_keeps_master_weights) {
  Model model(make_cuda_backend(0), kConfig);
  const std::vector<float> values = random_values(model.parameters()[0].count, 9);
  model.set_parameter(0, values.data());
  model.forward(make_batch({5}), {});
  CHECK(parameter(model, 0) == values);
  model.begin_training();
  CHECK(parameter(model, 0) == values);
  model.end_training();
  model.forward(make_batch({5}), {});
  CHECK(parameter(model, 0) == values);
}

}  // namespace
}  // namespace dn::cuda_test
