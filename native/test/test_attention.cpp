// Attention on every instruction set against a plain double-precision implementation that asks visible() for
// every pair; the reference's own gradient is checked by finite differences. Bit-equality over threads, batch
// composition and KV caches. Outputs start as NaN, so an element that is not written is a failure.
#include <algorithm>
#include <cstring>
#include <limits>

#include "core/backend.h"
#include "core/error.h"
#include "cpu/attention_kernels.h"
#include "cpu/ops.h"
#include "test/check.h"

namespace dn::cpu {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

std::vector<Isa> isas() {
  std::vector<Isa> list{Isa::kPortable};
  if (detected_isa() >= Isa::kAvx2) list.push_back(Isa::kAvx2);
  if (detected_isa() >= Isa::kAvx512) list.push_back(Isa::kAvx512);
  if (detected_isa() >= Isa::kAmx) list.push_back(Isa::kAmx);
  return list;
}

// Roughly normal, mean 0, variance 1.
std::vector<float> random_values(int64_t n, uint64_t seed) {
  std::vector<float> x(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) {
    double sum = -6;
    for (uint32_t j = 0; j < 12; ++j) sum += uniform(seed, Stream::kInit, j, static_cast<uint64_t>(i));
    x[static_cast<size_t>(i)] = static_cast<float>(sum);
  }
  return x;
}

// A packed batch of self-attention, and what comes out of it.
struct Batch {
  int64_t NH = 2, HS = 16, N = 0;
  std::vector<AttentionSequence> sequences;
  std::vector<int32_t> positions;
  std::vector<float> qkv, dout, out, lse, dqkv;

  int64_t C() const { return NH * HS; }

  Batch(int64_t heads, int64_t head_size, const std::vector<int64_t>& lengths, AttentionMask mask,
        uint64_t seed = 1)
      : NH(heads), HS(head_size) {
    for (const int64_t T : lengths) {
      AttentionSequence s;
      s.q_begin = s.kv_begin = N;
      s.q_end = N += T;
      s.k_len = T;
      s.mask = mask;
      if (mask.kind == MaskKind::kBlockDiffusion) s.mask.half = static_cast<int32_t>((T + 1) / 2);
      sequences.push_back(s);
      for (int64_t t = 0; t < T; ++t) positions.push_back(static_cast<int32_t>(t));
    }
    qkv = random_values(N * 3 * C(), seed);
    dout = random_values(N * C(), seed + 1);
  }

  Tensor qkv_tensor() { return Tensor(qkv.data(), Dtype::kF32, N, 3 * C()); }

  void forward(Isa isa, int threads) {
    out.assign(static_cast<size_t>(N * C()), kNan);
    lse.assign(static_cast<size_t>(N * NH), kNan);
    attention_forward({threads, isa}, Tensor(out.data(), Dtype::kF32, N, C()),
                      Tensor(lse.data(), Dtype::kF32, N, NH), qkv_tensor().columns(0, C()),
                      qkv_tensor().columns(C(), 2 * C()), sequences.data(),
                      static_cast<int64_t>(sequences.size()), positions.data(), NH);
  }

