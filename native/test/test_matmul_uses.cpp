// What callers do with the matrix product: weights packed whole and in pieces, chunks of the head, sums on
// top of what is there, long reductions, and calls that are refused.

#include <algorithm>
#include <cmath>
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

// Packing, also in pieces, its inverse, and single rows of an embedding.
DN_TEST(matmul_pack_roundtrip) {
  Numbers numbers(9);
  for (const Isa isa : isas()) {
    for (int i = 0; i < 40; ++i) {
      const int64_t K = numbers.between(1, 70), N = numbers.between(1, 140);
      CHECK(packed_elements(K, N) >= K * N);
      for (const WeightOrder order : {WeightOrder::kInOut, WeightOrder::kOutIn}) {
        const std::vector<float> plain = numbers.vector(K * N);
        std::vector<float> panels(static_cast<size_t>(packed_elements(K, N)), NAN), back(plain.size());
        pack_weight({2, isa}, panels.data(), weight(plain, order, K, N));
        const Weight packed = weight(panels, order, K, N, true);
        unpack_weight({2, isa}, back.data(), packed);
        CHECK(same_bits(plain, back));
        for (const float x : panels) CHECK(!std::isnan(x));
        // In pieces: the same panels.
        std::vector<float> pieces(panels.size(), NAN);
        const int64_t rows = order == WeightOrder::kInOut ? K : N,
                      width = order == WeightOrder::kInOut ? N : K;
        const int64_t step = kPackRows * numbers.between(1, 2);
        Weight whole = weight(plain, order, K, N);
        whole.data = nullptr;
        for (int64_t begin = 0; begin < rows; begin += step) {
          pack_rows({2, isa}, pieces.data(), whole, plain.data() + begin * width, begin,
                    std::min(step, rows - begin));
        }
        CHECK(same_bits(pieces, panels));
        if (order != WeightOrder::kOutIn) continue;
        for (int64_t n = 0; n < N; n += 7) {
          std::vector<float> row(static_cast<size_t>(K)), packed_row(row);
          weight_row(weight(plain, order, K, N), n, row.data());
          weight_row(packed, n, packed_row.data());
          CHECK(std::memcmp(row.data(), &plain[static_cast<size_t>(n * K)], row.size() * 4) == 0);
          CHECK(same_bits(row, packed_row));
        }
      }
    }
  }
}

// The head: gathered rows, vocabulary in chunks, plain and packed: the bits of one whole product. Embeddings
// of different sizes, so that what is known of a panel is not known of another.
DN_TEST(matmul_head_chunks) {
  const int64_t rows = 50, R = 21, V = 333, C = 272;
  Numbers numbers(10);
  std::vector<float> hidden = numbers.vector(rows * C), wte = numbers.vector(V * C);
  for (size_t i = 0; i < wte.size(); ++i)
    wte[i] = std::ldexp(wte[i], static_cast<int>(i / (32 * C)) % 5 * 3 - 6);
  for (const Isa isa : isas()) {
    for (const MatmulPrecision precision : {MatmulPrecision::kFP32, MatmulPrecision::kBF16}) {
      const Cpu cpu{2, isa};
      std::vector<float> panels(static_cast<size_t>(packed_elements(C, V)));
      pack_weight(cpu, panels.data(), weight(wte, WeightOrder::kOutIn, C, V));
      std::vector<float> gathered(static_cast<size_t>(R * C)), whole(static_cast<size_t>(R * V));
      std::vector<const float*> pointers;
      for (int64_t r = 0; r < R; ++r) {
        pointers.push_back(&hidden[static_cast<size_t>((r * 17 % rows) * C)]);
        std::memcpy(&gathered[static_cast<size_t>(r * C)], pointers.back(), static_cast<size_t>(C) * 4);
      }
      gemm_nt(cpu, whole.data(), V, gathered.data(), C, wte.data(), C, R, V, C, false, precision);
      for (const bool packed : {false, true}) {
        for (const int64_t chunk : {kHeadTile, 3 * kHeadTile, 11 * kHeadTile}) {
          std::vector<float> out(whole.size());
          for (int64_t n = 0; n < V; n += chunk) {
            head_gemm(cpu, out.data() + n, V, pointers.data(), R,
                      weight(packed ? panels : wte, WeightOrder::kOutIn, C, V, packed), n,
                      std::min(V, n + chunk), precision);
          }
          CHECK_MSG(same_bits(whole, out), std::string(isa_name(isa)) + ": the head depends on its chunks");
        }
      }
    }
  }
}

