// What the tests of the denoising loop share: the same steps one by one, with the samplers written out once
// more, plainly, on the host.
#pragma once

#include <algorithm>
#include <cstring>
#include <numeric>
#include <string>
#include <vector>

#include "core/denoise_loop.h"
#include "cuda/test/model_case.h"

namespace dn::cuda_test {

constexpr int32_t kLoopMask = 96;  // of kConfig's vocabulary

// Sequences, and what one step after the other makes of them.
class LoopCase {
 public:
  LoopRequest request;  // state before the next step; windows are absolute, counters advance

  // A canvas of T positions whose windows are open, in even parts of `block` positions from `begin` on.
  LoopSequence& add(int32_t T, int32_t begin, int32_t block, int32_t steps) {
    LoopSequence q;
    q.begin = static_cast<int64_t>(request.ids.size());
    q.end = q.begin + T;
    q.banned = kLoopMask;
    q.banned_end = request.sequences.size() % 2 == 1 ? 3 : -1;
    q.seed = request.sequences.size() + 5;
    q.window_begin = static_cast<int32_t>(request.windows.size());
    for (int32_t at = begin; at < T; at += block)
      request.windows.push_back({at, std::min(at + block, T), steps});
    q.window_end = static_cast<int32_t>(request.windows.size());
    for (int32_t i = 0; i < T; ++i) {
      // Every seventh position inside of the windows was given.
      const bool open = i >= begin && (i - begin) % 7 != 6;
      request.ids.push_back(open ? kLoopMask : (i * 37 + T) % 96);
      request.open.push_back(open ? 1 : 0);
    }
    request.sequences.push_back(q);
    return request.sequences.back();
  }

  int64_t open_count() const {
    return std::count(request.open.begin(), request.open.end(), static_cast<uint8_t>(1));
  }

  // One step of every sequence that has one left, through Model::forward and Model::denoise.
  void step(Model& model, LoopLog* log) {
    Batch batch;
    std::vector<int64_t> rows;
    std::vector<DenoiseRow> draws;
    std::vector<Choice> choices;
    for (LoopSequence& q : request.sequences) {
      choices.push_back(choose(&q));
      const Choice& choice = choices.back();
      if (choice.positions.empty()) continue;
      Sequence s;
      s.begin = static_cast<int64_t>(batch.ids.size());
      s.end = s.begin + q.end - q.begin;
      s.mask = q.mask;
      batch.sequences.push_back(s);
      for (int32_t i = 0; i < q.end - q.begin; ++i) {
        batch.ids.push_back(request.ids[idx(q.begin + i)]);
        batch.positions.push_back(i);
      }
      for (const int32_t position : choice.positions) {
        DenoiseRow draw;
        draw.row = static_cast<int64_t>(rows.size());
        draw.temperature = q.temperature;
        draw.top_p = q.top_p;
        draw.top_k = q.top_k;
        draw.banned = q.banned;
        draw.banned_end = q.banned_end;
        draw.seed = q.seed;
        draw.step = q.step;
        draw.position = static_cast<uint32_t>(position);
        draws.push_back(draw);
        rows.push_back(s.begin + position - q.shift);
      }
    }
    std::vector<DenoiseStats> stats(rows.size());
    if (!rows.empty()) {
      model.forward(batch, rows);
      model.denoise(stats.data(), nullptr, draws.data(), static_cast<int64_t>(draws.size()), nullptr, 0);
    }
    size_t row = 0;
    for (size_t s = 0; s < choices.size(); ++s) {
      LoopSequence& q = request.sequences[s];
      const Choice& choice = choices[s];
      const int32_t begin = static_cast<int32_t>(log->rows.size());
      const std::vector<int32_t> committed = decide(q, choice, stats.data() + row);
      for (const int32_t position : choice.positions) {
        LoopRow entry;
        entry.stats = stats[row++];
        entry.position = position;
        log->rows.push_back(entry);
      }
      for (const int32_t k : committed) {
        LoopRow& entry = log->rows[static_cast<size_t>(begin + k)];
        entry.committed = 1;
        request.ids[idx(q.begin + entry.position)] = entry.stats.drawn;
        request.open[idx(q.begin + entry.position)] = 0;
      }
      log->events.push_back({q.step, begin, static_cast<int32_t>(log->rows.size())});
      if (choice.positions.empty()) continue;
      ++q.step;
      ++q.block_step;
    }
  }

