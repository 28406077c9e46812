// Layer norm, GELU, embedding, AdamW and the sum of squares on the device against double precision.

#include "cuda/test/support.h"

namespace dn::cuda_test {
namespace {

constexpr Dtype kDtypes[] = {Dtype::kBF16, Dtype::kF32};

void check_layernorm(Dtype dtype, int64_t N, int64_t C) {
  Backend& device = backend(dtype);
  const std::string what =
      std::string(dtype_name(dtype)) + " layer norm (" + std::to_string(N) + ", " + std::to_string(C) + ")";
  std::vector<float> values = random_values(N * C, 1);
  for (float& x : values) x += 3;  // a mean that cancels
  Array inp(device, dtype, N, C, values), weight(device, Dtype::kF32, 1, C, random_values(C, 2));
  Array bias(device, Dtype::kF32, 1, C, random_values(C, 3)),
      dout(device, dtype, N, C, random_values(N * C, 4));
  Array out(device, dtype, N, C), mean(device, Dtype::kF32, N, 1), rstd(device, Dtype::kF32, N, 1);
  Array dinp(device, dtype, N, C, random_values(N * C, 5)),
      dweight(device, Dtype::kF32, 1, C, random_values(C, 6));
  Array dbias(device, Dtype::kF32, 1, C, random_values(C, 7));
  Doubles y(idx(N * C)), means(idx(N)), rstds(idx(N)), dx = to_doubles(dinp.host());
  Doubles dw = to_doubles(dweight.host()), db = to_doubles(dbias.host());
  for (int64_t n = 0; n < N; ++n) {
    const float* x = inp.host().data() + n * C;
    const float* g = dout.host().data() + n * C;
    double m = 0, variance = 0, sum = 0, product = 0;
    for (int64_t c = 0; c < C; ++c) m += static_cast<double>(x[c]) / static_cast<double>(C);
    for (int64_t c = 0; c < C; ++c) variance += (x[c] - m) * (x[c] - m) / static_cast<double>(C);
    const double s = 1 / std::sqrt(variance + 1e-5);
    means[idx(n)] = m;
    rstds[idx(n)] = s;
    for (int64_t c = 0; c < C; ++c) {
      const double norm = (x[c] - m) * s, w = weight.host()[idx(c)];
      y[idx(n * C + c)] = norm * w + static_cast<double>(bias.host()[idx(c)]);
      sum += g[c] * w / static_cast<double>(C);
      product += g[c] * w * norm / static_cast<double>(C);
      dw[idx(c)] += g[c] * norm;
      db[idx(c)] += static_cast<double>(g[c]);
    }
    for (int64_t c = 0; c < C; ++c)
      dx[idx(n * C + c)] +=
          s * (g[c] * static_cast<double>(weight.host()[idx(c)]) - sum - (x[c] - m) * s * product);
  }
  device.layernorm_forward(out.tensor(), mean.tensor(), rstd.tensor(), inp.tensor(), weight.tensor(),
                           bias.tensor());
  device.layernorm_backward(dinp.tensor(), dweight.tensor(), dbias.tensor(), dout.tensor(), inp.tensor(),
                            weight.tensor(), mean.tensor(), rstd.tensor());
  CHECK_ERROR(out.get(), y, tolerance(dtype), what);
  CHECK_ERROR(mean.get(), means, 1e-5, what + ", mean");
  CHECK_ERROR(rstd.get(), rstds, 1e-5, what + ", rstd");
  CHECK_ERROR(dinp.get(), dx, tolerance(dtype), what + ", dinp");
  CHECK_ERROR(dweight.get(), dw, 2e-5, what + ", dweight");
  CHECK_ERROR(dbias.get(), db, 2e-5, what + ", dbias");
  // At inference nobody reads the statistics.
  Array again(device, dtype, N, C);
  device.layernorm_forward(again.tensor(), Tensor(), Tensor(), inp.tensor(), weight.tensor(), bias.tensor());
  CHECK(again.get() == out.get());
}

DN_TEST(cuda_layernorm) {
  for (const Dtype dtype : kDtypes) {
    for (const int64_t N : {1, 7, 64, 65, 200}) check_layernorm(dtype, N, 40);
    for (const int64_t C : {1, 13, 64, 200, 768}) check_layernorm(dtype, 9, C);
  }
}

DN_TEST(cuda_gelu_backward) {
  for (const Dtype dtype : kDtypes) {
    for (const int64_t C : {1, 7, 64, 65, 200}) {
      Backend& device = backend(dtype);
      Array inp(device, dtype, 3, C, random_values(3 * C, 1, 2)),
          dout(device, dtype, 3, C, random_values(3 * C, 2));
      Doubles dx;
      for (size_t i = 0; i < idx(3 * C); ++i) {
        const double u = inp.host()[i], a = std::sqrt(2 / 3.14159265358979323846);
        const double t = std::tanh(a * (u + 0.044715 * u * u * u));
        dx.push_back(dout.host()[i] *
                     (0.5 * (1 + t) + 0.5 * u * (1 - t * t) * a * (1 + 3 * 0.044715 * u * u)));
      }
      device.gelu_backward(dout.tensor(), dout.tensor(), inp.tensor());  // in place
      CHECK_ERROR(dout.get(), dx, tolerance(dtype), std::string(dtype_name(dtype)) + " gelu backward");
    }
  }
}

// One id in most rows, as the mask token is; ids that never occur; the same bits in every run.
DN_TEST(cuda_embedding) {
  for (const Dtype dtype : kDtypes) {
    Backend& device = backend(dtype);
    const int64_t N = 700, V = 23, P = 50, C = 19;
    std::vector<int32_t> ids, positions;
    for (int64_t n = 0; n < N; ++n) {
      ids.push_back(n % 5 ? 7 : static_cast<int32_t>(n * 13 % (V - 2)));
      positions.push_back(static_cast<int32_t>(n % P));
    }
    Array wte(device, Dtype::kF32, V, C, random_values(V * C, 1)),
        wpe(device, Dtype::kF32, P, C, random_values(P * C, 2));
    Array out(device, dtype, N, C), dout(device, dtype, N, C, random_values(N * C, 3));
    Array dwte(device, Dtype::kF32, V, C, random_values(V * C, 4)),
        dwpe(device, Dtype::kF32, P, C, random_values(P * C, 5));
    Doubles y(idx(N * C)), dw = to_doubles(dwte.host()), dp = to_doubles(dwpe.host());
    for (int64_t n = 0; n < N; ++n) {
      for (int64_t c = 0; c < C; ++c) {
        const int64_t t = ids[idx(n)] * C + c, p = positions[idx(n)] * C + c;
        y[idx(n * C + c)] = static_cast<double>(wte.host()[idx(t)]) + static_cast<double>(wpe.host()[idx(p)]);
        dw[idx(t)] += static_cast<double>(dout.host()[idx(n * C + c)]);
        dp[idx(p)] += static_cast<double>(dout.host()[idx(n * C + c)]);
      }
    }
    Weight head;
    head.data = wte.data();
    head.order = WeightOrder::kOutIn;
    head.K = C;
    head.N = V;
    device.embedding_forward(out.tensor(), ids.data(), positions.data(), head, wpe.tensor());
    CHECK_ERROR(out.get(), y, tolerance(dtype), std::string(dtype_name(dtype)) + " embedding");
    device.embedding_backward(dwte.tensor(), dwpe.tensor(), dout.tensor(), ids.data(), positions.data());
    CHECK_ERROR(dwte.get(), dw, 1e-5, std::string(dtype_name(dtype)) + " dwte");
    CHECK_ERROR(dwpe.get(), dp, 1e-5, std::string(dtype_name(dtype)) + " dwpe");
    Array again(device, Dtype::kF32, V, C, dwte.host());
    device.embedding_backward(again.tensor(), dwpe.tensor(), dout.tensor(), ids.data(), positions.data());
    CHECK(again.get() == dwte.get());
  }
}

DN_TEST(cuda_adamw_segments) {
  Backend& device = backend(Dtype::kF32);
  const int64_t sizes[] = {1, 1024, 1300, 3};
  int64_t total = 0;
  for (const int64_t n : sizes) total += n;
  Array p(device, Dtype::kF32, 1, total, random_values(total, 1)),
      g(device, Dtype::kF32, 1, total, random_values(total, 2));
  Array m(device, Dtype::kF32, 1, total, random_values(total, 3, 0.1f)), v(device, Dtype::kF32, 1, total);
  std::vector<float> second = random_values(total, 4);
  for (float& x : second) x *= x;
  v.set(second);
  Doubles ep, em, ev;
  AdamWStep step;
  step.learning_rate = 0.01f;
  step.gradient_scale = 0.7f;
  step.step = 3;
  int64_t at = 0;
  for (size_t s = 0; s < 4; ++s) {
    step.weight_decay = s % 2 ? 0.1f : 0.0f;
    device.adamw(static_cast<float*>(p.data()) + at, static_cast<float*>(g.data()) + at,
                 static_cast<float*>(m.data()) + at, static_cast<float*>(v.data()) + at, sizes[s], step);
    for (int64_t i = at; i < at + sizes[s]; ++i) {
      const double lr = step.learning_rate, b1 = step.beta1, b2 = step.beta2;
      const double grad = static_cast<double>(g.host()[idx(i)]) * static_cast<double>(step.gradient_scale);
      em.push_back(b1 * static_cast<double>(m.host()[idx(i)]) + (1 - b1) * grad);
      ev.push_back(b2 * static_cast<double>(v.host()[idx(i)]) + (1 - b2) * grad * grad);
      const double mean = em.back() / (1 - std::pow(b1, 3)), square = ev.back() / (1 - std::pow(b2, 3));
      const double param = p.host()[idx(i)];
      ep.push_back(param - lr * static_cast<double>(step.weight_decay) * param -
                   lr * mean / (std::sqrt(square) + 1e-8));
    }
    at += sizes[s];
  }
  CHECK_ERROR(m.get(), em, 1e-6, "first moments");
  CHECK_ERROR(v.get(), ev, 1e-6, "second moments");
  CHECK_ERROR(p.get(), ep, 1e-6, "parameters");
}

DN_TEST(cuda_sum_of_squares) {
  Backend& device = backend(Dtype::kF32);
  for (const int64_t n : {1, 7, 256, 20000, 40001}) {
    Array x(device, Dtype::kF32, 1, n, random_values(n, 1));
    double expected = 0;
    for (const float f : x.host()) expected += static_cast<double>(f) * static_cast<double>(f);
    CHECK(std::fabs(device.sum_of_squares(x.data(), n) - expected) <= 1e-12 * expected);
  }
  Array bad(device, Dtype::kF32, 1, 3, {1, kNan, 2});
  CHECK(std::isnan(device.sum_of_squares(bad.data(), 3)));
}

// Small copies wait for the next op; what reads another one's result must not run beside it.
DN_TEST(cuda_copies) {
  for (const Dtype dtype : kDtypes) {
    Backend& device = backend(dtype);
    const int64_t rows = 40, cols = 24;
    Array a(device, dtype, rows, cols, random_values(rows * cols, 1)), b(device, dtype, rows, cols);
    Array c(device, dtype, rows, cols),
        wide(device, dtype, rows, 3 * cols, random_values(rows * 3 * cols, 2));
    for (int64_t r = 0; r < rows; ++r) device.copy(b.tensor().slice(r, 1), a.tensor().slice(rows - 1 - r, 1));
    for (int64_t r = 0; r < rows; ++r)
      device.copy(c.tensor().slice(r, 1), b.tensor().slice(r, 1));  // a chain
    device.copy(b.tensor().slice(3, 2),
                wide.tensor().columns(cols, cols).slice(7, 2));  // strided, and over the chain's source
    device.copy(a.tensor().slice(0, 1), a.tensor().slice(39, 1));
    const std::vector<float> got_b = b.get(), got_c = c.get(), got_a = a.get();
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t col = 0; col < cols; ++col) {
        const float reversed = a.host()[idx((rows - 1 - r) * cols + col)];
        CHECK(got_c[idx(r * cols + col)] == reversed);
        CHECK(got_b[idx(r * cols + col)] ==
              (r == 3 || r == 4 ? wide.host()[idx((r + 4) * 3 * cols + cols + col)] : reversed));
        CHECK(got_a[idx(r * cols + col)] == a.host()[idx((r == 0 ? 39 : r) * cols + col)]);
      }
    }
    // Too large to wait.
    const int64_t n = 40000;
    Array x(device, Dtype::kF32, 2, n, random_values(2 * n, 3)), y(device, Dtype::kF32, 2, n);
    device.copy(y.tensor().columns(0, n - 1), x.tensor().columns(1, n - 1));
    CHECK(y.get()[idx(n)] == x.host()[idx(n + 1)]);
    CHECK(std::isnan(y.get()[idx(n - 1)]));
  }
}

}  // namespace
}  // namespace dn::cuda_test
