// Products in pairs (cpu/gemm_kernels.h): as exact as a plain loop for every kind of operand that networks
// have, the same bits however a product is cut, and what scales, zeros and the ends of the range do.

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "cpu/gemm.h"
#include "test/check.h"
#include "test/product_reference.h"

namespace {

using namespace dn;
using namespace dn::cpu;
using namespace dn::test::products;

bool has_pairs() { return detected_isa() >= Isa::kAvx512 && kGemmPairsAvx512.tile != nullptr; }

GemmProduct product(const Weight& w) {
  GemmProduct p;
  p.b = static_cast<const float*>(w.data);
  p.b_layout = w.packed                         ? GemmLayout::kPanels
               : w.order == WeightOrder::kInOut ? GemmLayout::kPlain
                                                : GemmLayout::kTransposed;
  p.b_stride = w.order == WeightOrder::kInOut ? w.N : w.K;
  p.N = w.N;
  p.K = w.K;
  if (w.packed) p.b_pairs = pair_panels(p.b, w.K, w.N, 0);
  return p;
}

// a (M, K), or with `turned` (K, M), times w in pairs, on every machine with AVX-512.
std::vector<float> in_pairs(const std::vector<float>& a, const Weight& w, int64_t M, int threads = 1,
                            bool turned = false) {
  std::vector<float> out(static_cast<size_t>(M * w.N), 5.0f);
  GemmProduct p = product(w);
  p.c = out.data();
  p.c_stride = w.N;
  p.a = a.data();
  p.a_stride = turned ? M : w.K;
  p.a_layout = turned ? GemmLayout::kTransposed : GemmLayout::kPlain;
  p.M = M;
  gemm_fp32({threads, Isa::kAvx512}, p, pair_kernels());
  return out;
}

std::vector<float> in_pairs(const std::vector<float>& a, const std::vector<float>& b, int64_t M, int64_t N,
                            int64_t K) {
  return in_pairs(a, weight(b, WeightOrder::kInOut, K, N), M);
}

// What packing for pairs does, wherever it does.
std::vector<float> scaled_by_hand(std::vector<float> panels, int64_t K, int64_t N) {
  PairPanel* pairs = reinterpret_cast<PairPanel*>(panels.data() + packed_pairs(K, N, 0));
  for (int64_t n = 0; n < N; n += kGemmPanel) {
    for (int64_t k = 0; k < K; k += kPairBlock, ++pairs) {
      scale_block(pairs, panels.data() + n * K + k * kGemmPanel, std::min(kPairBlock, K - k));
      CHECK(is_scaled(*pairs));
    }
  }
  return panels;
}

struct Errors {
  double square = 0;  // root mean square
  double worst = 0;
  double of_norms = 0;  // worst, as a share of the norms of row and column
};

template <typename Got>
Errors errors(const Reference& ref, const Got& got, const std::vector<float>& a, const std::vector<float>& b,
              int64_t M, int64_t N, int64_t K) {
  std::vector<double> rows(static_cast<size_t>(M)), columns(static_cast<size_t>(N));
  for (int64_t m = 0; m < M; ++m) {
    for (int64_t k = 0; k < K; ++k)
      rows[static_cast<size_t>(m)] += std::pow(a[static_cast<size_t>(m * K + k)], 2.0);
  }
  for (int64_t k = 0; k < K; ++k) {
    for (int64_t n = 0; n < N; ++n)
      columns[static_cast<size_t>(n)] += std::pow(b[static_cast<size_t>(k * N + n)], 2.0);
  }
  Errors e;
  for (int64_t m = 0; m < M; ++m) {
    for (int64_t n = 0; n < N; ++n) {
      const size_t i = static_cast<size_t>(m * N + n);
      const double error = std::fabs(got[i] - ref.exact[i]);
      e.square += error * error;
      e.worst = std::max(e.worst, error);
      e.of_norms = std::max(
          e.of_norms, error / std::sqrt(rows[static_cast<size_t>(m)] * columns[static_cast<size_t>(n)]));
    }
  }
  e.square = std::sqrt(e.square / static_cast<double>(M * N));
  return e;
}

double normal(Numbers& numbers) {
  const auto uniform = [&] { return (static_cast<double>(numbers.next() >> 11) + 1) / (uint64_t{1} << 53); };
  const double radius = std::sqrt(-2 * std::log(uniform()));
  return radius * std::cos(2 * M_PI * uniform());
}

double gelu(double x) { return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x))); }

// What a number of A or B becomes, by its place in the reduction.
using Shape = std::function<double(double normal, int64_t k)>;

struct Operands {
  const char* name;
  Shape a, b;
  double most;  // root mean square error expected at most, as a multiple of a plain loop's
};

