// Attention as plain loops: the reference that the vector kernels are tested against, and what runs on
// processors without AVX2. Forward is the online softmax: a running maximum and sum per query, rescaled when
// a block of keys raises the maximum (Milakov and Gimelshein, "Online normalizer calculation for softmax",
// 2018; Dao et al., "FlashAttention", 2022). Backward recomputes the probabilities from the saved
// log-sum-exp.
#include <cmath>
#include <limits>

#include "core/rng.h"
#include "cpu/attention_kernels.h"

namespace dn::cpu {
namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

bool sees(const uint64_t* words, int64_t row, int64_t key) { return !words || (words[row] >> key & 1) != 0; }

// b_step: between two numbers of b.
float dot(const float* a, const float* b, int64_t n, int64_t b_step = 1) {
  float sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += a[i] * b[i * b_step];
  return sum;
}

float score(const float* q, const KeyRows& keys, int64_t j, int64_t HS) {
  if (!keys.transposed) return dot(q, keys.k + j * keys.stride, HS);
  return dot(q, keys.k + j / kKeyGroup * HS * kKeyGroup + j % kKeyGroup, HS, kKeyGroup);
}

void forward_begin(const ForwardTile& t, const float* q, int64_t q_stride, const ForwardAhead&) {
  for (int64_t r = 0; r < t.rows; ++r) {
    for (int64_t d = 0; d < t.HS; ++d) {
      t.q[r * t.HSp + d] = q[r * q_stride + d] * t.scale;
      t.acc[r * t.HSp + d] = 0;
    }
    t.max[r] = kMinusInfinity;
    t.sum[r * kSumLanes] = 0;
  }
}

void forward_block(const ForwardTile& t, const KeyRows& keys, const uint64_t* words, const ForwardAhead&) {
  for (int64_t r = 0; r < t.rows; ++r) {
    float* acc = t.acc + r * t.HSp;
    float* scores = t.scores;
    float max = t.max[r];
    for (int64_t j = 0; j < keys.count; ++j) {
      if (!sees(words, r, j)) continue;
      scores[j] = score(t.q + r * t.HSp, keys, j, t.HS);
      if (!(scores[j] <= max)) max = scores[j];  // NaN, too, which then reaches the sum
    }
    if (max == kMinusInfinity) continue;  // nothing visible so far
    // exp(-inf) = 0: what was summed before the first visible key is nothing.
    const float factor = std::exp(t.max[r] - max);
    float sum = t.sum[r * kSumLanes] * factor;
    for (int64_t d = 0; d < t.HS; ++d) acc[d] *= factor;
    for (int64_t j = 0; j < keys.count; ++j) {
      if (!sees(words, r, j)) continue;
      const float p = std::exp(scores[j] - max);
      sum += p;
      for (int64_t d = 0; d < t.HS; ++d) acc[d] += p * keys.v[j * keys.stride + d];
    }
    t.max[r] = max;
    t.sum[r * kSumLanes] = sum;
  }
}

void forward_end(const ForwardTile& t, float* out, int64_t out_stride, float* lse, int64_t lse_stride) {
  for (int64_t r = 0; r < t.rows; ++r) {
    const float sum = t.sum[r * kSumLanes];
    const float inverse = t.max[r] == kMinusInfinity ? 0.0f : 1.0f / sum;
    for (int64_t d = 0; d < t.HS; ++d) out[r * out_stride + d] = t.acc[r * t.HSp + d] * inverse;
    if (lse) lse[r * lse_stride] = t.max[r] == kMinusInfinity ? 0.0f : t.max[r] + std::log(sum);
  }
}

void backward_begin(const BackwardTile& t, const float* q, int64_t stride, const float* dout,
                    int64_t dout_stride, const float* out, int64_t out_stride, const float* lse,
                    int64_t lse_stride) {
  for (int64_t r = 0; r < t.T; ++r) {
    for (int64_t d = 0; d < t.HS; ++d) {
      t.q[r * t.HSp + d] = q[r * stride + d] * t.scale;
      t.dout[r * t.HSp + d] = dout[r * dout_stride + d];
      t.dq[r * t.HSp + d] = 0;
    }
    t.delta[r] = dot(dout + r * dout_stride, out + r * out_stride, t.HS);
    t.lse[r] = lse[r * lse_stride];
  }
}

void backward_keys(const BackwardTile& t, const float* k, const float* v, int64_t stride) {
  for (int64_t j = 0; j < t.count; ++j) {
    for (int64_t d = 0; d < t.HS; ++d) {
      t.keys[j * t.HSp + d] = k[j * stride + d];
      t.values_t[j * t.HSp + d] = v[j * stride + d];  // here (count, HSp), not transposed
      t.dk[j * t.HSp + d] = 0;
      t.dv[j * t.HSp + d] = 0;
    }
  }
}

// With s = q . k (q scaled), p = e^(s - lse), out = sum p v:
//   dv += p dout,  dp = dout . v,  ds = p (dp - delta),  dq += ds k,  dk += ds q.
void backward_block(const BackwardTile& t, int64_t first, int64_t rows, const uint64_t* words) {
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t i = (first + r) * t.HSp;
    for (int64_t j = 0; j < t.count; ++j) {
      if (!sees(words, r, j)) continue;
      const float p = std::exp(dot(t.q + i, t.keys + j * t.HSp, t.HS) - t.lse[first + r]);
      const float dp = dot(t.dout + i, t.values_t + j * t.HSp, t.HS);
      const float ds = p * (dp - t.delta[first + r]);
      for (int64_t d = 0; d < t.HS; ++d) {
        t.dv[j * t.HSp + d] += p * t.dout[i + d];
        t.dk[j * t.HSp + d] += ds * t.q[i + d];
        t.dq[i + d] += ds * t.keys[j * t.HSp + d];
      }
    }
  }
}

void backward_keys_end(const BackwardTile& t, float* dk, float* dv, int64_t stride) {
  for (int64_t j = 0; j < t.count; ++j) {
    for (int64_t d = 0; d < t.HS; ++d) {
      dk[j * stride + d] = t.dk[j * t.HSp + d];
      dv[j * stride + d] = t.dv[j * t.HSp + d];
    }
  }
}

void backward_end(const BackwardTile& t, float* dq, int64_t stride) {
  for (int64_t r = 0; r < t.T; ++r) {
    for (int64_t d = 0; d < t.HS; ++d) dq[r * stride + d] = t.dq[r * t.HSp + d] * t.scale;
  }
}

uint64_t annealed_word(uint64_t seed, uint32_t stream, uint32_t step, uint32_t threshold, uint32_t q,
                       uint32_t k0) {
  uint64_t word = 0;
  for (uint32_t group = 0; group < 16; ++group) {
    const Philox4 r =
        philox(seed, static_cast<Stream>(stream), step, (static_cast<uint64_t>(q) << 32) | (k0 / 4 + group));
    for (uint32_t i = 0; i < 4; ++i) word |= static_cast<uint64_t>(r.v[i] < threshold) << (4 * group + i);
  }
  return word;
}

}  // namespace

const AttentionKernels kAttentionPortable = {
    {kVectorRows, 1, sizeof(float), 1, kVectorScores, 0, forward_begin, forward_block, forward_end},
    backward_begin,
    backward_keys,
    backward_block,
    backward_keys_end,
    backward_end,
    annealed_word};

}  // namespace dn::cpu
