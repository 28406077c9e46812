// The matrix products against fp64, against each other and against themselves: every instruction set this
// machine has, every layout, precision and thread count.

#include <algorithm>
#include <cstring>
#include <string>
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

// Forward without epilogue through every weight layout: within the error, and the same bits in all of them.
void check_forward(int64_t M, int64_t N, int64_t K, uint64_t seed) {
  Numbers numbers(seed);
  std::vector<float> a = numbers.vector(M * K), b = numbers.vector(K * N);
  const std::vector<float> bt = transposed(b, K, N);
  const Reference ref = reference(a, b, M, N, K);
  for (const Isa isa : isas()) {
    const Cpu cpu{2, isa};
    const std::string what = label(isa, M, N, K);
    std::vector<float> first;
    for (const WeightOrder order : {WeightOrder::kInOut, WeightOrder::kOutIn}) {
      const Weight plain = weight(order == WeightOrder::kInOut ? b : bt, order, K, N);
      std::vector<float> panels(static_cast<size_t>(packed_elements(K, N)), 7.0f);
      pack_weight(cpu, panels.data(), plain);
      for (const Weight& w : {plain, weight(panels, order, K, N, true)}) {
        std::vector<float> out(static_cast<size_t>(M * N), 3.0f);
        matmul_forward(cpu, matrix(out, M, N), matrix(a, M, K), w, {}, Epilogue::kNone, {},
                       MatmulPrecision::kFP32);
        if (first.empty()) {
          first = out;
          check_product(ref, out, what);
        }
        CHECK_MSG(same_bits(first, out), what + ": the bits depend on how the weight is stored");
      }
    }
  }
}

void check_backward(Isa isa, WeightOrder order, int64_t M, int64_t N, int64_t K, uint64_t seed) {
  Numbers numbers(seed);
  std::vector<float> inp = numbers.vector(M * K), dout = numbers.vector(M * N);
  const std::vector<float> w_kn = numbers.vector(K * N), w_nk = transposed(w_kn, K, N);
  const bool in_out = order == WeightOrder::kInOut;
  std::vector<float> dinp(static_cast<size_t>(M * K), 9.0f), dw = numbers.vector(K * N),
                                                             db = numbers.vector(N);
  const std::vector<float> dw_before = dw, db_before = db;
  matmul_backward({2, isa}, matrix(dinp, M, K), matrix(dw, in_out ? K : N, in_out ? N : K), matrix(db, 1, N),
                  matrix(dout, M, N), matrix(inp, M, K), weight(in_out ? w_kn : w_nk, order, K, N),
                  MatmulPrecision::kFP32);

  const std::string what = "backward " + label(isa, M, N, K);
  check_product(reference(dout, w_nk, M, K, N), dinp, what + " dinp");
  Reference ref = in_out ? reference(transposed(inp, M, K), dout, K, N, M)
                         : reference(transposed(dout, M, N), inp, N, K, M);
  for (size_t i = 0; i < dw.size(); ++i) {
    ref.exact[i] += dw_before[i];
    ref.naive[i] += dw_before[i];
  }
  check_product(ref, dw, what + " dweight");
  ref = reference(std::vector<float>(static_cast<size_t>(M), 1.0f), dout, 1, N, M);
  for (size_t i = 0; i < db.size(); ++i) {
    ref.exact[i] += db_before[i];
    ref.naive[i] += db_before[i];
  }
  check_product(ref, db, what + " dbias");
}

DN_TEST(matmul_small_shapes) {
  Numbers numbers(1);
  for (int i = 0; i < 300; ++i) {
    check_forward(numbers.between(1, 70), numbers.between(1, 70), numbers.between(1, 70), numbers.next());
  }
  for (int64_t M = 1; M <= 30; ++M)
    check_forward(M, 33, 300, numbers.next());                               // every tile height, two blocks
  for (int64_t N = 1; N <= 65; ++N) check_forward(3, N, 5, numbers.next());  // every tail
}