// Accumulation over chunks of the reduction, as the head's backward does it.
DN_TEST(matmul_accumulation) {
  const int64_t M = 45, N = 70, K = 530;
  Numbers numbers(11);
  std::vector<float> a = numbers.vector(M * K), b = numbers.vector(K * N);
  const std::vector<float> at = transposed(a, M, K), bt = transposed(b, K, N);
  const Reference ref = reference(a, b, M, N, K);
  for (const Isa isa : isas()) {
    const Cpu cpu{2, isa};
    std::vector<float> nn(static_cast<size_t>(M * N)), nt(nn), tn(nn);
    for (int64_t k = 0; k < K; k += 200) {
      const int64_t depth = std::min<int64_t>(200, K - k);
      gemm_nn(cpu, nn.data(), N, a.data() + k, K, b.data() + k * N, N, M, N, depth, k > 0,
              MatmulPrecision::kFP32);
      gemm_nt(cpu, nt.data(), N, a.data() + k, K, bt.data() + k, K, M, N, depth, k > 0,
              MatmulPrecision::kFP32);
      gemm_tn(cpu, tn.data(), N, at.data() + k * M, M, b.data() + k * N, N, M, N, depth, k > 0,
              MatmulPrecision::kFP32);
    }
    check_product(ref, nn, label(isa, M, N, K) + " in chunks");
    CHECK(same_bits(nn, nt) && same_bits(nn, tn));
  }
}

// The gradient of a weight is set to what it would be if it were added to zeros: small, large enough to be
// written past the caches, with rows that do not lie for that, and over several blocks and parts.
DN_TEST(matmul_sets_gradients) {
  Numbers numbers(13);
  const int64_t shapes[][3] = {{24, 40, 30},    {70, 1024, 768},   {70, 700, 1027},
                               {900, 750, 768}, {6300, 1024, 512}, {6300, 40, 30}};
  for (const Isa isa : isas()) {
    for (const auto& [M, K, N] : shapes) {
      const int64_t most = dn::test::kSanitized ? 10000000 : isa == Isa::kPortable ? 1000000000 : INT64_MAX;
      if (M * K * N > most) continue;
      std::vector<float> inp = numbers.vector(M * K), dout = numbers.vector(M * N);
      const std::vector<float> w(static_cast<size_t>(K * N));
      // One word more, so that one of the two places is not at a line.
      std::vector<float> room(static_cast<size_t>(K * N) + 32);
      float* const line = room.data() + (16 - reinterpret_cast<uintptr_t>(room.data()) / 4 % 16) % 16;
      std::vector<float> added(static_cast<size_t>(K * N), 0.0f);
      matmul_backward({2, isa}, {}, matrix(added, K, N), {}, matrix(dout, M, N), matrix(inp, M, K),
                      weight(w, WeightOrder::kInOut, K, N), MatmulPrecision::kFP32);
      for (float* const place : {line, line + 1}) {
        std::fill(room.begin(), room.end(), NAN);
        matmul_backward({2, isa}, {}, Tensor(place, Dtype::kF32, K, N), {}, matrix(dout, M, N),
                        matrix(inp, M, K), weight(w, WeightOrder::kInOut, K, N), MatmulPrecision::kFP32,
                        Store::kSet);
        CHECK_MSG(std::memcmp(place, added.data(), added.size() * sizeof(float)) == 0, label(isa, M, N, K));
        CHECK(std::isnan(place[K * N]) && (place == room.data() || std::isnan(place[-1])));
      }
    }
  }
}

// A plain weight is met in parts of a long reduction, a packed one is not: the same bits, and what happens to
// a finished element happens once, at the end.
DN_TEST(matmul_long_reductions) {
  const int64_t M = 17, N = 70, K = 13000;
  Numbers numbers(12);
  std::vector<float> inp = numbers.vector(M * K), w = numbers.vector(K * N), bias = numbers.vector(N);
  std::vector<float> residual = numbers.vector(M * N);
  const Reference ref = reference(inp, w, M, N, K);
  for (const Isa isa : isas()) {
    std::vector<float> panels(static_cast<size_t>(packed_elements(K, N)));
    pack_weight(Cpu{2, isa}, panels.data(), weight(w, WeightOrder::kInOut, K, N));
    const auto run = [&](bool packed, int threads, Epilogue epilogue, bool with_bias) {
      std::vector<float> out(static_cast<size_t>(M * N));
      matmul_forward(Cpu{threads, isa}, matrix(out, M, N), matrix(inp, M, K),
                     weight(packed ? panels : w, WeightOrder::kInOut, K, N, packed),
                     with_bias ? matrix(bias, 1, N) : Tensor(), epilogue,
                     epilogue == Epilogue::kResidual ? matrix(residual, M, N) : Tensor(),
                     MatmulPrecision::kFP32);
      return out;
    };
    check_product(ref, run(false, 2, Epilogue::kNone, false), label(isa, M, N, K));
    for (const Epilogue epilogue : {Epilogue::kNone, Epilogue::kGelu, Epilogue::kResidual}) {
      const std::vector<float> whole = run(true, 1, epilogue, true);
      for (const int threads : {1, 3}) {
        CHECK_MSG(same_bits(whole, run(false, threads, epilogue, true)),
                  label(isa, M, N, K) + ": the parts of the reduction show");
      }
    }
  }
}