  // Runs the next steps in one call and one by one, and compares everything that is reported. Returns what
  // differs, empty: nothing.
  std::string compare(Model& model, int32_t steps) {
    // The loop rounds shapes up: a library's products may then have other last bits, and other ids be drawn.
    if (!rows_are_exact()) return "";
    request.steps = steps;
    LoopLog got, expected;
    model.denoise_steps(request, &got);
    for (int32_t t = 0; t < steps; ++t) step(model, &expected);
    if (got.events.size() != expected.events.size()) return "another number of events";
    for (size_t e = 0; e < got.events.size(); ++e) {
      const LoopEvent &a = got.events[e], &b = expected.events[e];
      const size_t S = request.sequences.size();
      const std::string where = "step " + std::to_string(e / S) + " of sequence " + std::to_string(e % S);
      if (a.end - a.begin != b.end - b.begin)
        return where + " looks at " + std::to_string(a.end - a.begin) + " rows, expected " +
               std::to_string(b.end - b.begin);
      if (a.end > a.begin && a.step != b.step) return where + " counts another step";
      for (int32_t r = 0; r < a.end - a.begin; ++r) {
        const LoopRow &x = got.rows[static_cast<size_t>(a.begin + r)],
                      &y = expected.rows[static_cast<size_t>(b.begin + r)];
        if (x.position != y.position || x.committed != y.committed ||
            std::memcmp(&x.stats, &y.stats, sizeof x.stats) != 0)
          return where + ", row " + std::to_string(r) + ": position " + std::to_string(x.position) + ", " +
                 std::to_string(x.committed) + ", drawn " + std::to_string(x.stats.drawn) +
                 ", expected position " + std::to_string(y.position) + ", " + std::to_string(y.committed) +
                 ", drawn " + std::to_string(y.stats.drawn);
      }
    }
    return "";
  }

 private:
  struct Choice {
    std::vector<int32_t> positions;
    bool all = false;  // everything is committed
    int32_t planned = 0;
  };

  Choice choose(LoopSequence* q) const {
    Choice choice;
    for (; q->window_begin < q->window_end; ++q->window_begin, q->block_step = 0) {
      const LoopWindow& window = request.windows[static_cast<size_t>(q->window_begin)];
      std::vector<int32_t> open;
      for (int32_t i = window.begin; i < window.end; ++i) {
        if (request.open[idx(q->begin + i)]) open.push_back(i);
      }
      if (open.empty()) continue;
      const int32_t n = static_cast<int32_t>(open.size());
      if (q->block_step == 0) q->initial_open = n;
      const auto random = [&](int32_t i) {
        return uniform(q->seed, Stream::kOrder, q->step, static_cast<uint64_t>(i));
      };
      choice.positions = open;
      if (q->sampler == LoopSampler::kAncestral) {
        // The step at which a position is revealed, drawn when the window began.
        const uint32_t drawn_at = q->step - static_cast<uint32_t>(q->block_step);
        std::vector<int32_t> due;
        while (due.empty()) {
          for (const int32_t i : open) {
            const double u = uniform(q->seed, Stream::kOrder, drawn_at, static_cast<uint64_t>(i));
            if (static_cast<int32_t>(u * window.steps) == q->block_step) due.push_back(i);
          }
          if (due.empty()) ++q->step, ++q->block_step;  // costs no forward
        }
        choice.all = true;
        choice.positions = due;
      } else if (q->sampler == LoopSampler::kConfidence) {
        while ((choice.planned = std::min(n, planned(*q, window.steps))) == 0) ++q->step, ++q->block_step;
        if (q->score == LoopScore::kRandom) {
          std::stable_sort(open.begin(), open.end(),
                           [&](int32_t a, int32_t b) { return random(a) > random(b); });
          open.resize(static_cast<size_t>(choice.planned));
          std::sort(open.begin(), open.end());
          choice.positions = open;
          choice.all = true;
        }
      } else {
        choice.all = window.steps > 0 && q->block_step + 1 >= window.steps;
      }
      return choice;
    }
    return choice;
  }

