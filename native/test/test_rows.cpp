// Row and element ops on every instruction set against double-precision formulas, gradients against central
// finite differences of those formulas, bits over threads and batch composition; and the vector exp, log and
// GELU. Outputs start as NaN, so an element that is not written is a
// failure.
#include <algorithm>
#include <cstring>
#include <functional>
#include <limits>

#include "core/error.h"
#include "core/rng.h"
#include "cpu/ops.h"
#include "cpu/rows_kernels.h"
#include "test/check.h"

namespace dn::cpu {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

std::vector<Isa> isas() {
  std::vector<Isa> list{Isa::kPortable};
  if (detected_isa() >= Isa::kAvx2) list.push_back(Isa::kAvx2);
  if (detected_isa() >= Isa::kAvx512) list.push_back(Isa::kAvx512);
  return list;
}

using Floats = std::vector<float>;

// Uniform in [-2, 2).
Floats random_values(int64_t n, uint64_t seed) {
  Floats x(static_cast<size_t>(n));
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(4 * uniform(seed, Stream::kInit, 0, i) - 2);
  return x;
}

Tensor tensor(Floats& x, int64_t rows, int64_t cols) { return Tensor(x.data(), Dtype::kF32, rows, cols); }

bool same_bits(const Floats& a, const Floats& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

double gelu(double u) {
  return 0.5 * u * (1 + std::tanh(std::sqrt(2 / 3.14159265358979323846) * (u + 0.044715 * u * u * u)));
}

// One row of layer norm in double.
std::vector<double> layernorm(const std::vector<double>& x, const std::vector<double>& weight,
                              const std::vector<double>& bias, double* mean = nullptr,
                              double* rstd = nullptr) {
  const double C = static_cast<double>(x.size());
  double m = 0, v = 0;
  for (const double a : x) m += a / C;
  for (const double a : x) v += (a - m) * (a - m) / C;
  const double s = 1 / std::sqrt(v + 1e-5);
  std::vector<double> y(x.size());
  for (size_t c = 0; c < x.size(); ++c) y[c] = (x[c] - m) * s * weight[c] + bias[c];
  if (mean) *mean = m;
  if (rstd) *rstd = s;
  return y;
}

std::vector<double> row_of(const Floats& x, int64_t row, int64_t C) {
  return std::vector<double>(x.begin() + row * C, x.begin() + (row + 1) * C);
}

// d loss / d x[i] by central differences.
std::vector<double> slopes(std::vector<double> x,
                           const std::function<double(const std::vector<double>&)>& loss) {
  std::vector<double> slope(x.size());
  for (size_t i = 0; i < x.size(); ++i) {
    const double at = x[i], h = 1e-5;
    x[i] = at + h;
    const double up = loss(x);
    x[i] = at - h;
    slope[i] = (up - loss(x)) / (2 * h);
    x[i] = at;
  }
  return slope;
}

const int64_t kWidths[] = {1, 7, 8, 15, 16, 17, 33, 64, 100, 768, 1000};

}  // namespace

namespace {

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

DN_TEST(layernorm_forward_matches_double) {
  for (const int64_t C : kWidths) {
    for (const double offset : {0.0, 1000.0}) {
      const int64_t N = 5;
      Floats x = random_values(N * C, 1), weight = random_values(C, 2), bias = random_values(C, 3);
      for (float& a : x) a += static_cast<float>(offset);
      std::vector<double> want, want_mean(static_cast<size_t>(N)), want_rstd(static_cast<size_t>(N));
      for (int64_t n = 0; n < N; ++n) {
        const size_t i = static_cast<size_t>(n);
        const auto y = layernorm(row_of(x, n, C), row_of(weight, 0, C), row_of(bias, 0, C), &want_mean[i],
                                 &want_rstd[i]);
        want.insert(want.end(), y.begin(), y.end());
      }
      for (const Isa isa : isas()) {
        const std::string name =
            std::string(isa_name(isa)) + " C " + std::to_string(C) + " offset " + std::to_string(offset);
        Floats y(x.size(), kNan), mean(static_cast<size_t>(N), kNan), rstd(static_cast<size_t>(N), kNan);
        layernorm_forward({2, isa}, tensor(y, N, C), tensor(mean, N, 1), tensor(rstd, N, 1), tensor(x, N, C),
                          tensor(weight, 1, C), tensor(bias, 1, C));
        CHECK_CLOSE(y.data(), want.data(), N * C, 3e-6, name + " out");
        CHECK_CLOSE(mean.data(), want_mean.data(), N, 1e-6 + 1e-7 * offset, name + " mean");
        for (size_t i = 0; i < rstd.size(); ++i)
          CHECK(std::fabs(rstd[i] - want_rstd[i]) <= 1e-6 * want_rstd[i]);
        Floats again(x.size(), kNan);
        layernorm_forward({1, isa}, tensor(again, N, C), Tensor(), Tensor(), tensor(x, N, C),
                          tensor(weight, 1, C), tensor(bias, 1, C));
        CHECK_MSG(same_bits(y, again), name + ": differs without mean and rstd");
      }
    }
  }
}

DN_TEST(layernorm_backward_matches_finite_differences) {
  for (const int64_t C : {2, 7, 16, 33}) {
    const int64_t N = 3;
    Floats x = random_values(N * C, 1), weight = random_values(C, 2), bias = random_values(C, 3);
    Floats dout = random_values(N * C, 4), start = random_values(N * C, 5), wstart = random_values(C, 6);
    // loss = sum dout * LN(x), as a function of x, weight and bias in turn.
    const auto loss = [&](const std::vector<double>& xs, const std::vector<double>& w,
                          const std::vector<double>& b) {
      double sum = 0;
      for (int64_t n = 0; n < N; ++n) {
        const auto y = layernorm(std::vector<double>(xs.begin() + n * C, xs.begin() + (n + 1) * C), w, b);
        for (int64_t c = 0; c < C; ++c)
          sum += y[static_cast<size_t>(c)] * dout[static_cast<size_t>(n * C + c)];
      }
      return sum;
    };
    const std::vector<double> xd(x.begin(), x.end()), wd = row_of(weight, 0, C), bd = row_of(bias, 0, C);
    auto dx_want = slopes(xd, [&](const std::vector<double>& v) { return loss(v, wd, bd); });
    auto dw_want = slopes(wd, [&](const std::vector<double>& v) { return loss(xd, v, bd); });
    auto db_want = slopes(bd, [&](const std::vector<double>& v) { return loss(xd, wd, v); });
    for (size_t i = 0; i < dx_want.size(); ++i) dx_want[i] += start[i];
    for (size_t i = 0; i < dw_want.size(); ++i) dw_want[i] += wstart[i], db_want[i] += wstart[i];
    for (const Isa isa : isas()) {
      Floats y(x.size()), mean(static_cast<size_t>(N)), rstd(static_cast<size_t>(N));
      layernorm_forward({1, isa}, tensor(y, N, C), tensor(mean, N, 1), tensor(rstd, N, 1), tensor(x, N, C),
                        tensor(weight, 1, C), tensor(bias, 1, C));
      Floats dx = start, dw = wstart, db = wstart;
      layernorm_backward({2, isa}, tensor(dx, N, C), tensor(dw, 1, C), tensor(db, 1, C), tensor(dout, N, C),
                         tensor(x, N, C), tensor(weight, 1, C), tensor(mean, N, 1), tensor(rstd, N, 1));
      const std::string name = std::string(isa_name(isa)) + " C " + std::to_string(C);
      CHECK_CLOSE(dx.data(), dx_want.data(), N * C, 1e-5, name + " dinp");
      CHECK_CLOSE(dw.data(), dw_want.data(), C, 1e-5, name + " dweight");
      CHECK_CLOSE(db.data(), db_want.data(), C, 1e-5, name + " dbias");
    }
  }
}

DN_TEST(layernorm_bits_do_not_depend_on_threads_or_batch) {
  const int64_t N = 150, C = 100;
  Floats x = random_values(N * C, 1), weight = random_values(C, 2), bias = random_values(C, 3),
         dout = random_values(N * C, 4);
  for (const Isa isa : isas()) {
    Floats dx[3], dw[3], db[3], y[3];
    int i = 0;
    for (const int threads : {1, 2, 8}) {
      y[i].assign(x.size(), kNan);
      Floats mean(static_cast<size_t>(N)), rstd(static_cast<size_t>(N));
      layernorm_forward({threads, isa}, tensor(y[i], N, C), tensor(mean, N, 1), tensor(rstd, N, 1),
                        tensor(x, N, C), tensor(weight, 1, C), tensor(bias, 1, C));
      dx[i].assign(x.size(), 0);
      dw[i].assign(weight.size(), 0);
      db[i].assign(weight.size(), 0);
      layernorm_backward({threads, isa}, tensor(dx[i], N, C), tensor(dw[i], 1, C), tensor(db[i], 1, C),
                         tensor(dout, N, C), tensor(x, N, C), tensor(weight, 1, C), tensor(mean, N, 1),
                         tensor(rstd, N, 1));
      CHECK(same_bits(y[0], y[i]) && same_bits(dx[0], dx[i]) && same_bits(dw[0], dw[i]) &&
            same_bits(db[0], db[i]));
      ++i;
    }
    // Portable and vector gradients agree over more than one chunk of rows.
    static Floats portable_dw;
    if (isa == Isa::kPortable) portable_dw = dw[0];
    CHECK_CLOSE(dw[0].data(), portable_dw.data(), C, 1e-4, std::string(isa_name(isa)) + " dweight");
    Floats alone(static_cast<size_t>(C), kNan);
    layernorm_forward({1, isa}, tensor(alone, 1, C), Tensor(), Tensor(), tensor(x, N, C).slice(77, 1),
                      tensor(weight, 1, C), tensor(bias, 1, C));
    CHECK(std::memcmp(alone.data(), &y[0][static_cast<size_t>(77 * C)], alone.size() * sizeof(float)) == 0);
  }
}

DN_TEST(gelu_matches_double_and_its_slope) {
  const int64_t n = 4001;
  Floats u(static_cast<size_t>(n)), dout = random_values(n, 1);
  for (int64_t i = 0; i < n; ++i)
    u[static_cast<size_t>(i)] = static_cast<float>(-20 + 40.0 * static_cast<double>(i) / n);
  u[0] = -1e14f;
  u[1] = 1e14f;
  u[2] = 0;
  std::vector<double> want(u.size()), slope(u.size());
  for (size_t i = 0; i < u.size(); ++i) {
    const double at = u[i];
    want[i] = gelu(at);
    slope[i] = i < 2 ? (at > 0 ? 1 : 0) : (gelu(at + 1e-5) - gelu(at - 1e-5)) / 2e-5;
    slope[i] *= dout[i];
  }
  for (const Isa isa : isas()) {
    for (const int64_t cols : {n, n - 5, int64_t{17}, int64_t{3}}) {
      Floats y(u.size(), kNan), d = dout;
      gelu_forward({2, isa}, tensor(y, 1, cols), tensor(u, 1, cols));
      gelu_backward({2, isa}, tensor(d, 1, cols), tensor(d, 1, cols), tensor(u, 1, cols));
      for (size_t i = 0; i < static_cast<size_t>(cols); ++i) {
        CHECK_MSG(
            std::fabs(y[i] - want[i]) <= 3e-7 * (1 + std::fabs(want[i])),
            std::string(isa_name(isa)) + " gelu(" + std::to_string(u[i]) + ") = " + std::to_string(y[i]));
        CHECK_MSG(
            std::fabs(d[i] - slope[i]) <= 2e-6,
            std::string(isa_name(isa)) + " slope at " + std::to_string(u[i]) + " = " + std::to_string(d[i]));
      }
    }
  }
}

DN_TEST(gelu_respects_strides_and_neighbours) {
  Floats x = random_values(6 * 40, 1);
  for (const Isa isa : isas()) {
    Floats y(x.size(), 5.0f), whole(x.size(), kNan);
    gelu_forward({2, isa}, tensor(whole, 6, 40), tensor(x, 6, 40));
    gelu_forward({2, isa}, tensor(y, 6, 40).columns(3, 19), tensor(x, 6, 40).columns(3, 19));
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
  CHECK_THROWS(gelu_forward({1, Isa::kPortable}, tensor(y, 8, 8), tensor(x, 4, 16)), Code::kInternal,
               "(8, 8)");
}

}  // namespace dn::cpu
