// Products on the device against double precision: shapes around tiles and slices, both weight orders,
// epilogues, gradients, operands that tensor cores do not take; and that a row does not depend on how many
// there are.

#include "cuda/test/support.h"

namespace dn::cuda_test {
namespace {

double gelu(double u) {
  return 0.5 * u * (1 + std::tanh(std::sqrt(2 / 3.14159265358979323846) * (u + 0.044715 * u * u * u)));
}

struct Shape {
  int64_t M, K, N;
};

struct Case {
  Backend& device;
  Dtype dtype;
  Shape shape;
  Weight weight;
  Array w, inp, bias, extra, dout;
  Doubles x, W, g;  // W as (K, N)

  Case(Dtype type, Shape s, WeightOrder order)
      : device(backend(type)),
        dtype(type),
        shape(s),
        w(device, Dtype::kF32, s.K * s.N, 1, rounded(type, random_values(s.K * s.N, 1, 0.5f))),
        inp(device, type, s.M, s.K, random_values(s.M * s.K, 2)),
        bias(device, Dtype::kF32, 1, s.N, random_values(s.N, 3)),
        extra(device, type, s.M, s.N, random_values(s.M * s.N, 4)),
        dout(device, type, s.M, s.N, random_values(s.M * s.N, 5)),
        x(to_doubles(inp.host())),
        W(idx(s.K * s.N)),
        g(to_doubles(dout.host())) {
    weight.data = w.data();
    weight.order = order;
    weight.K = s.K;
    weight.N = s.N;
    for (int64_t k = 0; k < s.K; ++k) {
      for (int64_t n = 0; n < s.N; ++n)
        W[idx(k * s.N + n)] = w.host()[idx(order == WeightOrder::kInOut ? k * s.N + n : n * s.K + k)];
    }
  }
  // The device's products read bf16 copies; the reference must start from the same numbers.
  static std::vector<float> rounded(Dtype type, std::vector<float> v) {
    if (type == Dtype::kBF16)
      for (float& f : v) f = bf16_to_f32(f32_to_bf16(f));
    return v;
  }
  Doubles product() const {
    Doubles y(idx(shape.M * shape.N), 0);
    for (int64_t m = 0; m < shape.M; ++m) {
      for (int64_t k = 0; k < shape.K; ++k) {
        for (int64_t n = 0; n < shape.N; ++n)
          y[idx(m * shape.N + n)] += x[idx(m * shape.K + k)] * W[idx(k * shape.N + n)];
      }
    }
    return y;
  }
  std::string what(const char* part) const {
    return std::string(dtype_name(dtype)) + " " + part + " (" + std::to_string(shape.M) + ", " +
           std::to_string(shape.K) + ", " + std::to_string(shape.N) + ")" +
           (weight.order == WeightOrder::kInOut ? " in-out" : " out-in");
  }

  void check_forward() {
    const Doubles plain = product();
    for (const Epilogue epilogue : {Epilogue::kNone, Epilogue::kGelu, Epilogue::kResidual}) {
      Doubles expected = plain, pre;
      for (size_t i = 0; i < expected.size(); ++i)
        expected[i] += static_cast<double>(bias.host()[i % idx(shape.N)]);
      pre = expected;
      for (size_t i = 0; i < expected.size(); ++i) {
        if (epilogue == Epilogue::kGelu) expected[i] = gelu(expected[i]);
        if (epilogue == Epilogue::kResidual) expected[i] += static_cast<double>(extra.host()[i]);
      }
      Array out(device, dtype, shape.M, shape.N), before(device, dtype, shape.M, shape.N);
      const Tensor other = epilogue == Epilogue::kGelu ? before.tensor() : extra.tensor();
      device.matmul_forward(out.tensor(), inp.tensor(), weight, bias.tensor(), epilogue, other,
                            MatmulPrecision::kBF16);
      CHECK_ERROR(out.get(), expected, tolerance(dtype), what("forward"));
      if (epilogue == Epilogue::kGelu) CHECK_ERROR(before.get(), pre, tolerance(dtype), what("before gelu"));
    }
    Array out(device, dtype, shape.M, shape.N);
    device.matmul_forward(out.tensor(), inp.tensor(), weight, Tensor(), Epilogue::kNone, Tensor(),
                          MatmulPrecision::kFP32);
    CHECK_ERROR(out.get(), plain, tolerance(dtype), what("without bias"));
  }

