// int8 weights: quantisation, the packed form, and the products of every kernel this machine has against an
// integer reference, bit for bit; then a whole model against fp32.

#include <algorithm>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "core/error.h"
#include "core/model.h"
#include "core/parameter_file.h"
#include "core/quantise.h"
#include "cpu/gemm_int8.h"
#include "cpu/ops.h"
#include "test/check.h"
#include "test/temporary_folder.h"

namespace {

using namespace dn;
using namespace dn::cpu;

class Numbers {
 public:
  explicit Numbers(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u + 1) {}
  uint64_t next() {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return state_;
  }
  std::vector<float> floats(int64_t n, float scale = 1) {
    std::vector<float> v(static_cast<size_t>(n));
    for (float& x : v)
      x = scale * static_cast<float>(static_cast<double>(next() >> 11) / (uint64_t{1} << 52) - 1.0);
    return v;
  }
  // -127 .. 127; one in eight an extreme, where saturating instructions would be found out.
  int8_t int8() {
    const uint64_t bits = next() >> 20;
    if (bits % 8 == 0) return bits % 16 == 0 ? 127 : -127;
    return static_cast<int8_t>(static_cast<int64_t>(bits / 8 % 255) - 127);
  }

 private:
  uint64_t state_;
};

// A weight in plain order with scales of its own.
struct Plain {
  std::vector<int8_t> values;
  std::vector<float> scales;
  Int8Matrix matrix;

  Plain(WeightOrder order, int64_t K, int64_t N) : values(static_cast<size_t>(K * N)) {
    scales.resize(static_cast<size_t>(N));
    matrix = {values.data(), scales.data(), order, K, N};
  }
  Plain(const Plain&) = delete;
  int8_t at(int64_t k, int64_t n) const {
    return values[static_cast<size_t>(matrix.order == WeightOrder::kOutIn ? n * matrix.K + k
                                                                          : k * matrix.N + n)];
  }
};

void fill(Plain& w, Numbers& numbers) {
  for (int8_t& v : w.values) v = numbers.int8();
  for (float& s : w.scales) s = 1e-3f + static_cast<float>(numbers.next() % 1000) * 1e-5f;
}

struct Aligned {
  explicit Aligned(int64_t bytes) : storage(static_cast<size_t>(bytes) + 64, 0x55) {}
  void* data() {
    return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(storage.data()) + 63) / 64 * 64);
  }
  std::vector<uint8_t> storage;
};

// The rule of cpu/gemm_int8_kernels.h, written again: q and the scale of a row.
float quantised(const float* x, int64_t K, std::vector<int32_t>* q) {
  float most = 0;
  for (int64_t k = 0; k < K; ++k) most = std::max(most, std::fabs(x[k]));
  q->assign(static_cast<size_t>(K), 0);
  if (most < 0x1p-100f) return 0;
  const float inverse = 127.0f / most;
  for (int64_t k = 0; k < K; ++k)
    (*q)[static_cast<size_t>(k)] = static_cast<int32_t>(std::nearbyint(x[k] * inverse));
  return most / 127.0f;
}

