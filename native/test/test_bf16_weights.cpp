// Weights held as bf16: products have the bits of plain fp32 weights with the rounded values, in bf16 where
// the machine has fast bf16 products, else in fp32, whatever the shape, the tiles, the threads and the place
// of a row. And models of them, which pack and give back what was rounded.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "core/error.h"
#include "core/model.h"
#include "cpu/gemm.h"
#include "cpu/ops.h"
#include "test/check.h"
#include "test/narrow_model.h"
#include "test/product_reference.h"
#include "test/proxy_backend.h"

namespace {

using namespace dn;
using namespace dn::test::products;
using namespace dn::test::narrow;

std::vector<float> rounded(std::vector<float> values) {
  std::transform(values.begin(), values.end(), values.begin(), to_bf16);
  return values;
}

// A packed weight and its memory.
struct Packed {
  std::vector<uint16_t> panels;
  Weight weight;

  Packed(const Cpu& cpu, const std::vector<float>& plain, WeightOrder order, int64_t K, int64_t N)
      : panels(static_cast<size_t>(packed_elements(K, N, Dtype::kBF16)), uint16_t{0xffff}),
        weight(dn::test::products::weight(plain, order, K, N)) {
    pack_weight(cpu, panels.data(), weight, Dtype::kBF16);
    weight.data = panels.data();
    weight.packed = true;
    weight.dtype = Dtype::kBF16;
  }
};

void check_bits(Isa isa, int64_t M, int64_t N, int64_t K, uint64_t seed) {
  Numbers numbers(seed);
  const bool in_out = seed % 2 == 0;
  const WeightOrder order = in_out ? WeightOrder::kInOut : WeightOrder::kOutIn;
  std::vector<float> a = numbers.vector(M * K), bias = numbers.vector(N), residual = numbers.vector(M * N);
  const std::vector<float> b = numbers.vector(K * N), narrow = rounded(b);
  const int threads = 1 + static_cast<int>(seed % 3);
  const Packed packed({threads, isa}, b, order, K, N);
  // Fp32 weights take tiles on AMX, whose order is another one.
  const bool in_bf16 = bf16_kernels(isa) != nullptr;
  const Isa expected_isa = in_bf16 ? isa : std::min(isa, Isa::kAvx512);
  std::vector<float> pre(static_cast<size_t>(M * N)), pre_expected(pre.size());
  for (const Epilogue epilogue : {Epilogue::kNone, Epilogue::kGelu, Epilogue::kResidual}) {
    const bool is_gelu = epilogue == Epilogue::kGelu;
    std::vector<float> out(static_cast<size_t>(M * N), 3.0f), expected(out.size());
    matmul_forward({threads, isa}, matrix(out, M, N), matrix(a, M, K), packed.weight, matrix(bias, 1, N),
                   epilogue, matrix(is_gelu ? pre : residual, M, N), MatmulPrecision::kFP32);
    matmul_forward({1, expected_isa}, matrix(expected, M, N), matrix(a, M, K), weight(narrow, order, K, N),
                   matrix(bias, 1, N), epilogue, matrix(is_gelu ? pre_expected : residual, M, N),
                   in_bf16 ? MatmulPrecision::kBF16 : MatmulPrecision::kFP32);
    CHECK_MSG(same_bits(out, expected), "bf16 weight " + label(isa, M, N, K));
    CHECK_MSG(!is_gelu || same_bits(pre, pre_expected), "before gelu " + label(isa, M, N, K));
  }
}

// The same by the fp32 kernels, also on machines that have others.
void check_widened(Isa isa, int64_t M, int64_t N, int64_t K, uint64_t seed) {
  Numbers numbers(seed);
  const std::vector<float> a = numbers.vector(M * K), b = numbers.vector(K * N), narrow = rounded(b);
  const Packed packed({1, isa}, b, WeightOrder::kInOut, K, N);
  std::vector<float> out(static_cast<size_t>(M * N), 3.0f), expected(out);
  GemmProduct p;
  p.a = a.data();
  p.a_stride = K;
  p.c_stride = p.b_stride = N;
  p.M = M;
  p.N = N;
  p.K = K;
  p.c = expected.data();
  p.b = narrow.data();
  gemm_fp32({1, isa}, p);
  p.c = out.data();
  p.b = static_cast<const float*>(packed.weight.data);
  p.b_layout = GemmLayout::kBf16Panels;
  gemm_fp32({1 + static_cast<int>(seed % 3), isa}, p);
  CHECK_MSG(same_bits(out, expected), "widened " + label(isa, M, N, K));
}

using Check = void (*)(Isa isa, int64_t M, int64_t N, int64_t K, uint64_t seed);

void check_shapes(Check check) {
  for (const Isa isa : isas()) {
    Numbers numbers(1);
    for (int i = 0; i < 150; ++i)
      check(isa, numbers.between(1, 70), numbers.between(1, 70), numbers.between(1, 70), numbers.next());
    for (int64_t M = 1; M <= 34; ++M) check(isa, M, 70, 800, numbers.next());  // every tile, two blocks
    for (int64_t N = 1; N <= 65; ++N) check(isa, 3, N, 5, numbers.next());     // every tail
    if (dn::test::kSanitized) continue;
    check(isa, 1, 2304, 768, 2);
    check(isa, 14, 768, 3072, 3);
    check(isa, 260, 300, 768, 4);
    check(isa, 2309, 45, 301, 5);  // by rows
    check(isa, 37, 40, 6500, 6);   // a reduction that plain operands are cut along
  }
}

DN_TEST(bf16_weights_give_the_bits_of_rounded_ones) { check_shapes(check_bits); }

DN_TEST(bf16_weights_are_widened_exactly) { check_shapes(check_widened); }

// A row has the same bits alone, among others and in a chunk of the head.
DN_TEST(bf16_weights_multiply_a_row_alike_everywhere) {
  const int64_t M = 145, N = 333, K = 2400;  // several blocks, chunks of rows and segments
  Numbers numbers(3);
  std::vector<float> a = numbers.vector(M * K);
  const std::vector<float> b = numbers.vector(K * N);
  for (const Isa isa : isas()) {
    const Packed packed({2, isa}, b, WeightOrder::kOutIn, K, N);
    std::vector<float> all(static_cast<size_t>(M * N));
    matmul_forward({2, isa}, matrix(all, M, N), matrix(a, M, K), packed.weight, {}, Epilogue::kNone, {},
                   MatmulPrecision::kFP32);
    for (const int64_t rows : {1, 2, 15, 33}) {
      const int64_t first = M - rows;
      std::vector<float> some(static_cast<size_t>(rows * N));
      matmul_forward({1, isa}, matrix(some, rows, N), matrix(a, M, K).slice(first, rows), packed.weight, {},
                     Epilogue::kNone, {}, MatmulPrecision::kBF16);
      CHECK(std::memcmp(some.data(), &all[static_cast<size_t>(first * N)], some.size() * 4) == 0);
    }
    std::vector<const float*> pointers;
    for (int64_t m = 0; m < M; ++m) pointers.push_back(&a[static_cast<size_t>(m * K)]);
    const int64_t begin = 7 * kHeadTile;
    std::vector<float> chunk(static_cast<size_t>(M * (N - begin)));
    head_gemm({2, isa}, chunk.data(), N - begin, pointers.data(), M, packed.weight, begin, N,
              MatmulPrecision::kFP32);
    for (int64_t m = 0; m < M; ++m) {
      CHECK(std::memcmp(&chunk[static_cast<size_t>(m * (N - begin))],
                        &all[static_cast<size_t>(m * N + begin)], static_cast<size_t>(N - begin) * 4) == 0);
    }
  }
}

DN_TEST(bf16_weights_pack_and_unpack_in_pieces) {
  Numbers numbers(9);
  for (const Isa isa : isas()) {
    for (int i = 0; i < 40; ++i) {
      // The first one with more rows than are converted at a time.
      const int64_t K = i == 0 ? 530 : numbers.between(1, 70), N = numbers.between(1, 140);
      for (const WeightOrder order : {WeightOrder::kInOut, WeightOrder::kOutIn}) {
        const std::vector<float> plain = numbers.vector(K * N), narrow = rounded(plain);
        const Packed packed({2, isa}, plain, order, K, N);
        std::vector<float> back(plain.size());
        unpack_weight({2, isa}, back.data(), packed.weight);
        CHECK(same_bits(back, narrow));
        std::vector<uint16_t> pieces(packed.panels.size(), uint16_t{0xffff});
        const bool in_out = order == WeightOrder::kInOut;
        const int64_t rows = in_out ? K : N, width = in_out ? N : K;
        const int64_t step = kPackRows * numbers.between(1, 2);
        Weight whole = weight(plain, order, K, N);
        whole.data = nullptr;
        for (int64_t begin = 0; begin < rows; begin += step) {
          pack_rows({2, isa}, pieces.data(), whole, plain.data() + begin * width, begin,
                    std::min(step, rows - begin), Dtype::kBF16);
        }
        CHECK(pieces == packed.panels);
        for (int64_t n = 0; !in_out && n < N; n += 7) {
          std::vector<float> row(static_cast<size_t>(K));
          weight_row(packed.weight, n, row.data());
          CHECK(std::memcmp(row.data(), &narrow[static_cast<size_t>(n * K)], row.size() * 4) == 0);
        }
      }
    }
  }
  const std::vector<float> plain(6, 1.0f);
  std::vector<float> room(64);
  CHECK_THROWS(
      pack_weight({1, Isa::kPortable}, room.data(), weight(plain, WeightOrder::kInOut, 2, 3), Dtype::kF16),
      Code::kArgument, "fp32 or bf16");
}

DN_TEST(bf16_model_is_the_fp32_model_of_rounded_weights) {
  const ModelConfig config{2, 4, 64, 48, 301};
  Model fp32(make_cpu_backend(2), config), bf16(make_cpu_backend(2), config, Dtype::kBF16),
      expected(make_cpu_backend(1), config);
  fp32.initialise(3);
  copy_parameters(bf16, fp32);
  for (size_t i = 0; i < fp32.parameters().size(); ++i) {
    const Parameter& p = fp32.parameters()[i];
    std::vector<float> values(static_cast<size_t>(p.count)), back(values.size());
    fp32.get_parameter(i, values.data());
    const bool is_held_narrow = p.is_matrix && p.name != "wpe.weight";
    if (is_held_narrow) values = rounded(values);
    bf16.get_parameter(i, back.data());
    CHECK_MSG(same_bits(back, values), p.name);
    expected.set_parameter(i, values.data());
  }
  const Batch batch = one_sequence(40, config.vocab, 1);
  const std::vector<float> got = forward_logits(bf16, batch), wanted = forward_logits(expected, batch);
  const bool in_bf16 = bf16_kernels(active_isa()) != nullptr;
  const double error = relative_error(got, wanted);
  if (!in_bf16 && active_isa() < Isa::kAmx) CHECK(same_bits(got, wanted));
  CHECK_MSG(error < (in_bf16 ? 5e-3 : 1e-5), std::to_string(error));
  CHECK(!in_bf16 || error > 1e-5);
  CHECK(relative_error(got, forward_logits(fp32, batch)) > 1e-4);  // it is bf16 that ran
  CHECK(bf16.memory().parameters < fp32.memory().parameters * 55 / 100);

  // initialise rounds the very weights that fp32 has; listed rows are rows of the whole.
  Model again(make_cpu_backend(1), config, Dtype::kBF16);
  again.initialise(3);
  CHECK(same_bits(forward_logits(again, batch), got));
  const std::vector<float> listed = forward_logits(again, batch, {39});
  CHECK(std::memcmp(listed.data(), &got[static_cast<size_t>(39 * config.vocab)], listed.size() * 4) == 0);

  LossRows rows;
  rows.rows = {17};
  rows.targets = {5};
  rows.weights = {1};
  float loss = 0;
  bf16.loss(batch, rows, {}, &loss);
  const float* const row = &got[static_cast<size_t>(17 * config.vocab)];
  double mass = 0;
  for (int64_t i = 0; i < config.vocab; ++i) mass += std::exp(static_cast<double>(row[i]));
  CHECK(std::fabs(static_cast<double>(loss) - (std::log(mass) - static_cast<double>(row[5]))) < 1e-5);
}

// Statistics are those of the logits, and a row after a cache is that of the whole sequence.
DN_TEST(bf16_model_serves_the_head_and_caches) {
  const ModelConfig config{2, 4, 64, 32, 301};
  Model model(make_cpu_backend(2), config, Dtype::kBF16);
  model.initialise(5);
  Batch batch = one_sequence(20, config.vocab, 2);
  batch.sequences[0].mask = test::inference::mask_of(MaskKind::kCausal);
  const std::vector<float> logits = forward_logits(model, batch);
  const float* const last = logits.data() + 19 * config.vocab;
  const int64_t best = std::max_element(last, last + config.vocab) - last;
  double mass = 0;
  for (int64_t i = 0; i < config.vocab; ++i)
    mass += std::exp(static_cast<double>(last[i]) - static_cast<double>(last[best]));

  KvCache cache(model.backend(), config, 20);
  for (const auto& [begin, end] : {std::pair{0, 12}, std::pair{12, 19}, std::pair{19, 20}}) {
    Batch part;
    part.ids.assign(batch.ids.begin() + begin, batch.ids.begin() + end);
    part.positions.assign(batch.positions.begin() + begin, batch.positions.begin() + end);
    Sequence sequence = batch.sequences[0];
    sequence.end = end - begin;
    sequence.k_len = end;
    sequence.cache = &cache;
    part.sequences.push_back(sequence);
    const std::vector<float> row = forward_logits(model, part, {end - begin - 1});
    const float* const whole = logits.data() + (end - 1) * config.vocab;
    CHECK(std::memcmp(row.data(), whole, row.size() * sizeof(float)) == 0);
  }
  DenoiseRow row;
  row.temperature = 0;
  DenoiseStats stats;
  model.denoise(&stats, nullptr, &row, 1, nullptr, 0);  // of the last part's row
  CHECK(stats.best == best);
  CHECK(std::fabs(static_cast<double>(stats.probability) - 1 / mass) < 1e-6);
}

// int8 values become their products with the scales, rounded; what a bf16 model would be as int8 is that of
// its own weights.
DN_TEST(bf16_model_takes_and_gives_int8) {
  const ModelConfig config{1, 2, 36, 8, 131};
  Model fp32(make_cpu_backend(1), config), bf16(make_cpu_backend(2), config, Dtype::kBF16),
      widened(make_cpu_backend(1), config);
  fp32.initialise(7);
  for (const char* const name : {"wte.weight", "h.0.mlp.c_fc.weight"}) {
    const size_t index = fp32.find_parameter(name);
    const size_t count = static_cast<size_t>(fp32.parameters()[index].count);
    const size_t N = static_cast<size_t>(fp32.int8_columns(index));
    std::vector<int8_t> q(count), q_widened(count);
    std::vector<float> scales(N), scales_widened(N), values(count), back(count);
    fp32.get_int8(index, q.data(), scales.data());
    fp32.set_int8(index, q.data(), scales.data());
    fp32.get_parameter(index, values.data());
    bf16.set_int8(index, q.data(), scales.data());
    bf16.get_parameter(index, back.data());
    CHECK_MSG(same_bits(back, rounded(values)), name);
    widened.set_parameter(index, back.data());
    bf16.get_int8(index, q.data(), scales.data());
    widened.get_int8(index, q_widened.data(), scales_widened.data());
    CHECK_MSG(q == q_widened && same_bits(scales, scales_widened), name);
  }
}

DN_TEST(bf16_model_refuses_training_and_values_it_cannot_hold) {
  const ModelConfig config{1, 2, 32, 8, 64};
  Model model(make_cpu_backend(1), config, Dtype::kBF16);
  model.initialise(1);
  CHECK_THROWS(model.begin_training(), Code::kArgument, "training needs fp32 weights");
  const size_t index = model.find_parameter("h.0.mlp.c_fc.weight");
  std::vector<float> values(static_cast<size_t>(model.parameters()[index].count), 1.0f), back(values.size());
  for (const float value : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::max()}) {
    values[100] = value;
    CHECK_THROWS(model.set_parameter(index, values.data()), Code::kArgument, "index 100");
  }
  // Read in pieces.
  Model wide(make_cpu_backend(1), ModelConfig{1, 2, 64, 8, 5000}, Dtype::kBF16);
  const auto read = [&](int64_t begin, int64_t count, float* out) {
    std::fill(out, out + count, 1.0f);
    if (begin <= 300001 && 300001 < begin + count)
      out[300001 - begin] = std::numeric_limits<float>::infinity();
  };
  CHECK_THROWS(wide.set_parameter(wide.find_parameter("wte.weight"), read), Code::kArgument, "index 300001");
  test::ProxyControl control;
  control.host_memory = false;
  CHECK_THROWS(
      Model(std::make_unique<test::ProxyBackend>(make_cpu_backend(1), &control), config, Dtype::kBF16),
      Code::kArgument, "bf16 ones are for the CPU");
  values[100] = 3.3895313e38f;  // the largest bf16
  model.set_parameter(index, values.data());
  model.get_parameter(index, back.data());
  CHECK(same_bits(back, values));
}

}  // namespace
