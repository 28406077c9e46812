// Attention on every instruction set against a plain double-precision implementation that asks visible() for
// every pair; the reference's own gradient is checked by finite differences. Large scores, NaN, the error
// that is allowed, annealed masks by the word, and wrong shapes. What must not change a bit:
// test_attention_bits.cpp.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "core/backend.h"
#include "core/error.h"
#include "core/rng.h"
#include "cpu/attention_kernels.h"
#include "cpu/ops.h"
#include "test/attention_batch.h"
#include "test/check.h"

namespace dn::cpu {
namespace {

using namespace dn::test::attention;

void check_against_reference(Batch& b, const AttentionMask& mask) {
  const Reference r = reference(b);
  for (const Isa isa : isas()) {
    const std::string name = describe(b, isa, mask);
    b.forward(isa, 2);
    CHECK_CLOSE(b.out.data(), r.out.data(), b.N * b.C(), 3e-6, name + " out");
    CHECK_CLOSE(b.lse.data(), r.lse.data(), b.N * b.NH, 3e-6, name + " lse");
    b.backward(isa, 2);
    CHECK_CLOSE(b.dqkv.data(), r.dqkv.data(), b.N * 3 * b.C(), 2e-5, name + " dqkv");
  }
}

}  // namespace

DN_TEST(attention_matches_double) {
  for (const MaskKind kind : kRuleKinds) {
    for (const int64_t HS : {20, 64, 16, 96}) {
      if (dn::test::kSanitized && (HS == 16 || HS == 96)) continue;
      Batch b(2, HS, {1, 7, 64, 65, 200}, mask_of(kind));
      check_against_reference(b, mask_of(kind));
    }
  }
  for (const int64_t HS : {1, 3, 33, 80}) {
    Batch b(1, HS, {70}, mask_of(MaskKind::kCausal));
    check_against_reference(b, mask_of(MaskKind::kCausal));
  }
}

DN_TEST(attention_block_sizes_and_ratios) {
  for (const int32_t block : {1, 4, 64, 100}) {
    for (const MaskKind kind : {MaskKind::kBlockCausal, MaskKind::kBlockDiffusion}) {
      AttentionMask mask = mask_of(kind);
      mask.block = block;
      for (const int64_t HS : {16, 32, 64}) {
        Batch b(1, HS, {150, 130}, mask);
        check_against_reference(b, mask);
      }
    }
  }
  for (const double ratio : {0.0, 0.01, 0.99}) {
    AttentionMask mask = mask_of(MaskKind::kAnnealed);
    mask.threshold = annealing_threshold(ratio);
    for (const int64_t HS : {16, 32, 64}) {
      Batch b(1, HS, {150}, mask);
      check_against_reference(b, mask);
    }
  }
}

DN_TEST(attention_matrix_mask_with_empty_rows) {
  const int32_t T = 140;
  std::vector<uint8_t> matrix(static_cast<size_t>(T) * T);
  for (int32_t i = 0; i < T; ++i) {
    for (int32_t j = 0; j < T; ++j) {
      // Every fifth row empty, a stretch of rows that sees late keys only, the others random.
      const bool random = uniform(3, Stream::kMask, 0, static_cast<uint64_t>(i * T + j)) < 0.4;
      matrix[static_cast<size_t>(i * T + j)] = i % 5 == 0 ? 0 : i < 60 ? j > 100 : random ? 3 : 0;
    }
  }
  AttentionMask mask = mask_of(MaskKind::kMatrix);
  mask.matrix = matrix.data();
  mask.matrix_width = T;
  for (const int64_t HS : {20, 32, 70}) {
    Batch b(6, HS, {T, 40}, mask);
    check_against_reference(b, mask);
    for (const Isa isa : isas()) {
      b.forward(isa, 1);
      for (int64_t row = 0; row < T; row += 5) {
        for (int64_t c = 0; c < b.C(); ++c) CHECK(b.out[static_cast<size_t>(row * b.C() + c)] == 0);
        for (int64_t h = 0; h < b.NH; ++h) CHECK(b.lse[static_cast<size_t>(row * b.NH + h)] == 0);
      }
      b.backward(isa, 1);
      for (int64_t row = 0; row < T; row += 5) {
        for (int64_t c = 0; c < b.C(); ++c) CHECK(b.dqkv[static_cast<size_t>(row * 3 * b.C() + c)] == 0);
      }
    }
  }
}

// sum(dout * out) of the double reference, moved by +-h in every input, against the portable and vector
// gradients.
DN_TEST(attention_backward_matches_finite_differences) {
  for (const MaskKind kind : kRuleKinds) {
    Batch b(2, 3, {1, 7}, mask_of(kind));
    std::vector<double> qkv(b.qkv.begin(), b.qkv.end()), slope(qkv.size());
    const double h = 1e-4;
    for (size_t i = 0; i < qkv.size(); ++i) {
      double loss[2] = {0, 0};
      for (int side = 0; side < 2; ++side) {
        std::vector<double> moved = qkv;
        moved[i] += side ? h : -h;
        const Reference r = reference(b, moved);
        for (size_t c = 0; c < r.out.size(); ++c) loss[side] += r.out[c] * static_cast<double>(b.dout[c]);
      }
      slope[i] = (loss[1] - loss[0]) / (2 * h);
    }
    for (const Isa isa : isas()) {
      b.forward(isa, 1);
      b.backward(isa, 1);
      CHECK_CLOSE(b.dqkv.data(), slope.data(), static_cast<int64_t>(slope.size()), 3e-6,
                  describe(b, isa, mask_of(kind)));
    }
  }
}

// Scores of a few hundred: the maximum must be subtracted before the exponential, and rescaling must not
// overflow.
DN_TEST(attention_with_large_scores) {
  for (const int64_t HS : {16, 32, 64}) {
    Batch b(1, HS, {130}, mask_of(MaskKind::kFull));
    for (float& x : b.qkv) x *= 20;
    const Reference r = reference(b);
    for (const Isa isa : isas()) {
      b.forward(isa, 1);
      CHECK_CLOSE(b.out.data(), r.out.data(), b.N * b.C(), 2e-2, "out with scores of hundreds");
      for (int64_t i = 0; i < b.N; ++i) {
        const double want = r.lse[static_cast<size_t>(i)];
        CHECK(std::fabs(b.lse[static_cast<size_t>(i)] - want) <= 1e-6 * std::fabs(want) + 1e-3);
      }
    }
  }
}

// A query that is NaN gives NaN, whichever NaN, and to no other query; keys that are NaN give it to all that
// see them. Finite numbers in their place would hide a broken weight.
DN_TEST(attention_passes_nan_on) {
  for (const uint32_t bits : {0x7fc00000u, 0xffffffffu}) {
    float nan;
    std::memcpy(&nan, &bits, sizeof nan);
    Batch queries(1, 64, {150}, mask_of(MaskKind::kFull)), keys = queries, all = queries;
    const auto row = [](Batch& b, int64_t t, int64_t part) { return b.qkv.data() + (t * 3 + part) * b.C(); };
    std::fill_n(row(queries, 50, 0), 64, nan);
    for (int64_t t = 0; t < 64; ++t) row(keys, t, 1)[t] = nan;
    for (int64_t t = 0; t < 150; ++t) std::fill_n(row(all, t, 0), 64, nan);
    for (const Isa isa : isas()) {
      for (Batch* b : {&queries, &keys, &all}) {
        b->forward(isa, 2);
        for (int64_t t = 0; t < b->N; ++t) {
          const float* const out = b->out.data() + t * 64;
          const bool expected = b != &queries || t == 50;
          const bool nans = std::all_of(out, out + 64, [](float x) { return std::isnan(x); });
          const bool numbers = std::all_of(out, out + 64, [](float x) { return std::isfinite(x); });
          CHECK_MSG(expected ? nans : numbers, std::string(isa_name(isa)) + " query " + std::to_string(t) +
                                                   " of case " +
                                                   std::to_string(b == &queries ? 0
                                                                  : b == &keys  ? 1
                                                                                : 2));
        }
      }
    }
  }
}

// Maxima that grow from one block of keys to the next, so that every block rescales what is summed.
DN_TEST(attention_with_growing_scores) {
  for (const int64_t HS : {16, 32, 64}) {
    Batch b(2, HS, {300}, mask_of(MaskKind::kFull));
    const int64_t C = b.C();
    for (int64_t t = 0; t < b.N; ++t) {
      for (int64_t c = 0; c < C; ++c) {
        b.qkv[static_cast<size_t>(t * 3 * C + c)] = 0.5f;
        b.qkv[static_cast<size_t>(t * 3 * C + C + c)] *= 0.02f * static_cast<float>(t);
      }
    }
    check_against_reference(b, mask_of(MaskKind::kFull));
  }
}

// Root mean square errors of the result against double: three parts of bf16 are fp32, not less.
DN_TEST(attention_errors_are_those_of_fp32) {
  if (dn::test::kSanitized) return;  // the same calls as above
  for (const int64_t T : {40, 256, 700, 1100}) {
    Batch b(2, 64, {T}, mask_of(MaskKind::kFull));
    const Reference r = reference(b);
    const auto error_of = [&](Isa isa) {
      b.forward(isa, 2);
      double sum = 0;
      for (size_t i = 0; i < b.out.size(); ++i) {
        const double difference = static_cast<double>(b.out[i]) - r.out[i];
        sum += difference * difference;
      }
      return std::sqrt(sum / static_cast<double>(b.out.size()));
    };
    const double plain = error_of(Isa::kPortable);
    for (const Isa isa : isas()) {
      const double error = error_of(isa);
      CHECK_MSG(error <= 2 * plain, describe(b, isa, mask_of(MaskKind::kFull)) + ": error " +
                                        std::to_string(error * 1e9) + "e-9, of plain loops " +
                                        std::to_string(plain * 1e9) + "e-9");
    }
  }
}

DN_TEST(attention_annealed_words_match_the_rule) {
  std::vector<const AttentionKernels*> tables{&kAttentionPortable};
#if defined(__x86_64__) || defined(_M_X64)
  if (detected_isa() >= Isa::kAvx2) tables.push_back(&kAttentionAvx2);
  if (detected_isa() >= Isa::kAvx512) tables.push_back(&kAttentionAvx512);
#endif
  for (const uint32_t threshold : {0u, 1u, 0x7FFFFFFFu, 0x80000001u, 0xFFFFFFFFu}) {
    AttentionMask mask = mask_of(MaskKind::kAnnealed);
    mask.seed = 0xFEDCBA9876543210ull;
    mask.step = 0xFFFFFFF0u;
    mask.threshold = threshold;
    for (const int32_t q : {0, 1, 1000, 0x7FFFFFFF}) {
      for (const int32_t k0 : {0, 64, 1 << 20}) {
        uint64_t want = 0;
        for (int32_t j = 0; j < 64; ++j) want |= static_cast<uint64_t>(annealed_bit(mask, q, k0 + j)) << j;
        for (const AttentionKernels* table : tables) {
          CHECK(table->annealed_word(mask.seed, static_cast<uint32_t>(Stream::kAnneal), mask.step, threshold,
                                     static_cast<uint32_t>(q), static_cast<uint32_t>(k0)) == want);
        }
      }
    }
  }
}

DN_TEST(attention_rejects_wrong_shapes) {
  Batch b(2, 16, {8}, mask_of(MaskKind::kFull));
  b.sequences[0].k_len = 9;
  CHECK_THROWS(b.forward(Isa::kPortable, 1), Code::kInternal, "sequence 0");
  b.sequences[0].k_len = 7;
  b.out.assign(static_cast<size_t>(b.N * b.C()), 0);
  b.lse.assign(static_cast<size_t>(b.N * b.NH), 0);
  CHECK_THROWS(b.backward(Isa::kPortable, 1), Code::kInternal, "same tokens");
  const Tensor q = b.qkv_tensor().columns(0, b.C());
  CHECK_THROWS(attention_forward({1, Isa::kPortable}, Tensor(b.out.data(), Dtype::kF32, b.N, b.C()), Tensor(),
                                 q, b.qkv_tensor().columns(b.C(), 2 * b.C()), b.sequences.data(), 1,
                                 b.positions.data(), 3),
               Code::kInternal, "heads");
}

}  // namespace dn::cpu