std::vector<float> reference(const std::vector<float>& a, const Plain& w, int64_t M) {
  const int64_t K = w.matrix.K, N = w.matrix.N;
  std::vector<float> c(static_cast<size_t>(M * N));
  std::vector<int32_t> q;
  for (int64_t m = 0; m < M; ++m) {
    const float scale = quantised(a.data() + m * K, K, &q);
    for (int64_t n = 0; n < N; ++n) {
      int64_t sum = 0;
      for (int64_t k = 0; k < K; ++k) sum += static_cast<int64_t>(q[static_cast<size_t>(k)]) * w.at(k, n);
      c[static_cast<size_t>(m * N + n)] =
          static_cast<float>(static_cast<int32_t>(sum)) * scale * w.scales[static_cast<size_t>(n)];
    }
  }
  return c;
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

// Every kernel, with one and with two threads, into rows with a gap between them that must stay untouched.
void check_product(int64_t M, int64_t N, int64_t K, WeightOrder order, uint64_t seed) {
  Numbers numbers(seed);
  Plain w(order, K, N);
  fill(w, numbers);
  std::vector<float> a = numbers.floats(M * K, 3);
  // Extremes: whole rows at the largest magnitude drive sums to their bound.
  if (M > 1 && K > 0) std::fill(a.begin(), a.begin() + K, -2.0f);
  Aligned packed(int8_bytes(K, N));
  pack_int8({2, Isa::kPortable}, packed.data(), w.matrix, 0);
  const std::vector<float> expected = reference(a, w, M);
  constexpr int64_t kGap = 3;
  for (const Int8Kernels* kernels : all_int8_kernels()) {
    for (const int threads : {1, 2}) {
      std::vector<float> wide(static_cast<size_t>(M * (N + kGap)), 77.0f), c;
      GemmProduct p;
      p.c = wide.data();
      p.c_stride = N + kGap;
      p.a = a.data();
      p.a_stride = K;
      p.M = M;
      p.N = N;
      p.K = K;
      gemm_int8({threads, Isa::kPortable}, p, packed.data(), *kernels);
      bool gaps = true;
      for (int64_t m = 0; m < M; ++m) {
        const float* const row = wide.data() + m * (N + kGap);
        c.insert(c.end(), row, row + N);
        for (int64_t i = N; i < N + kGap; ++i) gaps = gaps && row[i] == 77.0f;
      }
      const std::string what = std::string(kernels->name) + " threads=" + std::to_string(threads) +
                               " M=" + std::to_string(M) + " N=" + std::to_string(N) +
                               " K=" + std::to_string(K);
      CHECK_MSG(same_bits(c, expected), what + " differs from the integer reference");
      CHECK_MSG(gaps, what + " wrote beside C");
    }
  }
}

DN_TEST(int8_products_are_exact_for_every_tail) {
  check_product(5, 40, 0, WeightOrder::kInOut, 1);  // the sum of nothing
  // Every M, N and K of 1 .. 70 appears, in combinations that a fixed permutation mixes.
  for (int64_t i = 1; i <= 70; ++i) {
    for (int64_t j = 0; j < 4; ++j) {
      const int64_t N = (i * 37 + j * 17) % 70 + 1, K = (i * 53 + j * 29) % 70 + 1;
      check_product(i, N, K, j % 2 ? WeightOrder::kOutIn : WeightOrder::kInOut,
                    static_cast<uint64_t>(i * 4 + j));
      check_product(N, K, i, j % 2 ? WeightOrder::kInOut : WeightOrder::kOutIn,
                    static_cast<uint64_t>(i * 4 + j + 999));
    }
  }
}

DN_TEST(int8_products_are_exact_at_real_shapes) {
  const int64_t shapes[][3] = {{1, 768, 768},   {4, 2304, 768},  {16, 768, 3072}, {64, 3072, 768},
                               {130, 768, 256}, {257, 96, 3072}, {33, 8195, 128}};
  for (const auto& s : shapes) {
    check_product(s[0], s[1], s[2], s[1] > 4096 ? WeightOrder::kOutIn : WeightOrder::kInOut,
                  static_cast<uint64_t>(s[1] + s[2]));
  }
}

// All weights and inputs at the same extreme: the largest sums there are, far beyond what int16 holds.
DN_TEST(int8_products_do_not_saturate) {
  for (const int64_t K : {int64_t{64}, int64_t{3072}, kInt8MostInputs}) {
    for (const int sign : {-1, 1}) {
      Plain w(WeightOrder::kOutIn, K, 2);
      std::fill(w.values.begin(), w.values.end(), static_cast<int8_t>(127 * sign));
      w.scales = {1, 1};
      const std::vector<float> a(static_cast<size_t>(K), 127.0f);
      Aligned packed(int8_bytes(K, 2));
      pack_int8({1, Isa::kPortable}, packed.data(), w.matrix, 0);
      const float expected = static_cast<float>(127 * 127 * K * sign);
      for (const Int8Kernels* kernels : all_int8_kernels()) {
        float c[2] = {};
        GemmProduct p;
        p.c = c;
        p.c_stride = 2;
        p.a = a.data();
        p.a_stride = K;
        p.M = 1;
        p.N = 2;
        p.K = K;
        gemm_int8({1, Isa::kPortable}, p, packed.data(), *kernels);
        CHECK_MSG(c[0] == expected && c[1] == expected,
                  std::string(kernels->name) + " K=" + std::to_string(K) + ": " + std::to_string(c[0]));
      }
    }
  }
  CHECK_THROWS(int8_bytes(kInt8MostInputs + 1, 8), Code::kArgument, "131072");
}

// Ties, tiny rows, zeros and values that are not finite, by every kernel's row quantiser.
DN_TEST(int8_rows_are_quantised_alike) {
  Numbers numbers(5);
  for (const int64_t K : {1, 7, 16, 33, 64, 70, 200, 768}) {
    std::vector<std::vector<float>> rows = {numbers.floats(K),
                                            numbers.floats(K, 1e-20f),
                                            numbers.floats(K, 1e30f),
                                            std::vector<float>(static_cast<size_t>(K), 0.0f),
                                            numbers.floats(K, 0x1p-101f),
                                            std::vector<float>(static_cast<size_t>(K))};
    for (int64_t k = 0; k < K; ++k) rows[5][static_cast<size_t>(k)] = static_cast<float>(k % 127) + 0.5f;
    rows[5][0] = 127;  // the scale is 1: every other value is a tie
    for (const auto& row : rows) {
      std::vector<int32_t> expected;
      const float scale = quantised(row.data(), K, &expected);
      for (const Int8Kernels* kernels : all_int8_kernels()) {
        std::vector<uint8_t> q(static_cast<size_t>(K) + 1, 0xEE);
        const float got = kernels->quantise_row(q.data(), row.data(), K);
        CHECK_MSG(std::memcmp(&got, &scale, 4) == 0,
                  std::string(kernels->name) + ": scale " + std::to_string(got));
        bool same = q[static_cast<size_t>(K)] == 0xEE;
        for (int64_t k = 0; k < K; ++k) {
          same = same &&
                 static_cast<int32_t>(q[static_cast<size_t>(k)]) - 128 == expected[static_cast<size_t>(k)];
        }
        CHECK_MSG(same, std::string(kernels->name) + " K=" + std::to_string(K) + " differs");
      }
    }
    for (const float bad :
         {std::numeric_limits<float>::quiet_NaN(), -std::numeric_limits<float>::infinity()}) {
      std::vector<float> row = numbers.floats(K);
      row[static_cast<size_t>(K / 2)] = bad;
      for (const Int8Kernels* kernels : all_int8_kernels()) {
        std::vector<uint8_t> q(static_cast<size_t>(K));
        CHECK(std::isnan(kernels->quantise_row(q.data(), row.data(), K)));
        CHECK(std::count(q.begin(), q.end(), 128) == K);
      }
    }
  }
}

DN_TEST(int8_weights_are_quantised_by_columns) {
  Numbers numbers(9);
  for (const WeightOrder order : {WeightOrder::kInOut, WeightOrder::kOutIn}) {
    const int64_t K = 70, N = 45;
    std::vector<float> w = numbers.floats(K * N, 0.1f);
    const auto at = [&](int64_t k, int64_t n) -> float& {
      return w[static_cast<size_t>(order == WeightOrder::kOutIn ? n * K + k : k * N + n)];
    };
    for (int64_t k = 0; k < K; ++k) at(k, 3) = 0;  // a column of zeros
    Plain plain(order, K, N);
    CHECK(quantise(plain.matrix, w.data()));
    std::vector<float> column(static_cast<size_t>(K)), back(w.size());
    std::vector<int32_t> q;
    for (int64_t n = 0; n < N; ++n) {
      for (int64_t k = 0; k < K; ++k) column[static_cast<size_t>(k)] = at(k, n);
      CHECK(plain.scales[static_cast<size_t>(n)] == quantised(column.data(), K, &q));
      for (int64_t k = 0; k < K; ++k) CHECK(plain.at(k, n) == q[static_cast<size_t>(k)]);
    }
    dequantise(back.data(), plain.matrix);
    for (int64_t n = 0; n < N; ++n) {
      const float half = plain.scales[static_cast<size_t>(n)] * 0.50001f;
      for (int64_t k = 0; k < K; ++k) {
        const size_t i = static_cast<size_t>(order == WeightOrder::kOutIn ? n * K + k : k * N + n);
        CHECK(std::fabs(back[i] - w[i]) <= half);
      }
    }
    // Quantising what was quantised changes no value.
    Plain again(order, K, N);
    CHECK(quantise(again.matrix, back.data()));
    CHECK(again.values == plain.values);
    at(1, 1) = std::numeric_limits<float>::infinity();
    CHECK(!quantise(plain.matrix, w.data()));
  }
}

DN_TEST(int8_weights_pack_and_unpack_in_pieces) {
  Numbers numbers(11);
  for (const WeightOrder order : {WeightOrder::kInOut, WeightOrder::kOutIn}) {
    for (const int64_t K : {1, 30, 64, 130}) {
      for (const int64_t N : {1, 32, 70, 96}) {
        Plain w(order, K, N), back(order, K, N);
        fill(w, numbers);
        Aligned whole(int8_bytes(K, N)), pieces(int8_bytes(K, N));
        pack_int8({2, Isa::kPortable}, whole.data(), w.matrix, 0);
        unpack_int8({2, Isa::kPortable}, back.matrix, whole.data());
        CHECK(back.values == w.values && back.scales == w.scales);
        for (int64_t n = 0; n < N; n += kInt8Columns) {
          Plain piece(order, K, std::min(kInt8Columns, N - n));
          for (int64_t j = 0; j < piece.matrix.N; ++j) {
            for (int64_t k = 0; k < K; ++k) {
              piece.values[static_cast<size_t>(
                  order == WeightOrder::kOutIn ? j * K + k : k * piece.matrix.N + j)] = w.at(k, n + j);
            }
            piece.scales[static_cast<size_t>(j)] = w.scales[static_cast<size_t>(n + j)];
          }
          pack_int8({1, Isa::kPortable}, pieces.data(), piece.matrix, n);
        }
        CHECK(std::memcmp(whole.data(), pieces.data(), static_cast<size_t>(int8_bytes(K, N))) == 0);
        std::vector<float> plain(static_cast<size_t>(K * N)), column(static_cast<size_t>(K));
        dequantise(plain.data(), w.matrix);
        for (int64_t n = 0; n < N; n += 7) {
          int8_column(whole.data(), K, n, column.data());
          for (int64_t k = 0; k < K; ++k) {
            CHECK(column[static_cast<size_t>(k)] ==
                  plain[static_cast<size_t>(order == WeightOrder::kOutIn ? n * K + k : k * N + n)]);
          }
        }
      }
    }
  }
}

// Through the op: bias, GELU and residual after the exact product, as the fp32 product's epilogues give them.
DN_TEST(int8_matmul_epilogues_follow_the_product) {
  Numbers numbers(13);
  const int64_t M = 37, K = 96, N = 75;
  Plain w(WeightOrder::kInOut, K, N);
  fill(w, numbers);
  Aligned packed(int8_bytes(K, N));
  pack_int8({1, Isa::kPortable}, packed.data(), w.matrix, 0);
  Weight weight;
  weight.data = packed.data();
  weight.dtype = Dtype::kI8;
  weight.packed = true;
  weight.K = K;
  weight.N = N;
  std::vector<float> a = numbers.floats(M * K), bias = numbers.floats(N), extra = numbers.floats(M * N);
  const std::vector<float> product = reference(a, w, M);
  const auto tensor = [](std::vector<float>& v, int64_t rows, int64_t cols) {
    return Tensor(v.data(), Dtype::kF32, rows, cols);
  };
  for (const Isa isa : {Isa::kPortable, Isa::kAvx2, Isa::kAvx512, Isa::kAmx}) {
    if (isa > detected_isa()) continue;
    const Cpu cpu{2, isa};
    std::vector<float> out(static_cast<size_t>(M * N)), with_bias(out.size()), sum(out.size()),
        pre(out.size());
    for (size_t i = 0; i < out.size(); ++i) {
      with_bias[i] = product[i] + bias[i % static_cast<size_t>(N)];
      sum[i] = with_bias[i] + extra[i];
    }
    matmul_forward(cpu, tensor(out, M, N), tensor(a, M, K), weight, {}, Epilogue::kNone, {},
                   MatmulPrecision::kFP32);
    CHECK_MSG(same_bits(out, product), isa_name(isa));
    matmul_forward(cpu, tensor(out, M, N), tensor(a, M, K), weight, tensor(bias, 1, N), Epilogue::kNone, {},
                   MatmulPrecision::kFP32);
    CHECK_MSG(same_bits(out, with_bias), isa_name(isa));
    matmul_forward(cpu, tensor(out, M, N), tensor(a, M, K), weight, tensor(bias, 1, N), Epilogue::kResidual,
                   tensor(extra, M, N), MatmulPrecision::kFP32);
    CHECK_MSG(same_bits(out, sum), isa_name(isa));
    matmul_forward(cpu, tensor(out, M, N), tensor(a, M, K), weight, tensor(bias, 1, N), Epilogue::kGelu,
                   tensor(pre, M, N), MatmulPrecision::kFP32);
    CHECK_MSG(same_bits(pre, with_bias), isa_name(isa));
    std::vector<double> gelu(out.size());
    for (size_t i = 0; i < out.size(); ++i) {
      const double u = static_cast<double>(with_bias[i]);
      gelu[i] = 0.5 * u * (1 + std::tanh(0.7978845608028654 * (u + 0.044715 * u * u * u)));
    }
    CHECK_CLOSE(gelu.data(), out.data(), M * N, 1e-5, isa_name(isa));
  }
  Weight plain = weight;
  plain.packed = false;
  std::vector<float> out(static_cast<size_t>(M * N));
  CHECK_THROWS(matmul_forward({1, Isa::kPortable}, tensor(out, M, N), tensor(a, M, K), plain, {},
                              Epilogue::kNone, {}, MatmulPrecision::kFP32),
               Code::kArgument, "packed int8");
  CHECK_THROWS(unpack_weight({1, Isa::kPortable}, out.data(), weight), Code::kArgument, "int8");
}

// --- the model ---

Batch one_sequence(int64_t T, int32_t vocab, uint64_t seed) {
  Numbers numbers(seed);
  Batch batch;
  for (int64_t i = 0; i < T; ++i) {
    batch.ids.push_back(static_cast<int32_t>((numbers.next() >> 20) % static_cast<uint64_t>(vocab)));
    batch.positions.push_back(static_cast<int32_t>(i));
  }
  Sequence sequence;
  sequence.end = T;
  batch.sequences.push_back(sequence);
  return batch;
}

// The same fp32 weights in a model of either kind.
void copy_parameters(Model& to, Model& from) {
  std::vector<float> values;
  for (size_t i = 0; i < from.parameters().size(); ++i) {
    values.resize(static_cast<size_t>(from.parameters()[i].count));
    from.get_parameter(i, values.data());
    to.set_parameter(i, values.data());
  }
}

std::vector<float> logits_of(Model& model, const Batch& batch) {
  const int64_t N = static_cast<int64_t>(batch.ids.size());
  std::vector<int64_t> rows;
  for (int64_t r = 0; r < N; ++r) rows.push_back(r);
  std::vector<float> logits(static_cast<size_t>(N * model.config().vocab));
  model.forward(batch, {});
  model.logits(logits.data(), rows.data(), N);
  return logits;
}

// Root mean square of the difference over that of the reference.
double relative_error(const std::vector<float>& got, const std::vector<float>& expected) {
  double error = 0, size = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    const double d = static_cast<double>(got[i]) - static_cast<double>(expected[i]);
    error += d * d;
    size += static_cast<double>(expected[i]) * static_cast<double>(expected[i]);
  }
  return std::sqrt(error / size);
}

