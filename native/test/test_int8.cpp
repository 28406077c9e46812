// int8 weights: quantisation, the packed form, and the products of every kernel this machine has against an
// integer reference, bit for bit. Models and files of int8: test_int8_model.cpp.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "core/error.h"
#include "core/quantise.h"
#include "cpu/gemm_int8.h"
#include "cpu/ops.h"
#include "test/check.h"
#include "test/int8_reference.h"

namespace {

using namespace dn;
using namespace dn::cpu;
using namespace dn::test::int8;

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
      p.column_parts = threads == 2 ? 3 : 1;  // where 3 parts are whole panels for two threads
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
               Code::kArgument, "packed bf16 or int8");
  CHECK_THROWS(unpack_weight({1, Isa::kPortable}, out.data(), weight), Code::kArgument, "int8");
}

// GELU behind an int8 product, of a bias alone: within 1.5e-6 and the rounding of the result, 0 and u far
// out, in every row and column of tiles; what is not finite stays so, except -inf, of which GELU is 0.
DN_TEST(int8_matmul_gelu_accuracy) {
  std::vector<float> u;
  for (double x = -9.5; x <= 9.5; x += 0.0013) u.push_back(static_cast<float>(x));
  // Where a table changes from one piece to the next, and its ends.
  for (float x = -8.5f; x <= 8.5f; x += 0.25f) {
    for (const float to : {-INFINITY, x, INFINITY}) u.push_back(std::nextafter(x, to));
  }
  for (const float x : {0.0f, -0.0f, 1e-30f, 50.0f, 3e38f, -50.0f, -3e38f, -INFINITY, INFINITY, NAN})
    u.push_back(x);
  const int64_t M = 35, K = 64, N = static_cast<int64_t>(u.size());
  Plain w(WeightOrder::kInOut, K, N);
  Aligned packed(int8_bytes(K, N));
  pack_int8({1, Isa::kPortable}, packed.data(), w.matrix, 0);
  std::vector<float> a(static_cast<size_t>(M * K), 0.0f), out(static_cast<size_t>(M * N));
  for (const Int8Kernels* kernels : all_int8_kernels()) {
    GemmProduct p;
    p.c = out.data();
    p.c_stride = N;
    p.a = a.data();
    p.a_stride = K;
    p.M = M;
    p.N = N;
    p.K = K;
    p.bias = u.data();
    p.gelu = true;
    gemm_int8({2, Isa::kPortable}, p, packed.data(), *kernels);
    double most = 0;  // errors beyond the rounding of the result
    bool others = true;
    for (int64_t i = 0; i < M * N; ++i) {
      const float x = u[static_cast<size_t>(i % N)], y = out[static_cast<size_t>(i)];
      if (std::isnan(x) || x == INFINITY) {
        others = others && !std::isfinite(y);
      } else {
        const double z = 0.7978845608028654 * (x + 0.044715 * std::pow(static_cast<double>(x), 3));
        const double expected = std::max(-1e30, static_cast<double>(x)) / (1 + std::exp(-2 * z));
        most = std::max(most, std::fabs(y - expected) - std::fabs(expected) * 1e-6);
        others = others && std::isfinite(y) && (std::fabs(x) > 1e-4f || std::fabs(y - 0.5f * x) <= 1e-8f) &&
                 (x > -9 || std::fabs(y) < 1e-12f);
      }
    }
    CHECK_MSG(most <= 1.5e-6,
              std::string(kernels->name) + " is off by " + std::to_string(most * 1e6) + "e-6");
    CHECK_MSG(others, std::string(kernels->name) + " near 0, far out or not finite");
  }
}

}  // namespace