  static int32_t planned(const LoopSequence& q, int32_t steps) {
    const int32_t n = q.initial_open, step = q.block_step;
    if (q.plan == LoopPlan::kEven) return n / steps + (step < n % steps ? 1 : 0);
    const auto open_after = [&](int32_t passes) {
      return static_cast<int32_t>(std::floor(double(n) * (steps - passes) / steps));
    };
    return open_after(step) - open_after(step + 1);
  }

  // Indices into the choice's positions.
  static std::vector<int32_t> decide(const LoopSequence& q, const Choice& choice, const DenoiseStats* stats) {
    const int32_t n = static_cast<int32_t>(choice.positions.size());
    std::vector<int32_t> order(static_cast<size_t>(n));
    std::iota(order.begin(), order.end(), 0);
    if (choice.all || n == 0) return order;
    const auto score = [&](int32_t k) {
      const DenoiseStats& s = stats[k];
      const bool confidence = q.sampler == LoopSampler::kConfidence;
      return confidence && q.score == LoopScore::kMargin    ? s.margin
             : confidence && q.score == LoopScore::kEntropy ? -s.entropy
                                                            : s.probability;
    };
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return score(a) > score(b); });
    const auto at = [&](int32_t rank) { return stats[order[static_cast<size_t>(rank)]]; };
    int32_t count = 0;
    double sum = 0, largest = 0;
    switch (q.sampler) {
      case LoopSampler::kAncestral: break;
      case LoopSampler::kConfidence: count = choice.planned; break;
      case LoopSampler::kThreshold:
        for (count = 1; count < n && double(at(count).probability) >= q.parameter;) ++count;
        break;
      case LoopSampler::kFactor:
        for (count = 1; count < n && double(at(count).probability) >= 1 - q.parameter / (count + 2);) ++count;
        break;
      case LoopSampler::kEntropyBound:
        for (; count < n; ++count) {
          sum += double(at(count).entropy);
          largest = std::max(largest, double(at(count).entropy));
          if (count > 0 && sum - largest > q.parameter) break;
        }
        break;
    }
    order.resize(static_cast<size_t>(count));
    return order;
  }
};

// One of everything: every sampler, score and plan, with and without a bound on the steps, windows, given
// positions in between, the shift, both attentions, filters; lengths 1 to beyond a tile.
inline LoopCase mixed_loop() {
  LoopCase c;
  c.add(33, 5, 40, 4).sampler = LoopSampler::kAncestral;
  c.add(9, 0, 3, 2).score = LoopScore::kProbability;
  LoopSequence& margin = c.add(20, 1, 40, 7);
  margin.score = LoopScore::kMargin;
  margin.plan = LoopPlan::kLinear;
  margin.shift = 1;
  LoopSequence& entropy = c.add(70, 2, 30, 5);
  entropy.score = LoopScore::kEntropy;
  entropy.mask.kind = MaskKind::kBlockCausal;
  entropy.mask.block = 16;
  LoopSequence& random = c.add(12, 1, 11, 30);  // more steps than rows: most are skipped
  random.score = LoopScore::kRandom;
  random.plan = LoopPlan::kLinear;
  random.temperature = 0;
  LoopSequence& threshold = c.add(24, 0, 12, 0);
  threshold.sampler = LoopSampler::kThreshold;
  threshold.parameter = 0.1;
  threshold.top_k = 5;
  LoopSequence& factor = c.add(18, 0, 18, 0);
  factor.sampler = LoopSampler::kFactor;
  factor.parameter = 3.2;
  factor.temperature = 0.7f;
  LoopSequence& bound = c.add(30, 4, 30, 4);  // the fourth step commits the rest
  bound.sampler = LoopSampler::kEntropyBound;
  bound.parameter = 6;
  bound.top_p = 0.9f;
  c.add(1, 0, 1, 1).temperature = 0;
  return c;
}

}  // namespace dn::cuda_test