DN_TEST(int8_model_is_close_to_fp32_at_the_124m_shape) {
  if (dn::test::kSanitized) return;  // the same calls as in the tests below, at a size that takes long
  const ModelConfig config{2, 12, 768, 64, 5003};
  Model fp32(make_cpu_backend(2), config), int8(make_cpu_backend(2), config, Dtype::kI8);
  fp32.initialise(3);
  int8.initialise(3);
  const Batch batch = one_sequence(48, config.vocab, 1);
  const std::vector<float> expected = logits_of(fp32, batch), got = logits_of(int8, batch);
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
  CHECK(same_bits(logits_of(copy, batch), got));
}

// Rows alone and in a batch, denoising statistics and losses are those of the logits.
DN_TEST(int8_model_serves_every_head_op) {
  const ModelConfig config{2, 4, 64, 32, 301};
  Model model(make_cpu_backend(2), config, Dtype::kI8);
  model.initialise(5);
  const Batch batch = one_sequence(20, config.vocab, 2);
  const std::vector<float> logits = logits_of(model, batch);
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
  CHECK(same_bits(logits_of(int8, batch), logits_of(again, batch)));
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
  CHECK_THROWS(Model(make_cpu_backend(1), config, Dtype::kBF16), Code::kArgument, "int8");
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