DN_TEST(matmul_model_shapes) {
  const int64_t shapes[][3] = {{64, 2304, 768}, {37, 768, 768},  {65, 768, 3072},
                               {16, 3072, 768}, {33, 1027, 256}, {600, 96, 520}};
  for (const auto& s : shapes) {
    if (!dn::test::kSanitized || s[0] * s[1] * s[2] < 100000000) check_forward(s[0], s[1], s[2], 5);
  }
}

DN_TEST(matmul_backward_shapes) {
  Numbers numbers(2);
  for (const Isa isa : isas()) {
    for (const WeightOrder order : {WeightOrder::kInOut, WeightOrder::kOutIn}) {
      for (int i = 0; i < 60; ++i) {
        check_backward(isa, order, numbers.between(1, 70), numbers.between(1, 70), numbers.between(1, 70),
                       numbers.next());
      }
      check_backward(isa, order, 300, 130, 96, 3);
      check_backward(isa, order, 530, 65, 768, 4);
    }
  }
}

DN_TEST(matmul_reductions_of_nothing) {
  for (const Isa isa : isas()) {
    std::vector<float> none(1), bias = {1, 2, 3}, out(6, 5.0f);
    matmul_forward({1, isa}, matrix(out, 2, 3), matrix(none, 2, 0), weight(none, WeightOrder::kInOut, 0, 3),
                   matrix(bias, 1, 3), Epilogue::kNone, {}, MatmulPrecision::kFP32);
    CHECK(out == std::vector<float>({1, 2, 3, 1, 2, 3}));
    matmul_forward({1, isa}, matrix(out, 0, 3), matrix(none, 0, 0), weight(none, WeightOrder::kInOut, 0, 3),
                   matrix(bias, 1, 3), Epilogue::kNone, {}, MatmulPrecision::kFP32);
  }
}

// Bias, GELU with and without the pre-activation, residual; strided in- and outputs; what lies beside stays
// untouched.
DN_TEST(matmul_epilogues) {
  for (const Isa isa : isas()) {
    for (const int64_t N : {5, 32, 77}) {
      const int64_t M = 29, K = 270, pad = 3;
      Numbers numbers(static_cast<uint64_t>(N));
      std::vector<float> a = numbers.vector(M * (K + pad)), b = numbers.vector(K * N),
                         bias = numbers.vector(N);
      std::vector<float> dense(static_cast<size_t>(M * K));
      for (int64_t m = 0; m < M; ++m)
        std::memcpy(&dense[static_cast<size_t>(m * K)], &a[static_cast<size_t>(m * (K + pad))],
                    static_cast<size_t>(K) * 4);
      const Reference ref = reference(dense, b, M, N, K);
      const double allowed = 4 * worst(ref.exact, ref.naive.data()) + 4 * kEps * scale(ref.exact);
      for (const Epilogue epilogue : {Epilogue::kNone, Epilogue::kGelu, Epilogue::kResidual}) {
        for (const bool with_extra : {false, true}) {
          if (epilogue == Epilogue::kResidual && !with_extra) continue;
          std::vector<float> out(static_cast<size_t>(M * (N + pad)), 11.0f),
              extra = numbers.vector(M * (N + pad));
          const std::vector<float> residual = extra;
          matmul_forward({2, isa}, Tensor(out.data(), Dtype::kF32, M, N, N + pad),
                         Tensor(a.data(), Dtype::kF32, M, K, K + pad), weight(b, WeightOrder::kInOut, K, N),
                         matrix(bias, 1, N), epilogue,
                         with_extra ? Tensor(extra.data(), Dtype::kF32, M, N, N + pad) : Tensor(),
                         MatmulPrecision::kFP32);
          for (int64_t m = 0; m < M; ++m) {
            for (int64_t n = 0; n < N + pad; ++n) {
              const size_t i = static_cast<size_t>(m * (N + pad) + n);
              if (n >= N) {
                CHECK(out[i] == 11.0f && extra[i] == residual[i]);
                continue;
              }
              const double pre = ref.exact[static_cast<size_t>(m * N + n)] + bias[static_cast<size_t>(n)];
              double expected = pre;
              if (epilogue == Epilogue::kGelu) {
                expected =
                    0.5 * pre * (1 + std::tanh(0.7978845608028654 * (pre + 0.044715 * pre * pre * pre)));
                if (with_extra) CHECK(std::fabs(extra[i] - pre) <= allowed);
              } else if (epilogue == Epilogue::kResidual) {
                expected += residual[i];
              }
              CHECK_MSG(std::fabs(out[i] - expected) <= allowed * 1.2,
                        label(isa, M, N, K) + ": epilogue is off by " + std::to_string(out[i] - expected));
            }
          }
        }
      }
    }
  }
}

