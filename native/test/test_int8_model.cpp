// Models with int8 weights: how close they come to fp32 ones, every op of the head, parameters in and out,
// what they refuse, and int8 tensors in files.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <string>
#include <vector>

#include "core/error.h"
#include "core/model.h"
#include "core/parameter_file.h"
#include "test/check.h"
#include "test/int8_reference.h"
#include "test/narrow_model.h"
#include "test/temporary_folder.h"

namespace {

using namespace dn;
using namespace dn::test::int8;
using namespace dn::test::narrow;

DN_TEST(int8_model_is_close_to_fp32_at_the_124m_shape) {
  if (dn::test::kSanitized) return;  // the same calls as in the tests below, at a size that takes long
  const ModelConfig config{2, 12, 768, 64, 5003};
  Model fp32(make_cpu_backend(2), config), int8(make_cpu_backend(2), config, Dtype::kI8);
  fp32.initialise(3);
  int8.initialise(3);
  const Batch batch = one_sequence(48, config.vocab, 1);
  const std::vector<float> expected = forward_logits(fp32, batch), got = forward_logits(int8, batch);
  const double error = relative_error(got, expected);
  std::printf("  int8 logits, 2 layers of C = 768, random weights: relative error %.4f\n", error);
  CHECK(error < 0.035);
  CHECK(error > 1e-4);  // it is int8 that ran
  int64_t agree = 0;
  for (int64_t r = 0; r < 48; ++r) {
    const auto best = [&](const std::vector<float>& x) {
      const auto row = x.begin() + r * config.vocab;
      return std::max_element(row, row + config.vocab) - row;
    };
    agree += best(got) == best(expected);
  }
  std::printf("  the same best token in %d of 48 rows\n", static_cast<int>(agree));
  CHECK(agree >= 40);  // of 5003 nearly equal ones
  CHECK(int8.memory().parameters < fp32.memory().parameters * 3 / 10);

  // initialise quantises the very weights that fp32 has.
  Model copy(make_cpu_backend(1), config, Dtype::kI8);
  copy_parameters(copy, fp32);
  CHECK(same_bits(forward_logits(copy, batch), got));
}

// Rows alone and in a batch, denoising statistics and losses are those of the logits.
DN_TEST(int8_model_serves_every_head_op) {
  const ModelConfig config{2, 4, 64, 32, 301};
  Model model(make_cpu_backend(2), config, Dtype::kI8);
  model.initialise(5);
  const Batch batch = one_sequence(20, config.vocab, 2);
  const std::vector<float> logits = forward_logits(model, batch);
  model.forward(batch, {4, 17});
  DenoiseRow row;
  row.row = 1;
  row.temperature = 0;
  DenoiseStats stats;
  model.denoise(&stats, nullptr, &row, 1, nullptr, 0);
  const float* const expected = logits.data() + 17 * config.vocab;
  const int64_t best = std::max_element(expected, expected + config.vocab) - expected;
  CHECK(stats.best == best);
  double mass = 0;
  for (int64_t i = 0; i < config.vocab; ++i)
    mass += std::exp(static_cast<double>(expected[i]) - static_cast<double>(expected[best]));
  CHECK(std::fabs(static_cast<double>(stats.probability) - 1 / mass) < 1e-6);
  LossRows rows;
  rows.rows = {17};
  rows.targets = {static_cast<int32_t>(best)};
  rows.weights = {1};
  float loss = 0;
  model.loss(batch, rows, {}, &loss);
  CHECK(std::fabs(static_cast<double>(loss) - std::log(mass)) < 1e-5);
}

DN_TEST(int8_model_gives_its_weights_back) {
  const ModelConfig config{1, 2, 36, 8, 131};
  Model fp32(make_cpu_backend(1), config), int8(make_cpu_backend(1), config, Dtype::kI8),
      again(make_cpu_backend(2), config, Dtype::kI8), widened(make_cpu_backend(1), config);
  fp32.initialise(7);
  copy_parameters(int8, fp32);
  for (size_t i = 0; i < fp32.parameters().size(); ++i) {
    const Parameter& p = fp32.parameters()[i];
    const size_t count = static_cast<size_t>(p.count);
    std::vector<float> a(count), b(count);
    fp32.get_parameter(i, a.data());
    int8.get_parameter(i, b.data());
    const bool is_int8 = p.is_matrix && p.name != "wpe.weight";
    CHECK_MSG(same_bits(a, b) == !is_int8, p.name);
    if (!is_int8) {
      CHECK_THROWS(int8.int8_columns(i), Code::kArgument, p.name);
      again.set_parameter(i, b.data());
      widened.set_parameter(i, b.data());
      continue;
    }
    const size_t N = static_cast<size_t>(int8.int8_columns(i));
    std::vector<int8_t> q(count), from_fp32(count);
    std::vector<float> scales(N), scales_fp32(N);
    int8.get_int8(i, q.data(), scales.data());
    fp32.get_int8(i, from_fp32.data(), scales_fp32.data());
    CHECK_MSG(q == from_fp32 && scales == scales_fp32, p.name);
    again.set_int8(i, q.data(), scales.data());
    widened.set_int8(i, q.data(), scales.data());
    std::vector<float> wide(count);
    widened.get_parameter(i, wide.data());
    CHECK_MSG(same_bits(wide, b), p.name);
  }
  const Batch batch = one_sequence(8, config.vocab, 3);
  CHECK(same_bits(forward_logits(int8, batch), forward_logits(again, batch)));
}

DN_TEST(int8_model_refuses_training_and_values_that_are_not_finite) {
  const ModelConfig config{1, 2, 32, 8, 64};
  Model model(make_cpu_backend(1), config, Dtype::kI8);
  model.initialise(1);
  CHECK_THROWS(model.begin_training(), Code::kArgument, "training needs fp32 weights");
  const size_t index = model.find_parameter("h.0.mlp.c_fc.weight");
  std::vector<float> values(static_cast<size_t>(model.parameters()[index].count), 1.0f);
  values[100] = std::numeric_limits<float>::quiet_NaN();
  CHECK_THROWS(model.set_parameter(index, values.data()), Code::kArgument, "h.0.mlp.c_fc.weight");
  CHECK_THROWS(Model(make_cpu_backend(1), config, Dtype::kF16), Code::kArgument, "bf16 or int8");
}

DN_TEST(int8_tensors_are_written_and_read) {
  const TemporaryFolder folder;
  const std::string path = folder / "model.safetensors";
  const ModelConfig config{1, 2, 32, 8, 64};
  Model model(make_cpu_backend(1), config, Dtype::kI8), copy(make_cpu_backend(1), config, Dtype::kI8);
  model.initialise(1);
  const size_t index = model.find_parameter("wte.weight");
  std::vector<int8_t> q(64 * 32), back(64 * 32);
  std::vector<float> scales(64), scales_back(64);
  model.get_int8(index, q.data(), scales.data());
  const auto write = [&](const std::vector<int8_t>& values, const std::vector<float>& factors) {
    SafetensorsWriter writer(path, {{"w", {64, 32}, Dtype::kI8}, {"s", {64}, Dtype::kF32}}, {});
    CHECK_THROWS(writer.write(factors.data(), 2048), Code::kArgument, "fp32 values");
    writer.write_int8(values.data(), 2048);
    CHECK_THROWS(writer.write_int8(values.data(), 64), Code::kArgument, "int8 values");
    writer.write(factors.data(), 64);
    writer.commit();
  };
  write(q, scales);
  {
    const SafetensorsFile file(path);
    load_parameter(copy, index, file, *file.find("w"), file.find("s"));
    copy.get_int8(index, back.data(), scales_back.data());
    CHECK(back == q && scales_back == scales);
    CHECK_THROWS(load_parameter(copy, index, file, *file.find("w"), nullptr), Code::kCheckpoint, "scales");
    CHECK_THROWS(load_parameter(copy, index, file, *file.find("w"), file.find("w")), Code::kCheckpoint, "64");
    CHECK_THROWS(load_parameter(copy, index, file, *file.find("s"), file.find("s")), Code::kCheckpoint,
                 "2048");
  }
  std::vector<float> negative = scales;
  negative[9] = -negative[9];
  write(q, negative);
  {
    const SafetensorsFile file(path);
    CHECK_THROWS(load_parameter(copy, index, file, *file.find("w"), file.find("s")), Code::kCheckpoint,
                 "scale 9");
  }
  std::vector<float> large = scales;
  large[9] = 3e38f;
  write(q, large);
  Model plain(make_cpu_backend(1), config);
  plain.initialise(2);
  for (Model* const model_of : {&copy, &plain}) {
    const SafetensorsFile file(path);
    CHECK_THROWS(load_parameter(*model_of, index, file, *file.find("w"), file.find("s")), Code::kCheckpoint,
                 "tensor \"w\": the value at index 2");
  }
  std::vector<int8_t> ones = q;
  for (size_t k = 0; k < 32; ++k) ones[9 * 32 + k] = static_cast<int8_t>(k % 2);
  write(ones, large);  // what is finite is taken
  {
    const SafetensorsFile file(path);
    load_parameter(plain, index, file, *file.find("w"), file.find("s"));
    std::vector<float> values(64 * 32);
    plain.get_parameter(index, values.data());
    CHECK(values[9 * 32] == 0 && values[9 * 32 + 1] == 3e38f);
  }
  q[77] = -128;
  write(q, scales);
  {
    const SafetensorsFile file(path);
    CHECK_THROWS(load_parameter(copy, index, file, *file.find("w"), file.find("s")), Code::kCheckpoint,
                 "index 77");
  }
}

}  // namespace