// As those of networks: what comes out of a layer norm or GELU, channels that stand out, numbers with means,
// heavy tails, weights much smaller or larger than rows.
DN_TEST(pairs_are_as_exact_as_a_plain_loop) {
  if (!has_pairs()) return;
  const Shape plain_normal = [](double x, int64_t) { return x; };
  const Shape small = [](double x, int64_t) { return 0.02 * x; };
  const Operands kinds[] = {
      {"normal", plain_normal, small, 1.0},
      {"GELU", [](double x, int64_t) { return gelu(x); }, small, 1.0},
      {"few active", [](double x, int64_t) { return gelu(1.5 * x - 2); }, small, 1.0},
      {"one channel of 27", [](double x, int64_t k) { return k == 138 ? 27 : x; }, small, 1.0},
      {"two channels of 27", [](double x, int64_t k) { return k == 138 || k == 378 ? 27 : x; }, small, 1.0},
      {"means", [](double x, int64_t) { return 1 + x; }, [](double x, int64_t) { return 0.5 + x; }, 1.0},
      {"positive", [](double x, int64_t) { return std::fabs(x); },
       [](double x, int64_t) { return std::fabs(x); }, 1.0},
      {"heavy tails", [](double x, int64_t) { return x * x * x; },
       [](double x, int64_t) { return x * std::fabs(x); }, 1.0},
      {"large rows", [](double x, int64_t) { return 1e4 * x; }, small, 1.0},
      {"tiny rows", [](double x, int64_t) { return 1e-30 * x; }, small, 1.0},
      // What pairs are worst at: the two that stand out, in all rows, are one pair.
      {"a pair of 27", [](double x, int64_t k) { return k == 138 || k == 139 ? 27 : x; }, small, 5.0},
  };
  const int64_t M = 13, N = 70;
  for (const Operands& kind : kinds) {
    for (const int64_t K : {192, 384, 768, 773, 3072}) {
      Numbers numbers(static_cast<uint64_t>(71 + K));
      if (dn::test::kSanitized && K > 800) continue;
      std::vector<float> a(static_cast<size_t>(M * K)), b(static_cast<size_t>(K * N));
      for (size_t i = 0; i < a.size(); ++i)
        a[i] = static_cast<float>(kind.a(normal(numbers), static_cast<int64_t>(i) % K));
      for (size_t i = 0; i < b.size(); ++i)
        b[i] = static_cast<float>(kind.b(normal(numbers), static_cast<int64_t>(i) / N));
      const Reference ref = reference(a, b, M, N, K);
      const Errors pairs = errors(ref, in_pairs(a, b, M, N, K), a, b, M, N, K);
      const Errors plain = errors(ref, ref.naive, a, b, M, N, K);
      const std::string what = std::string(kind.name) + " K=" + std::to_string(K) + ": error " +
                               std::to_string(pairs.square / plain.square) + " (worst " +
                               std::to_string(pairs.worst / plain.worst) + ") times that of a plain loop, " +
                               std::to_string(pairs.of_norms * 1e6) + "e-6 of the norms";
      if (K == 768) std::printf("  %s\n", what.c_str());
      const double most = (pair_sums(K) == 1 ? 1.7 : 1.3) * kind.most;
      CHECK_MSG(pairs.square <= most * plain.square, what);
      CHECK_MSG(pairs.worst <= 1.5 * most * plain.worst, what);
      CHECK_MSG(pairs.of_norms <= 1e-6, what);
    }
  }
}

// Every number of rows a tile can have, whole groups of steps and rests, one correction and several, several
// blocks of the reduction; packed or not, few rows or many, one thread or more.
DN_TEST(pairs_have_the_same_bits_however_a_product_is_cut) {
  if (!has_pairs()) return;
  const int64_t M = 61, N = 75;
  Numbers numbers(72);
  for (const int64_t K : {6, 7, 96, 101, 384, 389, 770, 1541}) {
    const std::vector<float> a = numbers.vector(M * K), b = numbers.vector(K * N), bt = transposed(b, K, N),
                             at = transposed(a, M, K);
    std::vector<float> panels(static_cast<size_t>(packed_elements(K, N)));
    pack_weight({1, Isa::kAvx512}, panels.data(), weight(b, WeightOrder::kInOut, K, N));
    const Weight packed = weight(panels, WeightOrder::kInOut, K, N, true);
    const std::vector<float> whole = in_pairs(a, packed, M);
    std::vector<float> as_it_is(panels.size());
    pack_weight({1, Isa::kPortable}, as_it_is.data(), weight(b, WeightOrder::kInOut, K, N));
    std::vector<float> held = scaled_by_hand(as_it_is, K, N);
    CHECK(!same_bits(held, as_it_is));
    const Reference ref = reference(a, b, M, N, K);
    check_product(ref, whole, "in pairs K=" + std::to_string(K));
    for (const Weight& w : {packed, weight(as_it_is, WeightOrder::kInOut, K, N, true),
                            weight(held, WeightOrder::kInOut, K, N, true),
                            weight(b, WeightOrder::kInOut, K, N), weight(bt, WeightOrder::kOutIn, K, N)}) {
      for (const int threads : {1, 3}) {
        CHECK(same_bits(whole, in_pairs(a, w, M, threads)));
        CHECK(same_bits(whole, in_pairs(at, w, M, threads, true)));
      }
      for (const int64_t rows : {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 24, 36}) {
        const int64_t first = M - rows;
        const std::vector<float> some(a.begin() + first * K, a.end());
        const std::vector<float> expected(whole.begin() + first * N, whole.end());
        CHECK_MSG(same_bits(expected, in_pairs(some, w, rows)),
                  std::to_string(rows) + " rows alone, K=" + std::to_string(K));
      }
    }
  }
}

