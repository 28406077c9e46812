// Element ops, embeddings and the optimiser on every instruction set against double-precision formulas, bits
// over threads; the vector exp, log and GELU; and the shapes that ops of rows refuse. Outputs start as NaN,
// so an element that is not written is a failure. Layer norm: test_layernorm.cpp.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "core/error.h"
#include "cpu/ops.h"
#include "cpu/rows_kernels.h"
#include "test/check.h"
#include "test/row_values.h"

namespace dn::cpu {
namespace {

using namespace dn::test::rows;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

double gelu(double u) {
  return 0.5 * u * (1 + std::tanh(std::sqrt(2 / 3.14159265358979323846) * (u + 0.044715 * u * u * u)));
}

// The worst error of f over [low, high], in units in the last place of the exact result.
double worst_ulp(void (*f)(float*, const float*, int64_t), double (*exact)(double), double low, double high) {
  const int64_t n = 200003;
  Floats x(static_cast<size_t>(n)), y(x.size(), kNan);
  for (int64_t i = 0; i < n; ++i) {
    x[static_cast<size_t>(i)] =
        static_cast<float>(low + (high - low) * static_cast<double>(i) / static_cast<double>(n));
  }
  f(y.data(), x.data(), n);
  double worst = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    const double want = exact(x[i]);
    int exponent = 0;
    std::frexp(want, &exponent);
    const double ulp = std::ldexp(1.0, std::max(exponent - 24, -149));
    const double error = std::fabs(y[i] - want) / ulp;
    if (std::isnan(error)) return HUGE_VAL;
    worst = std::max(worst, error);
  }
  return worst;
}

struct AccuracyCase {
  const char* name;
  void (*RowsKernels::*f)(float*, const float*, int64_t);
  double (*exact)(double);
  double low, high, allowed;
};

}  // namespace

DN_TEST(vector_functions_are_accurate_over_their_range) {
  const auto exp = [](double x) { return std::exp(x); };
  const auto log = [](double x) { return std::log(x); };
  const auto exp2 = [](double x) { return std::exp2(x); };
  const AccuracyCase cases[] = {{"exp", &RowsKernels::exp, exp, -103.9, 88.72, 1.1},
                                {"exp", &RowsKernels::exp, exp, -1, 1, 1.0},
                                {"exp", &RowsKernels::exp, exp, -103.9, -87, 1.1},
                                {"softmax_exp", &RowsKernels::softmax_exp, exp, -86.9, 80, 1.1},
                                {"log", &RowsKernels::log, log, 1e-45, 1e-37, 1.0},
                                {"log", &RowsKernels::log, log, 1e-30, 2, 1.1},
                                {"log", &RowsKernels::log, log, 0.9, 1.1, 1.1},
                                {"log", &RowsKernels::log, log, 1, 1e6, 1.0},
                                {"log", &RowsKernels::log, log, 1e30, 3.4e38, 1.0},
                                {"softmax_exp2", &RowsKernels::softmax_exp2, exp2, -125.9, 127.4, 2.1},
                                {"softmax_exp2", &RowsKernels::softmax_exp2, exp2, -1, 1, 2.1}};
  std::vector<const RowsKernels*> tables{&kRowsPortable};
#if defined(__x86_64__) || defined(_M_X64)
  if (detected_isa() >= Isa::kAvx2) tables.push_back(&kRowsAvx2);
  if (detected_isa() >= Isa::kAvx512) tables.push_back(&kRowsAvx512);
#endif
  for (const RowsKernels* table : tables) {
    for (const AccuracyCase& c : cases) {
      const double worst = worst_ulp(table->*c.f, c.exact, c.low, c.high);
      CHECK_MSG(worst <= c.allowed, std::string(c.name) + " on [" + std::to_string(c.low) + ", " +
                                        std::to_string(c.high) + "]: " + std::to_string(worst) + " ulp");
    }
    const float special[8] = {0, -kInfinity, kInfinity, kNan, -1, -0.0f, -200, 1};
    float y[8];
    table->exp(y, special, 8);
    CHECK(y[0] == 1 && y[1] == 0 && y[2] == kInfinity && std::isnan(y[3]) && y[5] == 1 && y[6] == 0);
    table->softmax_exp(y, special, 8);
    CHECK(y[0] == 1 && y[1] == 0 && std::isnan(y[3]) && y[5] == 1 && y[6] == 0);
    table->log(y, special, 8);
    CHECK(y[0] == -kInfinity && y[2] == kInfinity && std::isnan(y[3]) && std::isnan(y[4]) &&
          y[5] == -kInfinity && y[7] == 0);
    table->softmax_exp2(y, special, 8);
    CHECK(y[0] == 1 && y[1] == 0 && std::isnan(y[3]) && y[4] == 0.5f && y[5] == 1 && y[6] == 0);
    // NaN with any payload, of both signs.
    const uint32_t patterns[8] = {0x7fc00000, 0xffc00000, 0x7fffffff, 0xffffffff,
                                  0x7fc00001, 0x7fc001ff, 0xffc00100, 0x7fc12345};
    float nans[8];
    std::memcpy(nans, patterns, sizeof nans);
    for (const auto f : {table->exp, table->softmax_exp, table->softmax_exp2, table->log}) {
      f(y, nans, 8);
      CHECK(std::all_of(y, y + 8, [](float value) { return std::isnan(value); }));
    }
  }
}