// The GELU by itself, through a product with 1: within a few ulp over the whole range, NaN and infinities in
// place.
DN_TEST(matmul_gelu_accuracy) {
  std::vector<float> one = {1.0f}, in;
  for (double x = -9.5; x <= 9.5; x += 0.003) in.push_back(static_cast<float>(x));
  for (const float x : {0.0f, -0.0f, 1e-30f, 50.0f, 3e38f, -50.0f, -3e38f, INFINITY, -INFINITY, NAN})
    in.push_back(x);
  const int64_t N = static_cast<int64_t>(in.size());
  for (const Isa isa : isas()) {
    std::vector<float> out(in.size());
    matmul_forward({1, isa}, matrix(out, 1, N), matrix(one, 1, 1), weight(in, WeightOrder::kInOut, 1, N), {},
                   Epilogue::kGelu, {}, MatmulPrecision::kFP32);
    for (size_t i = 0; i < in.size(); ++i) {
      const double u = in[i], z = 0.7978845608028654 * (u + 0.044715 * u * u * u);
      const double expected = std::isinf(u) ? std::max(u, 0.0) : u / (1 + std::exp(-2 * z));
      if (std::isnan(u)) {
        CHECK(std::isnan(out[i]));
      } else if (std::isinf(expected)) {
        CHECK(static_cast<double>(out[i]) == expected);
      } else {  // exp(-2z) multiplies the rounding of z by |2z|
        const double allowed =
            std::fabs(expected) * kEps * (4 + 3 * std::min(90.0, std::fabs(2 * z))) + 1e-35;
        CHECK_MSG(std::fabs(out[i] - expected) <= allowed,
                  std::string(isa_name(isa)) + " gelu(" + std::to_string(u) +
                      ") = " + std::to_string(out[i]) + ", expected " + std::to_string(expected));
      }
    }
  }
}