  void backward(Isa isa, int threads) {
    dqkv.assign(static_cast<size_t>(N * 3 * C()), kNan);
    attention_backward({threads, isa}, Tensor(dqkv.data(), Dtype::kF32, N, 3 * C()),
                       Tensor(dout.data(), Dtype::kF32, N, C()), qkv_tensor(),
                       Tensor(out.data(), Dtype::kF32, N, C()), Tensor(lse.data(), Dtype::kF32, N, NH),
                       sequences.data(), static_cast<int64_t>(sequences.size()), positions.data(), NH);
  }
};

struct Reference {
  std::vector<double> out, lse, dqkv;
};

// Attention and its gradient in double, one pair at a time.
Reference reference(const Batch& b, const std::vector<double>& qkv) {
  const int64_t C = b.C();
  Reference r;
  r.out.assign(static_cast<size_t>(b.N * C), 0);
  r.lse.assign(static_cast<size_t>(b.N * b.NH), 0);
  r.dqkv.assign(static_cast<size_t>(b.N * 3 * C), 0);
  const double scale = 1 / std::sqrt(static_cast<double>(b.HS));
  for (const AttentionSequence& s : b.sequences) {
    const int64_t T = s.k_len;
    std::vector<double> p(static_cast<size_t>(T)), dp(static_cast<size_t>(T));
    for (int64_t h = 0; h < b.NH; ++h) {
      for (int64_t i = 0; i < T; ++i) {
        const int64_t row = s.q_begin + i;
        const double* q = qkv.data() + row * 3 * C + h * b.HS;
        double max = -1e300, sum = 0;
        for (int64_t j = 0; j < T; ++j) {
          const double* k = qkv.data() + (s.kv_begin + j) * 3 * C + C + h * b.HS;
          double score = 0;
          for (int64_t d = 0; d < b.HS; ++d) score += q[d] * k[d];
          const bool seen = visible(s.mask, b.positions[static_cast<size_t>(row)], static_cast<int32_t>(j));
          p[static_cast<size_t>(j)] = seen ? score * scale : -1e300;
          max = std::max(max, p[static_cast<size_t>(j)]);
        }
        if (max == -1e300) continue;
        for (double& x : p) sum += x = x == -1e300 ? 0 : std::exp(x - max);
        r.lse[static_cast<size_t>(row * b.NH + h)] = max + std::log(sum);
        double delta = 0;
        for (int64_t j = 0; j < T; ++j) {
          double& pj = p[static_cast<size_t>(j)];
          pj /= sum;
          const double* v = qkv.data() + (s.kv_begin + j) * 3 * C + 2 * C + h * b.HS;
          double dpj = 0;
          for (int64_t d = 0; d < b.HS; ++d) {
            const int64_t c = row * C + h * b.HS + d;
            r.out[static_cast<size_t>(c)] += pj * v[d];
            dpj += static_cast<double>(b.dout[static_cast<size_t>(c)]) * v[d];
            r.dqkv[static_cast<size_t>((s.kv_begin + j) * 3 * C + 2 * C + h * b.HS + d)] +=
                pj * static_cast<double>(b.dout[static_cast<size_t>(c)]);
          }
          dp[static_cast<size_t>(j)] = dpj;
          delta += pj * dpj;
        }
        for (int64_t j = 0; j < T; ++j) {
          const double ds = p[static_cast<size_t>(j)] * (dp[static_cast<size_t>(j)] - delta) * scale;
          const int64_t key = (s.kv_begin + j) * 3 * C + C + h * b.HS;
          for (int64_t d = 0; d < b.HS; ++d) {
            r.dqkv[static_cast<size_t>(row * 3 * C + h * b.HS + d)] += ds * qkv[static_cast<size_t>(key + d)];
            r.dqkv[static_cast<size_t>(key + d)] += ds * q[d];
          }
        }
      }
    }
  }
  return r;
}

Reference reference(const Batch& b) { return reference(b, std::vector<double>(b.qkv.begin(), b.qkv.end())); }

AttentionMask mask_of(MaskKind kind) {
  AttentionMask mask;
  mask.kind = kind;
  mask.block = 5;
  mask.threshold = annealing_threshold(0.3);
  mask.step = 7;
  mask.seed = 0x123456789ABCDEFull;
  return mask;
}

const MaskKind kRuleKinds[] = {MaskKind::kFull, MaskKind::kCausal, MaskKind::kAnnealed,
                               MaskKind::kBlockCausal, MaskKind::kBlockDiffusion};

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

std::string describe(const Batch& b, Isa isa, const AttentionMask& mask) {
  return std::string(isa_name(isa)) + " mask " + std::to_string(static_cast<int>(mask.kind)) + " HS " +
         std::to_string(b.HS);
}

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
      for (const int64_t HS : {16, 32}) {
        Batch b(1, HS, {150, 130}, mask);
        check_against_reference(b, mask);
      }
    }
  }
  for (const double ratio : {0.0, 0.01, 0.99}) {
    AttentionMask mask = mask_of(MaskKind::kAnnealed);
    mask.threshold = annealing_threshold(ratio);
    for (const int64_t HS : {16, 32}) {
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
  for (const int64_t HS : {20, 32}) {
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

DN_TEST(attention_bits_do_not_depend_on_threads) {
  for (const Isa isa : isas()) {
    for (const MaskKind kind : kRuleKinds) {
      for (const int64_t HS : {20, 32}) {
        if (dn::test::kSanitized && HS == 20) continue;
        Batch one(6, HS, {1, 7, 64, 65, 200}, mask_of(kind)), other = one;
        one.forward(isa, 1);
        one.backward(isa, 1);
        for (const int threads : {2, 8}) {
          other.forward(isa, threads);
          other.backward(isa, threads);
          CHECK_MSG(same_bits(one.out, other.out) && same_bits(one.lse, other.lse) &&
                        same_bits(one.dqkv, other.dqkv),
                    describe(one, isa, mask_of(kind)) + ": bits differ with " + std::to_string(threads) +
                        " threads");
        }
      }
    }
  }
}

DN_TEST(attention_bits_do_not_depend_on_the_batch) {
  for (const Isa isa : isas()) {
    for (const MaskKind kind : kRuleKinds) {
      for (const int64_t HS : {20, 32}) {
        Batch all(2, HS, {1, 7, 64, 65, 200}, mask_of(kind));
        all.forward(isa, 2);
        all.backward(isa, 2);
        const int64_t C = all.C();
        for (const AttentionSequence& s : all.sequences) {
          Batch alone(2, HS, {s.k_len}, mask_of(kind));
          std::memcpy(alone.qkv.data(), all.qkv.data() + s.q_begin * 3 * C, alone.qkv.size() * sizeof(float));
          std::memcpy(alone.dout.data(), all.dout.data() + s.q_begin * C, alone.dout.size() * sizeof(float));
          alone.forward(isa, 1);
          alone.backward(isa, 1);
          const auto equal = [](const std::vector<float>& a, const float* b) {
            return std::memcmp(a.data(), b, a.size() * sizeof(float)) == 0;
          };
          CHECK_MSG(equal(alone.out, all.out.data() + s.q_begin * C) &&
                        equal(alone.lse, all.lse.data() + s.q_begin * 2) &&
                        equal(alone.dqkv, all.dqkv.data() + s.q_begin * 3 * C),
                    describe(all, isa, mask_of(kind)) + ": a sequence of " + std::to_string(s.k_len) +
                        " differs alone");
        }
      }
    }
  }
}

// Some queries of a sequence, with keys from a cache as long as they need: the bits of the full call.
DN_TEST(attention_with_a_cache_equals_full_recomputation) {
  for (const Isa isa : isas()) {
    for (const MaskKind kind : {MaskKind::kCausal, MaskKind::kBlockCausal}) {
      for (const int64_t HS : {64, 20}) {
        Batch full(3, HS, {200}, mask_of(kind));
        full.forward(isa, 2);
        const int64_t C = full.C();
        std::vector<float> k(static_cast<size_t>(200 * C)), v(k.size());
        for (int64_t t = 0; t < 200; ++t) {
          std::memcpy(&k[static_cast<size_t>(t * C)], &full.qkv[static_cast<size_t>(t * 3 * C + C)],
                      C * sizeof(float));
          std::memcpy(&v[static_cast<size_t>(t * C)], &full.qkv[static_cast<size_t>(t * 3 * C + 2 * C)],
                      C * sizeof(float));
        }
        for (const int64_t q : {0, 4, 62, 63, 64, 99, 127, 128, 199}) {
          for (const int64_t count : {1, 3, 40}) {
            if (q + 1 < count) continue;
            AttentionSequence s;
            s.q_end = count;
            s.k_len = kind == MaskKind::kCausal ? q + 1 : std::min<int64_t>(200, (q / 5 + 1) * 5);
            s.k = k.data();
            s.v = v.data();
            s.mask = mask_of(kind);
            const int64_t first = q + 1 - count;
            std::vector<float> out(static_cast<size_t>(count * C), kNan),
                lse(static_cast<size_t>(count * 3), kNan);
            attention_forward({2, isa}, Tensor(out.data(), Dtype::kF32, count, C),
                              Tensor(lse.data(), Dtype::kF32, count, 3),
                              full.qkv_tensor().columns(0, C).slice(first, count), Tensor(), &s, 1,
                              full.positions.data() + first, 3);
            CHECK_MSG(std::memcmp(out.data(), &full.out[static_cast<size_t>(first * C)],
                                  out.size() * sizeof(float)) == 0 &&
                          std::memcmp(lse.data(), &full.lse[static_cast<size_t>(first * 3)],
                                      lse.size() * sizeof(float)) == 0,
                      describe(full, isa, s.mask) + ": " + std::to_string(count) +
                          " queries up to position " + std::to_string(q) + " differ from the full call");
          }
        }
      }
    }
  }
}

// Scattered queries of a sequence, as a sampler asks for them, without lse.
DN_TEST(attention_of_selected_queries) {
  for (const Isa isa : isas()) {
    for (const MaskKind kind : kRuleKinds) {
      for (const int64_t HS : {16, 32}) {
        Batch full(6, HS, {150}, mask_of(kind));
        full.forward(isa, 2);
        const int64_t C = full.C();
        const std::vector<int32_t> chosen = {149, 3, 77, 64, 0};
        std::vector<float> q, out(chosen.size() * static_cast<size_t>(C), kNan);
        for (const int32_t t : chosen)
          q.insert(q.end(), &full.qkv[static_cast<size_t>(t * 3 * C)],
                   &full.qkv[static_cast<size_t>(t * 3 * C)] + C);
        AttentionSequence s = full.sequences[0];
        s.q_end = static_cast<int64_t>(chosen.size());
        attention_forward({2, isa}, Tensor(out.data(), Dtype::kF32, s.q_end, C), Tensor(),
                          Tensor(q.data(), Dtype::kF32, s.q_end, C), full.qkv_tensor().columns(C, 2 * C), &s,
                          1, chosen.data(), 6);
        for (size_t i = 0; i < chosen.size(); ++i) {
          CHECK_MSG(
              std::memcmp(&out[i * static_cast<size_t>(C)], &full.out[static_cast<size_t>(chosen[i] * C)],
                          C * sizeof(float)) == 0,
              describe(full, isa, s.mask) + ": selected query " + std::to_string(chosen[i]) + " differs");
        }
      }
    }
  }
}

// Scores of a few hundred: the maximum must be subtracted before the exponential, and rescaling must not
// overflow.
DN_TEST(attention_with_large_scores) {
  for (const int64_t HS : {16, 32}) {
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
  for (const int64_t HS : {16, 32}) {
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

// A kernel may prepare the next block of keys; when nobody sees it and it has changed by the next call, what
// was prepared must not be used.
DN_TEST(attention_does_not_remember_keys) {
  const int32_t T = 128;
  std::vector<uint8_t> early(static_cast<size_t>(T) * T), late(early.size());
  for (int32_t i = 0; i < T * T; ++i) (i % T < 64 ? early : late)[static_cast<size_t>(i)] = 1;
  for (const Isa isa : isas()) {
    Batch b(1, 32, {T}, mask_of(MaskKind::kMatrix));
    AttentionMask& mask = b.sequences[0].mask;
    mask.matrix_width = T;
    mask.matrix = early.data();
    b.forward(isa, 1);
    for (float& x : b.qkv) x = -x;
    mask.matrix = late.data();
    b.forward(isa, 1);
    const Reference r = reference(b);
    CHECK_CLOSE(b.out.data(), r.out.data(), b.N * b.C(), 3e-6, describe(b, isa, mask) + " out");
  }
}

// Tiles add in another order than vectors do. Keys from a cache, and masks that make a cache exact, stay with
// the vectors.
DN_TEST(attention_takes_tiles_where_keys_are_not_cached) {
  if (detected_isa() < Isa::kAmx) return;
  for (const MaskKind kind : kRuleKinds) {
    Batch vectors(2, 64, {100}, mask_of(kind)), tiles = vectors;
    vectors.forward(Isa::kAvx512, 1);
    tiles.forward(Isa::kAmx, 1);
    const bool stays = kind == MaskKind::kCausal || kind == MaskKind::kBlockCausal;
    CHECK_MSG(same_bits(vectors.out, tiles.out) == stays, describe(tiles, Isa::kAmx, mask_of(kind)));

    // The first 40 rows as queries, the others as if they were a cache.
    AttentionSequence s;
    s.q_end = 40;
    s.k_len = 20;
    s.k = vectors.qkv.data() + 40 * 3 * vectors.C();
    s.v = vectors.qkv.data() + 70 * 3 * vectors.C();
    s.mask = mask_of(kind);
    s.mask.half = 10;
    std::vector<float> out[2];
    for (const Isa isa : {Isa::kAvx512, Isa::kAmx}) {
      std::vector<float>& o = out[isa == Isa::kAmx];
      o.assign(static_cast<size_t>(40 * vectors.C()), kNan);
      attention_forward({1, isa}, Tensor(o.data(), Dtype::kF32, 40, vectors.C()), Tensor(),
                        vectors.qkv_tensor().columns(0, vectors.C()).slice(0, 40), Tensor(), &s, 1,
                        vectors.positions.data(), 2);
    }
    CHECK_MSG(same_bits(out[0], out[1]), describe(tiles, Isa::kAmx, s.mask) + ": a cache went on tiles");
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
