// The model's parameters: their table, the configurations it is made of, initialisation, and access to them
// however they are stored.

#include <cmath>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "core/error.h"
#include "core/model.h"
#include "test/check.h"
#include "test/model_logits.h"
#include "test/naive_gpt2.h"
#include "test/proxy_backend.h"

using namespace dn;
using namespace dn::test;
using namespace dn::test::inference;

namespace {

std::vector<float> get(Model& model, size_t index) {
  std::vector<float> values(static_cast<size_t>(model.parameters()[index].count));
  model.get_parameter(index, values.data());
  return values;
}

}  // namespace

DN_TEST(model_parameter_table_of_gpt2) {
  ModelConfig config;
  config.layers = 12;
  config.heads = 12;
  config.channels = 768;
  config.context = 1024;
  config.vocab = 50257;
  const auto table = make_parameter_table(config);
  CHECK(table.size() == 148);
  int64_t count = 0, end = 0;
  for (const Parameter& p : table) {
    count += p.count;
    CHECK(p.offset % 16 == 0 && p.offset >= end);
    CHECK(p.is_matrix == (p.shape.size() == 2));
    end = p.offset + p.count;
  }
  CHECK(count == 124439808);
  CHECK(table[0].name == "wte.weight" && table[1].name == "wpe.weight");
  const Parameter& qkv = table[2 + 12 * 3 + 2];
  CHECK(qkv.name == "h.3.attn.c_attn.weight" && qkv.shape == (std::vector<int64_t>{768, 2304}));
  CHECK(table[147].name == "ln_f.bias");
}

DN_TEST(model_rejects_bad_configs) {
  const auto build = [](void (*change)(ModelConfig&)) {
    ModelConfig config = tiny_config();
    change(config);
    Model model(make_cpu_backend(1), config);
  };
  CHECK_THROWS(build([](ModelConfig& c) { c.layers = 0; }), Code::kArgument, "layers is 0");
  CHECK_THROWS(build([](ModelConfig& c) { c.heads = -2; }), Code::kArgument, "heads is -2");
  CHECK_THROWS(build([](ModelConfig& c) { c.channels = 0; }), Code::kArgument, "channels is 0");
  CHECK_THROWS(build([](ModelConfig& c) { c.context = 0; }), Code::kArgument, "context is 0");
  CHECK_THROWS(build([](ModelConfig& c) { c.vocab = -1; }), Code::kArgument, "vocab is -1");
  CHECK_THROWS(build([](ModelConfig& c) { c.heads = 3; }), Code::kArgument, "heads = 3");
  CHECK_THROWS(build([](ModelConfig& c) { c.vocab = 2147483647; }), Code::kArgument, "vocab is 2147483647");
  CHECK_THROWS(build([](ModelConfig& c) { c.channels = 2147483646; }), Code::kArgument,
               "channels is 2147483646");
}

DN_TEST(model_initialisation) {
  ModelConfig config = tiny_config(32, 1000);
  Model a(make_cpu_backend(1), config), b(make_cpu_backend(2), config), other(make_cpu_backend(1), config);
  a.initialise(7);
  b.prepare_inference();  // a packed model becomes a plain, initialised one
  b.initialise(7);
  other.initialise(8);
  for (size_t i = 0; i < a.parameters().size(); ++i) {
    const Parameter& p = a.parameters()[i];
    const std::vector<float> values = get(a, i);
    CHECK_MSG(same_bits(values, get(b, i)), p.name);
    double sum = 0, squares = 0;
    for (const float x : values) {
      sum += x;
      squares += static_cast<double>(x) * x;
    }
    const double n = static_cast<double>(values.size());
    if (p.is_matrix) {
      const double sd = p.name.find("c_proj") != std::string::npos ? 0.02 / 2 : 0.02;  // sqrt(2 layers) = 2
      CHECK_MSG(std::fabs(sum / n) < 5 * sd / std::sqrt(n), p.name + ": mean " + std::to_string(sum / n));
      CHECK_MSG(std::fabs(squares / n / (sd * sd) - 1) < 5 * std::sqrt(2 / n), p.name + ": variance");
      CHECK_MSG(!same_bits(values, get(other, i)), p.name);
      CHECK_MSG(std::set<float>(values.begin(), values.end()).size() > values.size() * 99 / 100,
                p.name + ": repeats");
    } else {
      const float expected = p.name.find("weight") != std::string::npos ? 1.0f : 0.0f;
      for (const float x : values) CHECK_MSG(x == expected, p.name);
    }
  }
}

DN_TEST(model_parameters_survive_packing) {
  for (const bool host : {true, false}) {
    const NaiveGpt2 naive = random_weights(tiny_config(20, 37), 3), other = random_weights(naive.config, 30);
    ProxyControl control;
    control.host_memory = host;
    Model model(std::make_unique<ProxyBackend>(make_cpu_backend(2), &control), naive.config);
    const auto check = [&](const NaiveGpt2& weights, const char* when) {
      for (size_t i = 0; i < weights.p.size(); ++i) {
        const std::vector<float> expected(weights.p[i].begin(), weights.p[i].end());
        CHECK_MSG(same_bits(get(model, i), expected), model.parameters()[i].name + " " + when);
      }
    };
    for (size_t i = 0; i < model.parameters().size(); ++i) {
      for (const float x : get(model, i)) CHECK(x == 0);
    }
    set_weights(model, naive);
    check(naive, "after loading");
    model.begin_training();
    check(naive, "in training");
    set_weights(model, other);
    check(other, "set in training");
    model.end_training();
    check(other, "after training");
    model.prepare_inference();
    check(other, "packed");
    set_weights(model, naive);
    check(naive, "set while packed");
    float value;
    CHECK_THROWS(model.get_parameter(28, &value), Code::kArgument, "parameter 28 is outside the model's 28");
    CHECK_THROWS(model.set_parameter(28, &value), Code::kArgument, "parameter 28");
  }
}

DN_TEST(model_find_parameter) {
  Model model(make_cpu_backend(1), tiny_config());
  CHECK(model.parameters()[model.find_parameter("h.1.mlp.c_proj.bias")].name == "h.1.mlp.c_proj.bias");
  CHECK_THROWS(model.find_parameter("h.2.ln_1.weight"), Code::kArgument, "'h.2.ln_1.weight'");
}

#if !defined(__SANITIZE_ADDRESS__)  // the sanitizer ends the process on such a request
DN_TEST(model_reports_absurd_sizes) {
  ModelConfig config = tiny_config();
  config.layers = 1024;
  config.channels = 65536;  // 211 TB
  CHECK_THROWS(Model(make_cpu_backend(1), config), Code::kOutOfMemory, "bytes for the parameters");
}
#endif