// With many rows and a small weight a product is cut by rows, with more threads by columns: the same bits,
// also for a few of the rows alone, for every layout of the weight, and for a gradient with many rows.
DN_TEST(matmul_many_rows) {
  const int64_t M = 2309, N = 45, K = 301;
  Numbers numbers(8);
  std::vector<float> a = numbers.vector(M * K), b = numbers.vector(K * N), bias = numbers.vector(N);
  const Reference ref = reference(a, b, M, N, K);
  std::vector<float> transposed(b.size());
  for (int64_t k = 0; k < K; ++k) {
    for (int64_t n = 0; n < N; ++n)
      transposed[static_cast<size_t>(n * K + k)] = b[static_cast<size_t>(k * N + n)];
  }
  for (const Isa isa : isas()) {
    std::vector<float> panels(static_cast<size_t>(packed_elements(K, N)));
    Weight packed = weight(b, WeightOrder::kInOut, K, N);
    pack_weight({1, isa}, panels.data(), packed);
    packed.data = panels.data();
    packed.packed = true;
    std::vector<float> first(static_cast<size_t>(M * N));
    matmul_forward({16, isa}, matrix(first, M, N), matrix(a, M, K), packed, {}, Epilogue::kNone, {},
                   MatmulPrecision::kFP32);
    CHECK(worst(ref.exact, first.data()) <= 2 * worst(ref.exact, ref.naive.data()) + kEps * scale(ref.exact));
    for (const int threads : {1, 2, 16}) {
      for (const Weight& w :
           {packed, weight(b, WeightOrder::kInOut, K, N), weight(transposed, WeightOrder::kOutIn, K, N)}) {
        std::vector<float> out(first.size(), 3.0f);
        matmul_forward({threads, isa}, matrix(out, M, N), matrix(a, M, K), w, {}, Epilogue::kNone, {},
                       MatmulPrecision::kFP32);
        CHECK_MSG(same_bits(first, out),
                  std::string(isa_name(isa)) + ": forward by rows, " + std::to_string(threads) + " threads");
      }
    }
    std::vector<float> few(static_cast<size_t>(21 * N));
    matmul_forward({1, isa}, matrix(few, 21, N), matrix(a, M, K).slice(1000, 21), packed, {}, Epilogue::kNone,
                   {}, MatmulPrecision::kFP32);
    CHECK(std::memcmp(few.data(), &first[static_cast<size_t>(1000 * N)], few.size() * 4) == 0);

    // dweight (M, N) += dout^T inp, with K tokens.
    std::vector<float> dout(a.size()), dweight_first;
    for (int64_t m = 0; m < M; ++m) {
      for (int64_t k = 0; k < K; ++k)
        dout[static_cast<size_t>(k * M + m)] = a[static_cast<size_t>(m * K + k)];
    }
    const std::vector<float> unused(static_cast<size_t>(M * N));
    for (const int threads : {1, 2, 16}) {
      std::vector<float> dweight(static_cast<size_t>(M * N));
      matmul_backward({threads, isa}, {}, matrix(dweight, M, N), {}, matrix(dout, K, M), matrix(b, K, N),
                      weight(unused, WeightOrder::kOutIn, N, M), MatmulPrecision::kFP32);
      if (threads == 1) dweight_first = dweight;
      CHECK_MSG(same_bits(dweight_first, dweight),
                std::string(isa_name(isa)) + ": dweight by rows, " + std::to_string(threads) + " threads");
    }
    CHECK_MSG(same_bits(dweight_first, first), std::string(isa_name(isa)) + ": dweight is not the product");
  }
}

// A row alone, anywhere in a batch, and with any thread count: the same bits, forward and backward, in both
// precisions.
DN_TEST(matmul_rows_and_threads_do_not_matter) {
  const int64_t M = 83, N = 205, K = 600;
  Numbers numbers(6);
  std::vector<float> a = numbers.vector(M * K), b = numbers.vector(K * N), bias = numbers.vector(N),
                     g = numbers.vector(M * N);
  const Weight w = weight(b, WeightOrder::kInOut, K, N);
  for (const Isa isa : isas()) {
    for (const MatmulPrecision precision : {MatmulPrecision::kFP32, MatmulPrecision::kBF16}) {
      std::vector<float> whole, whole_dw, whole_da, whole_db;
      for (const int threads : {1, 2, 8}) {
        const Cpu cpu{threads, isa};
        std::vector<float> out(static_cast<size_t>(M * N)), da(a.size()), dw(b.size()), db(bias.size());
        matmul_forward(cpu, matrix(out, M, N), matrix(a, M, K), w, matrix(bias, 1, N), Epilogue::kGelu, {},
                       precision);
        matmul_backward(cpu, matrix(da, M, K), matrix(dw, K, N), matrix(db, 1, N), matrix(g, M, N),
                        matrix(a, M, K), w, precision);
        if (threads == 1) whole = out, whole_da = da, whole_dw = dw, whole_db = db;
        CHECK_MSG(same_bits(whole, out) && same_bits(whole_da, da) && same_bits(whole_dw, dw) &&
                      same_bits(whole_db, db),
                  std::string(isa_name(isa)) + ": the bits depend on the thread count");
      }
      for (const int64_t count : {int64_t{1}, int64_t{2}, int64_t{17}}) {
        for (int64_t m = 0; m + count <= M; m += 9) {
          std::vector<float> out(static_cast<size_t>(count * N)), da(static_cast<size_t>(count * K));
          const Tensor rows = matrix(a, M, K).slice(m, count);
          matmul_forward({2, isa}, matrix(out, count, N), rows, w, matrix(bias, 1, N), Epilogue::kGelu, {},
                         precision);
          matmul_backward({2, isa}, matrix(da, count, K), {}, {}, matrix(g, M, N).slice(m, count), rows, w,
                          precision);
          CHECK_MSG(std::memcmp(out.data(), &whole[static_cast<size_t>(m * N)], out.size() * 4) == 0 &&
                        std::memcmp(da.data(), &whole_da[static_cast<size_t>(m * K)], da.size() * 4) == 0,
                    std::string(isa_name(isa)) + ": a row depends on its neighbours");
        }
      }
    }
  }
}

