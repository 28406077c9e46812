// Layer norm on every instruction set against its formula in double, gradients against central finite
// differences of that formula, bits over threads and batch composition. Outputs start as NaN, so an element
// that is not written is a failure.
#include <cmath>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "cpu/ops.h"
#include "test/check.h"
#include "test/row_values.h"

namespace dn::cpu {
namespace {

using namespace dn::test::rows;

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

}  // namespace dn::cpu
