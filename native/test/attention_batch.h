// What tests of attention share: batches of self-attention through the ops, the same in double with its
// gradient, masks of every kind and the instruction sets. Outputs start as NaN, so an element that is not
// written is a failure.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "core/backend.h"
#include "core/rng.h"
#include "cpu/kv_cache.h"
#include "cpu/ops.h"
#include "test/instruction_sets.h"

namespace dn::test::attention {

using namespace dn::cpu;

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

inline std::vector<Isa> isas() { return instruction_sets(); }

// Roughly normal, mean 0, variance 1.
inline std::vector<float> random_values(int64_t n, uint64_t seed) {
  std::vector<float> x(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) {
    double sum = -6;
    for (uint32_t j = 0; j < 12; ++j) sum += uniform(seed, Stream::kInit, j, static_cast<uint64_t>(i));
    x[static_cast<size_t>(i)] = static_cast<float>(sum);
  }
  return x;
}

// A cache that holds the rows of kv (n, 2C), written in pieces of one row and more; the rest is NaN.
inline std::vector<float> cache_of(Tensor kv, int64_t NH) {
  std::vector<float> cache(static_cast<size_t>(kv_cache_floats(kv.rows, kv.cols / 2)), kNan);
  for (int64_t t = 0, n = 1; t < kv.rows; t += n, n = n % 29 + 7) {
    n = std::min(n, kv.rows - t);
    kv_cache_write({1, Isa::kPortable}, cache.data(), t, kv.slice(t, n), NH);
  }
  return cache;
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
inline Reference reference(const Batch& b, const std::vector<double>& qkv) {
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

inline Reference reference(const Batch& b) {
  return reference(b, std::vector<double>(b.qkv.begin(), b.qkv.end()));
}

inline AttentionMask mask_of(MaskKind kind) {
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

inline std::string describe(const Batch& b, Isa isa, const AttentionMask& mask) {
  return std::string(isa_name(isa)) + " mask " + std::to_string(static_cast<int>(mask.kind)) + " HS " +
         std::to_string(b.HS);
}

}  // namespace dn::test::attention