  void check_backward() {
    const int64_t M = shape.M, K = shape.K, N = shape.N;
    const bool in_out = weight.order == WeightOrder::kInOut;
    Doubles dinp(idx(M * K), 0), dw(idx(K * N), 0.25), db(idx(N), -0.5);
    for (int64_t m = 0; m < M; ++m) {
      for (int64_t n = 0; n < N; ++n) {
        db[idx(n)] += g[idx(m * N + n)];
        for (int64_t k = 0; k < K; ++k) {
          dinp[idx(m * K + k)] += g[idx(m * N + n)] * W[idx(k * N + n)];
          dw[idx(in_out ? k * N + n : n * K + k)] += g[idx(m * N + n)] * x[idx(m * K + k)];
        }
      }
    }
    Array out(device, dtype, M, K);
    Array dweight(device, Dtype::kF32, in_out ? K : N, in_out ? N : K, std::vector<float>(idx(K * N), 0.25f));
    Array dbias(device, Dtype::kF32, 1, N, std::vector<float>(idx(N), -0.5f));
    device.matmul_backward(out.tensor(), dweight.tensor(), dbias.tensor(), dout.tensor(), inp.tensor(),
                           weight, MatmulPrecision::kBF16, Store::kAdd);
    CHECK_ERROR(out.get(), dinp, tolerance(dtype), what("dinp"));
    // fp32 sums of products of bf16 numbers: exact inputs, so as good as fp32.
    CHECK_ERROR(dweight.get(), dw, 1e-5, what("dweight"));
    CHECK_ERROR(dbias.get(), db, 1e-5, what("dbias"));
    device.matmul_backward(Tensor(), dweight.tensor(), Tensor(), dout.tensor(), inp.tensor(), weight,
                           MatmulPrecision::kBF16, Store::kSet);
    for (double& sum : dw) sum -= 0.25;
    CHECK_ERROR(dweight.get(), dw, 1e-5, what("dweight, set"));
  }
};

DN_TEST(cuda_products_bf16) {
  for (const WeightOrder order : {WeightOrder::kInOut, WeightOrder::kOutIn}) {
    for (const Shape s :
         {Shape{1, 8, 8}, Shape{7, 16, 24}, Shape{64, 32, 64}, Shape{65, 72, 136}, Shape{200, 40, 72}}) {
      emulate_seed(static_cast<uint64_t>(s.M));
      Case c(Dtype::kBF16, s, order);
      c.check_forward();
      c.check_backward();
    }
  }
}

// Enough blocks of 128 x 128 to be taken.
DN_TEST(cuda_products_large_blocks) {
  for (const WeightOrder order : {WeightOrder::kInOut, WeightOrder::kOutIn}) {
    Case c(Dtype::kBF16, {260, 136, 264}, order);
    c.check_forward();
    c.check_backward();
  }
}

DN_TEST(cuda_products_not_aligned) {
  for (const WeightOrder order : {WeightOrder::kInOut, WeightOrder::kOutIn}) {
    for (const Shape s : {Shape{5, 7, 9}, Shape{70, 33, 65}, Shape{3, 8, 13}, Shape{9, 13, 8}}) {
      Case(Dtype::kBF16, s, order).check_forward();
      Case(Dtype::kBF16, s, order).check_backward();
    }
  }
}

DN_TEST(cuda_products_fp32) {
  for (const WeightOrder order : {WeightOrder::kInOut, WeightOrder::kOutIn}) {
    for (const Shape s : {Shape{1, 1, 1}, Shape{7, 16, 24}, Shape{65, 70, 67}}) {
      Case c(Dtype::kF32, s, order);
      c.check_forward();
      c.check_backward();
    }
  }
}

// Few rows take small blocks, many rows large ones.
DN_TEST(cuda_products_rows_do_not_depend_on_the_batch) {
  Case many(Dtype::kBF16, {260, 64, 264}, WeightOrder::kInOut);
  Array all(many.device, Dtype::kBF16, 260, 264), few(many.device, Dtype::kBF16, 3, 264);
  many.device.matmul_forward(all.tensor(), many.inp.tensor(), many.weight, many.bias.tensor(),
                             Epilogue::kNone, Tensor(), MatmulPrecision::kBF16);
  many.device.matmul_forward(few.tensor(), many.inp.tensor().slice(129, 3), many.weight, many.bias.tensor(),
                             Epilogue::kNone, Tensor(), MatmulPrecision::kBF16);
  const std::vector<float> a = all.get(), b = few.get();
  CHECK_ERROR(b, to_doubles(std::vector<float>(a.begin() + 129 * 264, a.begin() + 132 * 264)),
              rows_are_exact() ? 0 : tolerance(Dtype::kBF16), "rows 129 to 131");
}

// The optimiser rewrites the bf16 copy that products read, everything else marks it stale.
DN_TEST(cuda_products_follow_their_weights) {
  Backend& device = backend(Dtype::kBF16);
  Array w(device, Dtype::kF32, 8, 8, std::vector<float>(64, 1.0f)),
      grad(device, Dtype::kF32, 8, 8, std::vector<float>(64, 1.0f));
  Array m(device, Dtype::kF32, 8, 8, std::vector<float>(64, 0.0f)),
      v(device, Dtype::kF32, 8, 8, std::vector<float>(64, 0.0f));
  Array inp(device, Dtype::kBF16, 1, 8, std::vector<float>(8, 1.0f)), out(device, Dtype::kBF16, 1, 8);
  Weight weight;
  weight.data = w.data();
  weight.K = weight.N = 8;
  const auto result = [&] {
    device.matmul_forward(out.tensor(), inp.tensor(), weight, Tensor(), Epilogue::kNone, Tensor(),
                          MatmulPrecision::kBF16);
    return out.get()[3];
  };
  CHECK(result() == 8);
  w.set(std::vector<float>(64, 2.0f));
  CHECK(result() == 16);
  AdamWStep step;
  step.learning_rate = 1;
  step.eps = 0;
  device.adamw(w.data(), grad.data(), m.data(), v.data(), 64, step);  // every weight falls by 1
  CHECK(std::fabs(result() - 8) < 0.1);
  CHECK(std::fabs(w.get()[63] - 1) < 1e-3);
  device.zero(w.data(), 64 * sizeof(float));
  CHECK(result() == 0);
}

}  // namespace
}  // namespace dn::cuda_test