DN_TEST(gelu_backward_matches_double) {
  const int64_t n = 4001;
  Floats u(static_cast<size_t>(n)), dout = random_values(n, 1);
  for (int64_t i = 0; i < n; ++i)
    u[static_cast<size_t>(i)] = static_cast<float>(-20 + 40.0 * static_cast<double>(i) / n);
  u[0] = -1e14f;
  u[1] = 1e14f;
  u[2] = 0;
  std::vector<double> slope(u.size());
  for (size_t i = 0; i < u.size(); ++i) {
    const double at = u[i];
    slope[i] = i < 2 ? (at > 0 ? 1 : 0) : (gelu(at + 1e-5) - gelu(at - 1e-5)) / 2e-5;
    slope[i] *= dout[i];
  }
  for (const Isa isa : isas()) {
    for (const int64_t cols : {n, n - 5, int64_t{17}, int64_t{3}}) {
      Floats d = dout;
      gelu_backward({2, isa}, tensor(d, 1, cols), tensor(d, 1, cols), tensor(u, 1, cols));
      for (size_t i = 0; i < static_cast<size_t>(cols); ++i) {
        CHECK_MSG(
            std::fabs(d[i] - slope[i]) <= 2e-6,
            std::string(isa_name(isa)) + " slope at " + std::to_string(u[i]) + " = " + std::to_string(d[i]));
      }
    }
  }
}

DN_TEST(gelu_backward_respects_strides_and_neighbours) {
  Floats x = random_values(6 * 40, 1), dout = random_values(6 * 40, 2);
  for (const Isa isa : isas()) {
    Floats y(x.size(), 5.0f), whole(x.size(), kNan);
    gelu_backward({2, isa}, tensor(whole, 6, 40), tensor(dout, 6, 40), tensor(x, 6, 40));
    gelu_backward({2, isa}, tensor(y, 6, 40).columns(3, 19), tensor(dout, 6, 40).columns(3, 19),
                  tensor(x, 6, 40).columns(3, 19));
    for (size_t i = 0; i < y.size(); ++i) {
      const size_t column = i % 40;
      CHECK(y[i] == (column >= 3 && column < 22 ? whole[i] : 5.0f));
    }
  }
}

DN_TEST(embedding_forward_and_backward) {
  const int64_t N = 90, V = 11, P = 40, C = 150;
  Floats wte = random_values(V * C, 1), wpe = random_values(P * C, 2), dout = random_values(N * C, 3);
  std::vector<int32_t> ids, positions;
  for (int32_t n = 0; n < N; ++n) {
    ids.push_back(n % 7 == 0 ? 10 : (n * 5) % 11);
    positions.push_back(n % 40);
  }
  Weight w;
  w.data = wte.data();
  w.order = WeightOrder::kOutIn;
  w.K = C;
  w.N = V;
  Floats dwte_start = random_values(V * C, 4), dwpe_start = random_values(P * C, 5);
  // The order of additions is token order: the same sums, one after the other in fp32.
  Floats dwte_want = dwte_start, dwpe_want = dwpe_start;
  for (int64_t n = 0; n < N; ++n) {
    for (int64_t c = 0; c < C; ++c) {
      dwte_want[static_cast<size_t>(ids[static_cast<size_t>(n)] * C + c)] +=
          dout[static_cast<size_t>(n * C + c)];
      dwpe_want[static_cast<size_t>(positions[static_cast<size_t>(n)] * C + c)] +=
          dout[static_cast<size_t>(n * C + c)];
    }
  }
  for (const Isa isa : isas()) {
    for (const int threads : {1, 2, 8}) {
      Floats out(static_cast<size_t>(N * C), kNan);
      embedding_forward({threads, isa}, tensor(out, N, C), ids.data(), positions.data(), w,
                        tensor(wpe, P, C));
      for (int64_t i = 0; i < N * C; ++i) {
        const size_t n = static_cast<size_t>(i / C);
        CHECK(out[static_cast<size_t>(i)] == wte[static_cast<size_t>(ids[n] * C + i % C)] +
                                                 wpe[static_cast<size_t>(positions[n] * C + i % C)]);
      }
      Floats dwte = dwte_start, dwpe = dwpe_start;
      embedding_backward({threads, isa}, tensor(dwte, V, C), tensor(dwpe, P, C), tensor(dout, N, C),
                         ids.data(), positions.data());
      CHECK(same_bits(dwte, dwte_want) && same_bits(dwpe, dwpe_want));
    }
  }
}

