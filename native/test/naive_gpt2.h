// GPT-2 once more, in double, written the obvious way and without a line of native/core/model*.cpp: the
// reference that model tests compare with and take finite differences of. Parameters are plain arrays in the
// order of the parameter table. Also the batches, weights and masks that several tests share.
#pragma once

#include <cmath>
#include <memory>
#include <string>
#include <vector>

#include "core/model.h"
#include "core/rng.h"

namespace dn::test {

using Doubles = std::vector<double>;

// A fixed sequence of numbers, so that tests do not depend on a library's generator.
class Numbers {
 public:
  explicit Numbers(uint64_t seed) : seed_(seed) {}
  double uniform01() { return uniform(seed_, Stream::kData, 0, count_++); }
  double normal() {
    const double u = 1 - uniform01(), v = uniform01();
    return std::sqrt(-2 * std::log(u)) * std::cos(6.283185307179586 * v);
  }
  int32_t below(int32_t n) { return static_cast<int32_t>(uniform01() * n); }

 private:
  uint64_t seed_;
  uint64_t count_ = 0;
};

struct NaiveGpt2 {
  ModelConfig config;
  std::vector<Doubles> p;

  // x (rows, K) times w (K, N) row-major, plus b (N).
  static Doubles product(const Doubles& x, const Doubles& w, const Doubles& b, size_t K) {
    const size_t N = b.size(), rows = x.size() / K;
    Doubles y(rows * N);
    for (size_t r = 0; r < rows; ++r) {
      for (size_t n = 0; n < N; ++n) y[r * N + n] = b[n];
      for (size_t k = 0; k < K; ++k) {
        for (size_t n = 0; n < N; ++n) y[r * N + n] += x[r * K + k] * w[k * N + n];
      }
    }
    return y;
  }

  static Doubles norm(const Doubles& x, const Doubles& w, const Doubles& b) {
    const size_t C = w.size();
    Doubles y(x.size());
    for (size_t r = 0; r < x.size() / C; ++r) {
      double mean = 0, variance = 0;
      for (size_t c = 0; c < C; ++c) mean += x[r * C + c] / static_cast<double>(C);
      for (size_t c = 0; c < C; ++c) variance += std::pow(x[r * C + c] - mean, 2) / static_cast<double>(C);
      for (size_t c = 0; c < C; ++c)
        y[r * C + c] = (x[r * C + c] - mean) / std::sqrt(variance + 1e-5) * w[c] + b[c];
    }
    return y;
  }

  // q, k, v side by side in rows of qkv; one sequence.
  Doubles attention(const Doubles& qkv, size_t T, const int32_t* q_positions,
                    const AttentionMask& mask) const {
    const size_t C = static_cast<size_t>(config.channels), NH = static_cast<size_t>(config.heads),
                 HS = C / NH;
    Doubles out(T * C);
    for (size_t h = 0; h < NH; ++h) {
      for (size_t i = 0; i < T; ++i) {
        Doubles e(T, 0.0);
        double sum = 0;
        for (size_t j = 0; j < T; ++j) {
          if (!visible(mask, q_positions[i], static_cast<int32_t>(j))) continue;
          double dot = 0;
          for (size_t c = 0; c < HS; ++c)
            dot += qkv[i * 3 * C + h * HS + c] * qkv[j * 3 * C + C + h * HS + c];
          sum += e[j] = std::exp(dot / std::sqrt(static_cast<double>(HS)));
        }
        for (size_t j = 0; j < T; ++j) {
          if (e[j] == 0) continue;
          for (size_t c = 0; c < HS; ++c)
            out[i * C + h * HS + c] += e[j] / sum * qkv[j * 3 * C + 2 * C + h * HS + c];
        }
      }
    }
    return out;
  }

  // Logits (T, V) of one sequence.
  Doubles sequence_logits(const int32_t* ids, const int32_t* positions, const int32_t* q_positions, size_t T,
                          const AttentionMask& mask) const {
    const size_t C = static_cast<size_t>(config.channels), V = static_cast<size_t>(config.vocab);
    Doubles h(T * C);
    for (size_t t = 0; t < T; ++t) {
      for (size_t c = 0; c < C; ++c) {
        h[t * C + c] =
            p[0][static_cast<size_t>(ids[t]) * C + c] + p[1][static_cast<size_t>(positions[t]) * C + c];
      }
    }
    size_t i = 2;
    for (int32_t layer = 0; layer < config.layers; ++layer, i += 12) {
      const Doubles qkv = product(norm(h, p[i], p[i + 1]), p[i + 2], p[i + 3], C);
      const Doubles branch = product(attention(qkv, T, q_positions, mask), p[i + 4], p[i + 5], C);
      for (size_t e = 0; e < h.size(); ++e) h[e] += branch[e];
      Doubles fc = product(norm(h, p[i + 6], p[i + 7]), p[i + 8], p[i + 9], C);
      for (double& u : fc)
        u = 0.5 * u * (1 + std::tanh(std::sqrt(2 / 3.14159265358979323846) * (u + 0.044715 * u * u * u)));
      const Doubles mlp = product(fc, p[i + 10], p[i + 11], 4 * C);
      for (size_t e = 0; e < h.size(); ++e) h[e] += mlp[e];
    }
    h = norm(h, p[i], p[i + 1]);
    Doubles logits(T * V);
    for (size_t t = 0; t < T; ++t) {
      for (size_t v = 0; v < V; ++v) {
        for (size_t c = 0; c < C; ++c) logits[t * V + v] += h[t * C + c] * p[0][v * C + c];
      }
    }
    return logits;
  }

