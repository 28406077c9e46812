// A batch for the attention ops, on the device and as a reference in double.
#pragma once

#include "cuda/test/support.h"

namespace dn::cuda_test {

inline AttentionMask mask_of(MaskKind kind) {
  AttentionMask mask;
  mask.kind = kind;
  mask.block = 5;
  mask.threshold = annealing_threshold(0.3);
  mask.seed = 99;
  mask.step = 7;
  return mask;
}

struct AttentionCase {
  Backend& device;
  Dtype dtype;
  int64_t NH, HS, N = 0;
  std::vector<AttentionSequence> sequences;
  std::vector<int32_t> positions;
  std::vector<uint8_t> matrix;
  std::unique_ptr<Array> qkv, dout, out, lse, dqkv;

  AttentionCase(Dtype type, int64_t heads, int64_t head_size, const std::vector<int64_t>& lengths,
                const std::vector<MaskKind>& kinds)
      : device(backend(type)), dtype(type), NH(heads), HS(head_size) {
    int64_t longest = 0;
    for (const int64_t T : lengths) longest = std::max(longest, T);
    matrix.resize(idx(longest * longest));
    for (size_t i = 0; i < matrix.size(); ++i) matrix[i] = i % 3 != 1;
    for (size_t s = 0; s < lengths.size(); ++s) {
      const int64_t T = lengths[s];
      AttentionSequence a;
      a.q_begin = a.kv_begin = N;
      a.q_end = N += T;
      a.k_len = T;
      a.mask = mask_of(kinds[s % kinds.size()]);
      a.mask.half = static_cast<int32_t>((T + 1) / 2);
      a.mask.matrix = matrix.data();
      a.mask.matrix_width = static_cast<int32_t>(longest);
      sequences.push_back(a);
      for (int64_t t = 0; t < T; ++t) positions.push_back(static_cast<int32_t>(t));
    }
    qkv = std::make_unique<Array>(device, dtype, N, 3 * C(), random_values(N * 3 * C(), 1));
    dout = std::make_unique<Array>(device, dtype, N, C(), random_values(N * C(), 2));
    out = std::make_unique<Array>(device, dtype, N, C());
    lse = std::make_unique<Array>(device, Dtype::kF32, N, NH);
    dqkv = std::make_unique<Array>(device, dtype, N, 3 * C());
  }

  int64_t C() const { return NH * HS; }

  void forward() {
    device.attention_forward(out->tensor(), lse->tensor(), qkv->tensor().columns(0, C()),
                             qkv->tensor().columns(C(), 2 * C()), sequences.data(),
                             static_cast<int64_t>(sequences.size()), positions.data(), NH);
  }
  void backward() {
    device.attention_backward(dqkv->tensor(), dout->tensor(), qkv->tensor(), out->tensor(), lse->tensor(),
                              sequences.data(), static_cast<int64_t>(sequences.size()), positions.data(), NH);
  }

  struct Reference {
    Doubles out, lse, dqkv;
  };
  // One pair at a time.
  Reference reference() const {
    const Doubles x = to_doubles(qkv->host()), g = to_doubles(dout->host());
    Reference r{Doubles(idx(N * C()), 0), Doubles(idx(N * NH), 0), Doubles(idx(N * 3 * C()), 0)};
    const double scale = 1 / std::sqrt(static_cast<double>(HS));
    for (const AttentionSequence& s : sequences) {
      const int64_t T = s.k_len;
      Doubles p(idx(T)), dp(idx(T));
      for (int64_t h = 0; h < NH; ++h) {
        for (int64_t row = s.q_begin; row < s.q_end; ++row) {
          const double* q = x.data() + row * 3 * C() + h * HS;
          const double* go = g.data() + row * C() + h * HS;
          double max = -1e300, sum = 0, delta = 0;
          for (int64_t j = 0; j < T; ++j) {
            const double* k = x.data() + (s.kv_begin + j) * 3 * C() + C() + h * HS;
            double score = 0;
            for (int64_t d = 0; d < HS; ++d) score += q[d] * k[d];
            p[idx(j)] =
                visible(s.mask, positions[idx(row)], static_cast<int32_t>(j)) ? score * scale : -1e300;
            max = std::max(max, p[idx(j)]);
          }
          if (max == -1e300) continue;
          for (double& w : p) sum += w = w == -1e300 ? 0 : std::exp(w - max);
          r.lse[idx(row * NH + h)] = max + std::log(sum);
          for (int64_t j = 0; j < T; ++j) {
            p[idx(j)] /= sum;
            const int64_t v = (s.kv_begin + j) * 3 * C() + 2 * C() + h * HS;
            dp[idx(j)] = 0;
            for (int64_t d = 0; d < HS; ++d) {
              r.out[idx(row * C() + h * HS + d)] += p[idx(j)] * x[idx(v + d)];
              dp[idx(j)] += go[d] * x[idx(v + d)];
              r.dqkv[idx(v + d)] += p[idx(j)] * go[d];
            }
            delta += p[idx(j)] * dp[idx(j)];
          }
          for (int64_t j = 0; j < T; ++j) {
            const double ds = p[idx(j)] * (dp[idx(j)] - delta) * scale;
            const int64_t k = (s.kv_begin + j) * 3 * C() + C() + h * HS;
            for (int64_t d = 0; d < HS; ++d) {
              r.dqkv[idx(row * 3 * C() + h * HS + d)] += ds * x[idx(k + d)];
              r.dqkv[idx(k + d)] += ds * q[d];
            }
          }
        }
      }
    }
    return r;
  }

  // Runs both directions and compares. Errors beyond rounding are failures.
  void check(const std::string& what) {
    const Reference r = reference();
    forward();
    backward();
    CHECK_ERROR(out->get(), r.out, tolerance(dtype), what + ", out");
    const std::vector<float> got = lse->get();
    CHECK_CLOSE(got.data(), r.lse.data(), static_cast<int64_t>(r.lse.size()), 2e-5, what + ", lse");
    CHECK_ERROR(dqkv->get(), r.dqkv, 1.5 * tolerance(dtype), what + ", dqkv");
  }
};

}  // namespace dn::cuda_test
