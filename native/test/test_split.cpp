// fp32 products in three parts of bf16: bit for bit what the rule of the tiles says, in every layout and
// height, and as good as fp32 where numbers differ widely or have one sign.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "core/error.h"
#include "cpu/gemm.h"
#include "cpu/ops.h"
#include "test/check.h"
#include "test/product_reference.h"

namespace {

using namespace dn;
using namespace dn::cpu;
using namespace dn::test::products;

float upper_half(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  bits &= 0xffff0000u;
  std::memcpy(&x, &bits, 4);
  return x;
}

// The upper half of x, the rest rounded to the nearest bf16 (half away from zero), what remains.
struct Parts {
  float at[3];
  explicit Parts(float x) {
    at[0] = upper_half(x);
    const float rest = x - at[0];
    uint32_t bits;
    std::memcpy(&bits, &rest, 4);
    bits += 0x8000u;
    std::memcpy(&at[1], &bits, 4);
    at[1] = upper_half(at[1]);
    at[2] = rest - at[1];
  }
};

// c (M, N) += a (M, K) b (K, N) as the tiles do it: for every 32 numbers of the reduction and every product
// of parts a sum over the even and one over the odd numbers, together added to c.
void add_split(std::vector<float>& c, const std::vector<float>& a, const std::vector<float>& b, int64_t M,
               int64_t N, int64_t K) {
  constexpr int kProducts[6][2] = {{2, 0}, {1, 0}, {1, 1}, {0, 1}, {0, 2}, {0, 0}};
  const auto part = [](const std::vector<float>& v, int which) {
    std::vector<float> result;
    for (const float x : v) result.push_back(Parts(x).at[which]);
    return result;
  };
  std::vector<float> a_parts[3], b_parts[3];  // of b by columns
  for (int i = 0; i < 3; ++i) {
    a_parts[i] = part(a, i);
    b_parts[i] = part(transposed(b, K, N), i);
  }
  for (int64_t m = 0; m < M; ++m) {
    for (int64_t n = 0; n < N; ++n) {
      float& sum = c[static_cast<size_t>(m * N + n)];
      for (int64_t k = 0; k < K; k += 32) {
        const int64_t end = std::min(K, k + 32);
        for (const auto& product : kProducts) {
          const float* const x = a_parts[product[0]].data() + m * K;
          const float* const y = b_parts[product[1]].data() + n * K;
          float even = 0, odd = 0;
          for (int64_t i = k; i < end; i += 2) even = std::fma(x[i], y[i], even);
          for (int64_t i = k + 1; i < end; i += 2) odd = std::fma(x[i], y[i], odd);
          sum += even + odd;
        }
      }
    }
  }
}

// Numbers of many magnitudes.
std::vector<float> wide(Numbers& numbers, int64_t n) {
  std::vector<float> v = numbers.vector(n);
  for (float& x : v) x = std::ldexp(x, static_cast<int>(numbers.between(0, 40)) - 20);
  return v;
}

DN_TEST(split_parts_are_the_number) {
  Numbers numbers(31);
  for (const float x : wide(numbers, 20000)) {
    const Parts parts(x);
    CHECK(parts.at[0] + (parts.at[1] + parts.at[2]) == x && upper_half(parts.at[2]) == parts.at[2]);
  }
}

DN_TEST(split_follows_the_rule_of_the_tiles) {
  const Isa isa = detected_isa();
  if (!split_kernels(isa, INT64_MAX)) return;
  // Few rows and tiles of every height; columns and reductions with tails; several blocks and segments of the
  // reduction, several chunks of rows.
  const int64_t shapes[][3] = {{1, 96, 128},  {2, 33, 1536},  {3, 50, 800},   {16, 17, 131},
                               {17, 64, 160}, {31, 5, 129},   {33, 70, 130},  {48, 32, 161},
                               {65, 40, 769}, {200, 9, 2400}, {20, 64, 1600}, {35, 320, 160}};
  Numbers numbers(32);
  for (const auto& s : shapes) {
    const int64_t M = s[0], N = s[1], K = s[2];
    // matmul_bf16 goes the same ways with a cheaper reference.
    if (dn::test::kSanitized && M * N * K > 1900000) continue;
    std::vector<float> a = wide(numbers, M * K), b = wide(numbers, K * N);
    const std::vector<float> at = transposed(a, M, K), bt = transposed(b, K, N);
    std::vector<float> before = wide(numbers, M * N), fresh(before.size()), more = before;
    add_split(fresh, a, b, M, N, K);
    add_split(more, a, b, M, N, K);
    std::vector<float> panels(static_cast<size_t>(packed_elements(K, N)));
    pack_weight({1, isa}, panels.data(), weight(b, WeightOrder::kInOut, K, N));
    for (const int threads : {1, 3}) {
      const Cpu cpu{threads, isa};
      const std::string what = label(isa, M, N, K) + ", " + std::to_string(threads) + " threads";
      std::vector<float> out(fresh.size(), 7.0f);
      matmul_forward(cpu, matrix(out, M, N), matrix(a, M, K), weight(panels, WeightOrder::kInOut, K, N, true),
                     {}, Epilogue::kNone, {}, MatmulPrecision::kFP32);
      CHECK_MSG(same_bits(fresh, out), what + ": a packed weight");
      for (const bool accumulate : {false, true}) {
        const std::vector<float>& expected = accumulate ? more : fresh;
        std::vector<float> nn = before, nt = before, tn = before;
        gemm_nn(cpu, nn.data(), N, a.data(), K, b.data(), N, M, N, K, accumulate, MatmulPrecision::kFP32);
        gemm_nt(cpu, nt.data(), N, a.data(), K, bt.data(), K, M, N, K, accumulate, MatmulPrecision::kFP32);
        gemm_tn(cpu, tn.data(), N, at.data(), M, b.data(), N, M, N, K, accumulate, MatmulPrecision::kFP32);
        CHECK_MSG(same_bits(expected, nn) && same_bits(expected, nt) && same_bits(expected, tn), what);
      }
    }
  }
}

// What happens to finished cells is the same where tiles meet whole panels, a stream of steps (some rows of a
// packed weight) and, for one or two rows, without tiles: with bias, GELU and what it was taken of, residual.
// Of the second shape a thread has several panels, whose steps do not divide into rounds of the ring.
DN_TEST(split_few_rows_are_finished_as_many_are) {
  const Isa isa = detected_isa();
  if (!split_kernels(isa, INT64_MAX)) return;
  for (const auto& [N, K] : {std::pair<int64_t, int64_t>{70, 1600}, {330, 160}}) {
    const int64_t M = 40;
    Numbers numbers(34);
    std::vector<float> a = numbers.vector(M * K), b = numbers.vector(K * N), bias = numbers.vector(N);
    std::vector<float> residual = numbers.vector(M * N), sums(residual.size());
    add_split(sums, a, b, M, N, K);
    std::vector<float> panels(static_cast<size_t>(packed_elements(K, N)));
    pack_weight({1, isa}, panels.data(), weight(b, WeightOrder::kInOut, K, N));
    const Weight w = weight(panels, WeightOrder::kInOut, K, N, true);
    for (const Epilogue epilogue : {Epilogue::kNone, Epilogue::kGelu, Epilogue::kResidual}) {
      std::vector<float> whole(residual.size()), whole_extra = residual;
      const auto run = [&, N = N](std::vector<float>& out, std::vector<float>& extra, int64_t m,
                                  int64_t rows) {
        matmul_forward({2, isa}, matrix(out, M, N).slice(m, rows), matrix(a, M, K).slice(m, rows), w,
                       matrix(bias, 1, N), epilogue,
                       epilogue == Epilogue::kNone ? Tensor() : matrix(extra, M, N).slice(m, rows),
                       MatmulPrecision::kFP32);
      };
      run(whole, whole_extra, 0, M);
      for (size_t i = 0; i < whole.size(); ++i) {
        const float pre = sums[i] + bias[i % static_cast<size_t>(N)];
        if (epilogue == Epilogue::kGelu) CHECK(whole_extra[i] == pre && (pre > 0 || whole[i] > pre));
        if (epilogue == Epilogue::kNone) CHECK(whole[i] == pre);
        if (epilogue == Epilogue::kResidual) CHECK(whole[i] == pre + residual[i]);
      }
      for (const int64_t rows : {1, 2, 5, 20}) {
        std::vector<float> few(residual.size()), few_extra = residual;
        for (int64_t m = 0; m < M; m += rows) run(few, few_extra, m, rows);
        CHECK_MSG(same_bits(whole, few) && same_bits(whole_extra, few_extra),
                  std::to_string(rows) + " rows are finished otherwise");
      }
    }
  }
}

// Where parts that are left out would show: numbers of one sign, whose errors do not cancel, and numbers of
// very different size, which cost products in pairs some of their digits.
DN_TEST(split_is_as_good_as_fp32) {
  Numbers numbers(33);
  const int64_t M = 20, N = 40, K = 768;
  for (const bool positive : {false, true}) {
    std::vector<float> a = positive ? numbers.vector(M * K) : wide(numbers, M * K);
    std::vector<float> b = positive ? numbers.vector(K * N) : wide(numbers, K * N);
    if (positive) {
      for (float& x : a) x = std::fabs(x);
      for (float& x : b) x = std::fabs(x);
    }
    const Reference ref = reference(a, b, M, N, K);
    for (const Isa isa : isas()) {
      std::vector<float> out(static_cast<size_t>(M * N));
      gemm_nn({2, isa}, out.data(), N, a.data(), K, b.data(), N, M, N, K, false, MatmulPrecision::kFP32);
      double mean = 0, naive = 0;
      for (size_t i = 0; i < out.size(); ++i) {
        mean += std::fabs(out[i] - ref.exact[i]) / std::fabs(ref.exact[i]);
        naive += std::fabs(ref.naive[i] - ref.exact[i]) / std::fabs(ref.exact[i]);
      }
      CHECK_MSG(mean <= (pairs_pay(isa, K) ? 2 : 1.1) * naive,
                std::string(isa_name(isa)) + ": relative error " + std::to_string(mean / naive) +
                    " times that of a plain loop");
      check_product(ref, out, label(isa, M, N, K));
    }
  }
}

// The largest numbers stay finite, denormal ones are zero to the tiles and only to them.
DN_TEST(split_ends_of_the_range) {
  const Isa isa = detected_isa();
  if (!split_kernels(isa, INT64_MAX)) return;
  for (const int64_t M : {1, 5}) {
    const int64_t K = 128, N = 3;
    std::vector<float> a(static_cast<size_t>(M * K)), b(static_cast<size_t>(K * N)),
        out(static_cast<size_t>(M * N));
    const float largest = 3.4028234e38f, denormal = 1e-39f;
    for (int64_t m = 0; m < M; ++m)
      a[static_cast<size_t>(m * K)] = 1.0f, a[static_cast<size_t>(m * K + 1)] = -0.0f;
    b[0] = largest, b[1] = denormal, b[2] = -largest;
    std::vector<float> panels(static_cast<size_t>(packed_elements(K, N)));
    pack_weight({1, isa}, panels.data(), weight(b, WeightOrder::kInOut, K, N));
    matmul_forward({1, isa}, matrix(out, M, N), matrix(a, M, K),
                   weight(panels, WeightOrder::kInOut, K, N, true), {}, Epilogue::kNone, {},
                   MatmulPrecision::kFP32);
    for (int64_t m = 0; m < M; ++m) {
      CHECK(out[static_cast<size_t>(m * N)] == largest && out[static_cast<size_t>(m * N + 1)] == 0.0f &&
            out[static_cast<size_t>(m * N + 2)] == -largest);
    }
    volatile float half = denormal;
    half = half * 0.5f;
    CHECK_MSG(half > 0.0f, "denormal numbers are flushed after the product");
  }
}

}  // namespace