DN_TEST(adamw_follows_the_formula) {
  const int64_t n = 20011;
  Floats start = random_values(n, 1), gradients = random_values(n, 2);
  AdamWStep step;
  step.learning_rate = 1e-2f;
  step.beta1 = 0.9f;
  step.beta2 = 0.95f;
  step.weight_decay = 0.1f;
  step.gradient_scale = 0.5f;
  std::vector<double> p(start.begin(), start.end()), m(start.size(), 0), v(start.size(), 0);
  for (int t = 1; t <= 3; ++t) {
    for (size_t i = 0; i < p.size(); ++i) {
      const double g = 0.5 * static_cast<double>(gradients[i]) * t;
      m[i] = 0.9 * m[i] + 0.1 * g;
      v[i] = 0.95 * v[i] + 0.05 * g * g;
      p[i] -= 1e-2 * 0.1 * p[i];
      p[i] -= 1e-2 * (m[i] / (1 - std::pow(0.9, t))) / (std::sqrt(v[i] / (1 - std::pow(0.95, t))) + 1e-8);
    }
  }
  for (const Isa isa : isas()) {
    Floats first;
    for (const int threads : {1, 2, 8}) {
      Floats params = start, fm(start.size(), 0), fv(start.size(), 0);
      for (int t = 1; t <= 3; ++t) {
        Floats g = gradients;
        for (float& x : g) x *= static_cast<float>(t);
        step.step = t;
        adamw({threads, isa}, params.data(), g.data(), fm.data(), fv.data(), n, step);
      }
      CHECK_CLOSE(params.data(), p.data(), n, 1e-6, std::string(isa_name(isa)) + " params");
      CHECK_CLOSE(fm.data(), m.data(), n, 1e-6, std::string(isa_name(isa)) + " m");
      CHECK_CLOSE(fv.data(), v.data(), n, 1e-6, std::string(isa_name(isa)) + " v");
      if (threads == 1) first = params;
      CHECK(same_bits(first, params));
    }
  }
}

DN_TEST(sum_of_squares_is_exact_enough_and_propagates) {
  for (const int64_t n : {0, 1, 7, 17, 16384, 16385, 100003}) {
    Floats x = random_values(n, 1);
    if (n > 1) x[1] = 1e25f;  // its square is beyond fp32
    double want = 0;
    for (const float a : x) want += static_cast<double>(a) * static_cast<double>(a);
    for (const Isa isa : isas()) {
      const double one = sum_of_squares({1, isa}, x.data(), n);
      CHECK(std::fabs(one - want) <= 1e-12 * want);
      CHECK(sum_of_squares({2, isa}, x.data(), n) == one && sum_of_squares({8, isa}, x.data(), n) == one);
      if (n < 17) continue;
      Floats bad = x;
      bad[static_cast<size_t>(n - 1)] = kNan;
      CHECK(std::isnan(sum_of_squares({2, isa}, bad.data(), n)));
      bad[static_cast<size_t>(n - 1)] = -kInfinity;
      CHECK(std::isinf(sum_of_squares({2, isa}, bad.data(), n)));
    }
  }
}

// Every byte asked for and none beside, from any start; from 16 MB on stores go past the caches.
DN_TEST(zero_clears_what_it_is_told) {
  std::vector<char> memory(size_t{17} << 20);
  for (const Isa isa : isas()) {
    for (const size_t begin : {size_t{0}, size_t{4}, size_t{60}}) {
      for (const size_t bytes : {size_t{0}, size_t{5}, size_t{1000}, (size_t{16} << 20) + 7}) {
        std::fill(memory.begin(), memory.end(), char{1});
        zero({2, isa}, memory.data() + begin, bytes);
        const size_t kept = static_cast<size_t>(std::count(memory.begin(), memory.end(), char{1}));
        CHECK(kept == memory.size() - bytes);
        CHECK(std::count(memory.begin() + static_cast<ptrdiff_t>(begin),
                         memory.begin() + static_cast<ptrdiff_t>(begin + bytes),
                         char{0}) == static_cast<ptrdiff_t>(bytes));
      }
    }
  }
}

DN_TEST(rows_reject_wrong_shapes) {
  Floats x(64), y(64), w(16);
  CHECK_THROWS(layernorm_forward({1, Isa::kPortable}, tensor(y, 4, 16), Tensor(), Tensor(), tensor(x, 4, 16),
                                 tensor(w, 1, 8), tensor(w, 1, 16)),
               Code::kInternal, "weight");
  CHECK_THROWS(gelu_backward({1, Isa::kPortable}, tensor(y, 8, 8), tensor(x, 4, 16), tensor(x, 4, 16)),
               Code::kInternal, "(8, 8)");
}

}  // namespace dn::cpu