  // Logits (N, V) of a batch without caches.
  Doubles logits(const Batch& batch) const {
    Doubles all;
    const auto& masked = batch.mask_positions.empty() ? batch.positions : batch.mask_positions;
    for (const Sequence& s : batch.sequences) {
      const Doubles part = sequence_logits(
          &batch.ids[static_cast<size_t>(s.begin)], &batch.positions[static_cast<size_t>(s.begin)],
          &masked[static_cast<size_t>(s.begin)], static_cast<size_t>(s.end - s.begin), s.mask);
      all.insert(all.end(), part.begin(), part.end());
    }
    return all;
  }

  // Cross-entropies of the loss rows.
  Doubles losses(const Batch& batch, const LossRows& rows) const {
    const Doubles all = logits(batch);
    const size_t V = static_cast<size_t>(config.vocab);
    Doubles out;
    for (size_t r = 0; r < rows.rows.size(); ++r) {
      const double* l = &all[static_cast<size_t>(rows.rows[r]) * V];
      double sum = 0;
      for (size_t v = 0; v < V; ++v) sum += std::exp(l[v]);
      out.push_back(std::log(sum) - l[rows.targets[r]]);
    }
    return out;
  }

  double weighted_loss(const Batch& batch, const LossRows& rows) const {
    const Doubles l = losses(batch, rows);
    double sum = 0;
    for (size_t r = 0; r < l.size(); ++r) sum += static_cast<double>(rows.weights[r]) * l[r];
    return sum;
  }
};

inline ModelConfig tiny_config(int32_t channels = 16, int32_t vocab = 11) {
  ModelConfig config;
  config.layers = 2;
  config.heads = 2;
  config.channels = channels;
  config.context = 12;
  config.vocab = vocab;
  return config;
}

// Weights far larger than an initialised model's, so that every part of the network matters to the result.
inline NaiveGpt2 random_weights(const ModelConfig& config, uint64_t seed) {
  NaiveGpt2 naive;
  naive.config = config;
  Numbers numbers(seed);
  for (const Parameter& parameter : make_parameter_table(config)) {
    const bool is_norm = parameter.shape.size() == 1 && parameter.name.find("ln_") != std::string::npos &&
                         parameter.name.find("weight") != std::string::npos;
    Doubles values(static_cast<size_t>(parameter.count));
    for (double& x : values)
      x = static_cast<float>((is_norm ? 1 : 0) + 0.35 * numbers.normal());  // exact in fp32
    naive.p.push_back(values);
  }
  return naive;
}

inline void set_weights(Model& model, const NaiveGpt2& naive) {
  for (size_t i = 0; i < naive.p.size(); ++i) {
    const std::vector<float> values(naive.p[i].begin(), naive.p[i].end());
    model.set_parameter(i, values.data());
  }
}

inline std::unique_ptr<Model> make_model(const NaiveGpt2& naive, int threads = 2) {
  auto model = std::make_unique<Model>(make_cpu_backend(threads), naive.config);
  set_weights(*model, naive);
  return model;
}

// Appends a sequence of random ids at positions 0 ..
inline void append_sequence(Batch& batch, Numbers& numbers, int32_t length, int32_t vocab,
                            const AttentionMask& mask) {
  Sequence s;
  s.begin = static_cast<int64_t>(batch.ids.size());
  s.end = s.begin + length;
  s.k_len = length;
  s.mask = mask;
  for (int32_t t = 0; t < length; ++t) {
    batch.ids.push_back(numbers.below(vocab));
    batch.positions.push_back(t);
  }
  batch.sequences.push_back(s);
}

struct NamedMask {
  const char* name;
  AttentionMask mask;
};

// One of every kind, for sequences of at most 12 tokens.
inline std::vector<NamedMask> all_masks() {
  static std::vector<uint8_t> matrix(12 * 12);
  Numbers numbers(99);
  for (size_t i = 0; i < matrix.size(); ++i) matrix[i] = numbers.uniform01() < 0.5;
  for (size_t k = 0; k < 12; ++k) matrix[3 * 12 + k] = 0;  // a query that sees nothing
  std::vector<NamedMask> masks{{"full", {}},         {"causal", {}},          {"annealed", {}},
                               {"block-causal", {}}, {"block-diffusion", {}}, {"matrix", {}}};
  const MaskKind kinds[] = {MaskKind::kFull,        MaskKind::kCausal,         MaskKind::kAnnealed,
                            MaskKind::kBlockCausal, MaskKind::kBlockDiffusion, MaskKind::kMatrix};
  for (size_t i = 0; i < masks.size(); ++i) {
    AttentionMask& mask = masks[i].mask;
    mask.kind = kinds[i];
    mask.block = 3;
    mask.half = 6;
    mask.threshold = annealing_threshold(0.4);
    mask.seed = 5;
    mask.step = 7;
    mask.matrix = matrix.data();
    mask.matrix_width = 12;
  }
  return masks;
}

// The doubled sequence [x_t ; x_0]: wpe positions restart at the clean copy, mask positions go on.
inline void double_positions(Batch& batch) {
  batch.mask_positions = batch.positions;
  for (const Sequence& s : batch.sequences) {
    if (s.mask.kind != MaskKind::kBlockDiffusion) continue;
    for (int64_t n = s.begin + s.mask.half; n < s.end; ++n)
      batch.positions[static_cast<size_t>(n)] -= s.mask.half;
  }
}

}  // namespace dn::test
