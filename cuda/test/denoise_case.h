// Rows for head + denoise in bf16, on the device and as logits in double, and what is wrong with statistics
// and draws of theirs. Ties for the best are planted in rows 0 and 1 of the list.
#pragma once

#include <algorithm>

#include "cuda/test/support.h"

namespace dn::cuda_test {

struct DenoiseCase {
  static constexpr int64_t kHidden =
      211;  // rows of hidden; a prime, so that lists of up to as many are distinct

  Backend& device = backend(Dtype::kBF16);
  int64_t V, C, R;
  std::vector<DenoiseRow> rows;
  std::vector<int32_t> watch;
  std::vector<float> hidden_values, wte_values;  // as the device has them
  std::unique_ptr<Array> hidden, wte;

  DenoiseCase(int64_t vocabulary, int64_t channels, int64_t count) : V(vocabulary), C(channels), R(count) {
    const Array rounded(device, Dtype::kBF16, kHidden, C, random_values(kHidden * C, 2));
    hidden_values = rounded.host();
    wte_values = random_values(V * C, 1, 0.5f);
    for (int64_t r = 0; r < R; ++r) {
      DenoiseRow row;
      row.row = (r * 7 + 3) % kHidden;
      row.temperature = r % 4 == 0 ? 1.0f : r % 4 == 1 ? 0.0f : r % 4 == 2 ? 0.6f : 1.8f;
      row.banned = r % 5 == 2 ? static_cast<int32_t>(r % V) : r % 5 == 4 ? static_cast<int32_t>(V - 1) : -1;
      if (r % 5 > 2 && V > 2) row.banned_end = static_cast<int32_t>(r * 3 % (V - 1));
      row.seed = 99;
      row.step = static_cast<uint32_t>(r / 50);
      row.position = static_cast<uint32_t>(r);
      rows.push_back(row);
    }
    // Neighbouring lanes, the higher one with the lower id; and two tiles.
    plant_tie(0, 3, 8);
    if (R > 1) plant_tie(1, 5, V - 1);
    for (float& x : wte_values) x = bf16_to_f32(f32_to_bf16(x));
    watch = {0, static_cast<int32_t>(V / 2), static_cast<int32_t>(V - 1)};
    hidden = std::make_unique<Array>(device, Dtype::kBF16, kHidden, C, hidden_values);
    wte = std::make_unique<Array>(device, Dtype::kF32, V, C, wte_values);
  }

  // The weights of two ids point along a row's hidden state.
  void plant_tie(int64_t r, int64_t a, int64_t b) {
    for (int64_t c = 0; c < C; ++c)
      wte_values[idx(a * C + c)] = wte_values[idx(b * C + c)] =
          0.2f * hidden_values[idx(rows[idx(r)].row * C + c)];
  }

  Weight head() const {
    Weight w;
    w.data = wte->data();
    w.order = WeightOrder::kOutIn;
    w.K = C;
    w.N = V;
    return w;
  }

  struct Results {
    std::vector<DenoiseStats> stats;
    std::vector<float> watched;
  };
  Results run(Tensor from, const std::vector<DenoiseRow>& list) const {
    Results results{std::vector<DenoiseStats>(list.size()),
                    std::vector<float>(list.size() * watch.size(), kNan)};
    device.head_denoise(results.stats.data(), results.watched.data(), from, list.data(),
                        static_cast<int64_t>(list.size()), watch.data(), static_cast<int64_t>(watch.size()),
                        head());
    return results;
  }
  Results run() const { return run(hidden->tensor(), rows); }

  // The first thing that is wrong in the results, empty when nothing is. Where logits lie closer than
  // rounding either may be the best, and a draw may fall on either side of a boundary that is as close.
  std::string mistake(const Results& results) const {
    for (int64_t r = 0; r < R; ++r) {
      const std::string what = mistake_of(rows[idx(r)], results.stats[idx(r)],
                                          results.watched.data() + r * static_cast<int64_t>(watch.size()));
      if (!what.empty())
        return "V = " + std::to_string(V) + ", C = " + std::to_string(C) + ", R = " + std::to_string(R) +
               ", row " + std::to_string(r) + ": " + what;
    }
    return "";
  }

 private:
  std::string mistake_of(const DenoiseRow& row, const DenoiseStats& got, const float* watched) const {
    Doubles x(idx(V), 0);
    for (int64_t v = 0; v < V; ++v) {
      for (int64_t c = 0; c < C; ++c)
        x[idx(v)] += static_cast<double>(hidden_values[idx(row.row * C + c)]) *
                     static_cast<double>(wte_values[idx(v * C + c)]);
    }
    for (const int32_t banned : {row.banned, row.banned_end}) {
      if (banned >= 0) x[idx(banned)] = -std::numeric_limits<double>::infinity();
    }
    const int64_t best = std::max_element(x.begin(), x.end()) - x.begin();  // the first among equals
    double total = 0, entropy = 0, second = -std::numeric_limits<double>::infinity();
    for (int64_t v = 0; v < V; ++v) {
      total += std::exp(x[idx(v)] - x[idx(best)]);
      if (v != best) second = std::max(second, x[idx(v)]);
    }
    const auto log_probability = [&](int64_t v) { return x[idx(v)] - x[idx(best)] - std::log(total); };
    for (int64_t v = 0; v < V; ++v) {
      if (std::isfinite(x[idx(v)])) entropy -= std::exp(log_probability(v)) * log_probability(v);
    }
    const auto differs = [](double a, double b, double allowed) { return !(std::fabs(a - b) <= allowed); };
    const auto says = [](const std::string& name, double a, double b) {
      return name + " is " + std::to_string(a) + ", expected " + std::to_string(b);
    };
    if (got.best < 0 || got.best >= V || got.drawn < 0 || got.drawn >= V) return "an id out of range";
    const double behind = x[idx(best)] - x[idx(got.best)];
    if (got.best != best && (behind == 0 || !(behind < 1e-4)))
      return says("the best", got.best, static_cast<double>(best));
    const double margin = (1 - std::exp(second - x[idx(best)])) / total;
    if (differs(got.probability, 1 / total, 2e-5)) return says("the probability", got.probability, 1 / total);
    if (differs(got.margin, margin, 2e-5)) return says("the margin", got.margin, margin);
    if (differs(got.entropy, entropy, 1e-4)) return says("the entropy", got.entropy, entropy);
    if (differs(got.drawn_log_prob, log_probability(got.drawn), 1e-4))
      return says("the draw's log probability", got.drawn_log_prob, log_probability(got.drawn));
    for (size_t w = 0; w < watch.size(); ++w) {
      const double expected = std::exp(log_probability(watch[w]));
      if (differs(watched[w], expected, 2e-5)) return says("a watched probability", watched[w], expected);
    }
    if (row.temperature == 0) return got.drawn == got.best ? "" : says("the draw", got.drawn, got.best);

    double mass = 0, below = 0, own = 0;
    for (int64_t v = 0; v < V; ++v) {
      const double m = std::exp((x[idx(v)] - x[idx(best)]) / static_cast<double>(row.temperature));
      if (v < got.drawn) below += m;
      if (v == got.drawn) own = m;
      mass += m;
    }
    const double target = uniform(row.seed, Stream::kDraw, row.step, row.position) * mass,
                 close = 1e-5 * mass;
    if (!(own > 0) || target < below - close || target > below + own + close)
      return "id " + std::to_string(got.drawn) + " was drawn, which holds " + std::to_string(below) + " to " +
             std::to_string(below + own) + ", not " + std::to_string(target);
    return "";
  }
};

}  // namespace dn::cuda_test