// bf16: against the exact product of the rounded inputs, no worse than twice a plain loop over them; where
// nothing multiplies bf16 against that of the inputs, and with the bits of fp32.
DN_TEST(matmul_bf16) {
  // Several segments of the reduction, several chunks of rows, several groups of columns.
  const int64_t divided[][3] = {{33, 40, 5000}, {300, 40, 4000}, {5, 2150, 4000}, {5000, 40, 33}};
  Numbers numbers(8);
  for (const Isa isa : isas()) {
    const bool rounds = bf16_kernels(isa) != nullptr;
    for (int i = rounds ? -4 : 0; i < (dn::test::kSanitized ? 20 : 60); ++i) {
      const bool large = i < (dn::test::kSanitized ? 2 : 6);
      const int64_t* const shape = i < 0 ? divided[i + 4] : nullptr;
      const int64_t M = shape   ? shape[0]
                        : large ? 40 + 11 * i
                                : numbers.between(1, 70),
                    N = shape   ? shape[1]
                        : large ? 300 + i
                                : numbers.between(1, 70);
      const int64_t K = shape ? shape[2] : large ? 500 + 200 * i : numbers.between(1, 70);
      std::vector<float> a = numbers.vector(M * K), b = numbers.vector(K * N), g = numbers.vector(M * N);
      const std::vector<float> bt = transposed(b, K, N);
      std::vector<float> ra = a, rb = b, rg = g;
      for (auto* v : {&ra, &rb, &rg}) {
        if (rounds) std::transform(v->begin(), v->end(), v->begin(), to_bf16);
      }
      const Reference products = reference(ra, rb, M, N, K),
                      dinp = reference(rg, transposed(rb, K, N), M, K, N),
                      dweight = reference(transposed(ra, M, K), rg, K, N, M);
      const Cpu cpu{2, isa};
      const std::string what = "bf16 " + label(isa, M, N, K);
      for (const WeightOrder order : {WeightOrder::kInOut, WeightOrder::kOutIn}) {
        const bool in_out = order == WeightOrder::kInOut;
        const Weight plain = weight(in_out ? b : bt, order, K, N);
        std::vector<float> panels(static_cast<size_t>(packed_elements(K, N)));
        pack_weight(cpu, panels.data(), plain);
        std::vector<float> first;
        for (const Weight& w : {plain, weight(panels, order, K, N, true)}) {
          std::vector<float> out(static_cast<size_t>(M * N), 3.0f);
          matmul_forward(cpu, matrix(out, M, N), matrix(a, M, K), w, {}, Epilogue::kNone, {},
                         MatmulPrecision::kBF16);
          if (first.empty()) check_product(products, first = out, what);
          CHECK_MSG(same_bits(first, out), what + ": the bits depend on how the weight is stored");
          if (rounds) continue;
          matmul_forward(cpu, matrix(out, M, N), matrix(a, M, K), w, {}, Epilogue::kNone, {},
                         MatmulPrecision::kFP32);
          CHECK_MSG(same_bits(first, out), what + ": the bits are not those of fp32");
        }
        std::vector<float> da(static_cast<size_t>(M * K), 4.0f), dw(static_cast<size_t>(K * N));
        matmul_backward(cpu, matrix(da, M, K), matrix(dw, in_out ? K : N, in_out ? N : K), {},
                        matrix(g, M, N), matrix(a, M, K), plain, MatmulPrecision::kBF16);
        check_product(dinp, da, what + " dinp");
        check_product(in_out ? dweight : transposed(dweight, K, N), dw, what + " dweight");
      }
    }
  }
}

}  // namespace