// Rows and columns are scaled by powers of two: those of an operand reach the result bit for bit, however
// large, small or different they are, whether or not squares are numbers.
DN_TEST(pairs_scale_rows_and_columns_exactly) {
  if (!has_pairs()) return;
  const int64_t M = 14, N = 65, K = 1160;
  Numbers numbers(73);
  const std::vector<float> a = numbers.vector(M * K), b = numbers.vector(K * N);
  const std::vector<float> out = in_pairs(a, b, M, N, K);
  for (const auto& [most_a, most_b] : {std::pair<int64_t, int64_t>{3, 12}, {20, 90}, {100, 20}, {60, 60}}) {
    std::vector<int> of_rows, of_columns;
    for (int64_t m = 0; m < M; ++m) of_rows.push_back(static_cast<int>(numbers.between(-most_a, most_a)));
    for (int64_t n = 0; n < N; ++n) of_columns.push_back(static_cast<int>(numbers.between(-most_b, most_b)));
    std::vector<float> rows = a, columns = b, expected = out;
    for (size_t i = 0; i < a.size(); ++i) rows[i] = std::ldexp(a[i], of_rows[i / static_cast<size_t>(K)]);
    for (size_t i = 0; i < b.size(); ++i)
      columns[i] = std::ldexp(b[i], of_columns[i % static_cast<size_t>(N)]);
    const std::vector<float> turned = transposed(columns, K, N), rows_t = transposed(rows, M, K);
    std::vector<float> panels(static_cast<size_t>(packed_elements(K, N)));
    pack_weight({1, Isa::kPortable}, panels.data(), weight(columns, WeightOrder::kInOut, K, N));
    for (size_t i = 0; i < out.size(); ++i) {
      expected[i] =
          std::ldexp(out[i], of_rows[i / static_cast<size_t>(N)] + of_columns[i % static_cast<size_t>(N)]);
    }
    for (const Weight& w :
         {weight(columns, WeightOrder::kInOut, K, N), weight(turned, WeightOrder::kOutIn, K, N),
          weight(panels, WeightOrder::kInOut, K, N, true)}) {
      CHECK_MSG(
          same_bits(expected, in_pairs(rows, w, M)) && same_bits(expected, in_pairs(rows_t, w, M, 2, true)),
          "rows times up to 2^" + std::to_string(most_a) + ", columns 2^" + std::to_string(most_b));
    }
  }
}

// A row or a column of zeros gives zeros, a row that is not finite NaN, and neither touches the others.
DN_TEST(pairs_of_zeros_and_of_what_is_not_finite) {
  if (!has_pairs()) return;
  const int64_t M = 15, N = 40, K = 500;
  Numbers numbers(74);
  std::vector<float> a = numbers.vector(M * K), b = numbers.vector(K * N);
  for (int64_t k = 0; k < K; ++k) b[static_cast<size_t>(k * N + 7)] = 0;
  const std::vector<float> before = in_pairs(a, b, M, N, K);
  for (int64_t k = 0; k < K; ++k) a[static_cast<size_t>(3 * K + k)] = 0;
  a[static_cast<size_t>(5 * K + 499)] = std::numeric_limits<float>::infinity();
  a[static_cast<size_t>(6 * K)] = std::numeric_limits<float>::quiet_NaN();
  const std::vector<float> out = in_pairs(a, b, M, N, K);
  for (int64_t m = 0; m < M; ++m) {
    for (int64_t n = 0; n < N; ++n) {
      const size_t i = static_cast<size_t>(m * N + n);
      if (m == 3 || (n == 7 && m != 5 && m != 6)) {
        CHECK(out[i] == 0);
      } else if ((m == 5 || m == 6) && n != 7) {
        CHECK(std::isnan(out[i]));
      } else if (m != 5 && m != 6) {
        CHECK(out[i] == before[i]);
      }
    }
  }
}

}  // namespace