// Groups of panels: each panel in one of them, and with parts of the columns for every thread the same share
// of each part.
DN_TEST(matmul_groups_of_panels) {
  for (const int64_t columns : {1, 33, 64, 150, 384, 1152, 2304, 2336, 2300, 3072}) {
    const int64_t panels = (columns + kGemmPanel - 1) / kGemmPanel;
    for (const int64_t threads : {1, 2, 3, 4, 8}) {
      for (const int64_t parts : {1, 2, 3}) {
        for (const int64_t wanted : {1, 4, 8, 40}) {
          GemmProduct p;
          p.N = columns;
          p.column_parts = parts;
          const PanelGroups groups(p, 4, threads, wanted);
          const std::string what = std::to_string(panels) + " panels, " + std::to_string(threads) +
                                   " threads, " + std::to_string(parts) + " parts";
          CHECK(groups.parts == (threads > 1 && columns % (kGemmPanel * parts * threads) == 0 ? parts : 1));
          std::vector<int64_t> of_thread(static_cast<size_t>(panels), -1);
          for (int64_t group = 0; group < groups.count; ++group) {
            CHECK_MSG(groups.begin(group) < groups.end(group), what + ": an empty group");
            for (int64_t panel = groups.begin(group); panel < groups.end(group); ++panel) {
              CHECK_MSG(of_thread[static_cast<size_t>(panel)] == -1, what + ": a panel twice");
              of_thread[static_cast<size_t>(panel)] = group * threads / groups.count;
            }
          }
          for (int64_t panel = 0; panel < panels; ++panel) {
            const int64_t thread = of_thread[static_cast<size_t>(panel)], part = panels / groups.parts;
            CHECK_MSG(thread >= 0, what + ": a panel is missing");
            if (groups.parts > 1)
              CHECK_MSG(thread == panel % part * threads / part, what + ": another share");
          }
        }
      }
    }
  }
}

DN_TEST(matmul_column_parts_change_no_bit) {
  Numbers numbers(19);
  const int64_t K = 200, N = 3 * 2 * 3 * kGemmPanel;  // for 2 and for 3 threads
  std::vector<float> b = numbers.vector(K * N), bias = numbers.vector(N);
  for (const int64_t M : {1, 17, 150}) {
    std::vector<float> a = numbers.vector(M * K), whole(static_cast<size_t>(M * N)), parts(whole.size());
    for (const Isa isa : isas()) {
      for (const MatmulPrecision precision : {MatmulPrecision::kFP32, MatmulPrecision::kBF16}) {
        for (const int threads : {2, 3}) {
          for (const int held : {0, 1, 2}) {  // plain, packed as fp32, as bf16
            const Dtype dtype = held == 2 ? Dtype::kBF16 : Dtype::kF32;
            std::vector<float> room(static_cast<size_t>(packed_elements(K, N, Dtype::kF32)));
            Weight w = weight(b, WeightOrder::kInOut, K, N);
            if (held > 0) {
              pack_weight({1, isa}, room.data(), w, dtype);
              w = weight(room, WeightOrder::kInOut, K, N, true);
              w.dtype = dtype;
            }
            matmul_forward({threads, isa}, matrix(whole, M, N), matrix(a, M, K), w, matrix(bias, 1, N),
                           Epilogue::kNone, {}, precision);
            w.column_parts = 3;
            std::fill(parts.begin(), parts.end(), 7.0f);
            matmul_forward({threads, isa}, matrix(parts, M, N), matrix(a, M, K), w, matrix(bias, 1, N),
                           Epilogue::kNone, {}, precision);
            CHECK_MSG(same_bits(whole, parts), std::string(isa_name(isa)) + " M " + std::to_string(M));
          }
        }
      }
    }
  }
}

DN_TEST(matmul_bad_shapes) {
  std::vector<float> v(64);
  const Weight w = weight(v, WeightOrder::kInOut, 4, 8);
  const Cpu cpu;
  CHECK_THROWS(matmul_forward(cpu, matrix(v, 2, 8), matrix(v, 2, 5), w, {}, Epilogue::kNone, {},
                              MatmulPrecision::kFP32),
               Code::kArgument, "inp is (2, 5), expected (2, 4)");
  CHECK_THROWS(matmul_forward(cpu, matrix(v, 3, 8), matrix(v, 2, 4), w, {}, Epilogue::kNone, {},
                              MatmulPrecision::kFP32),
               Code::kArgument, "out is (3, 8), expected (2, 8)");
  CHECK_THROWS(matmul_forward(cpu, matrix(v, 2, 8), matrix(v, 2, 4), w, {}, Epilogue::kResidual, {},
                              MatmulPrecision::kFP32),
               Code::kArgument, "residual is missing");
  CHECK_THROWS(matmul_backward(cpu, matrix(v, 2, 4), {}, {}, matrix(v, 2, 8), {},
                               weight(v, WeightOrder::kInOut, 4, 8, true), MatmulPrecision::kFP32),
               Code::kArgument, "packed");
}

}  // namespace
