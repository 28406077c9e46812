// What top-p and top-k keep: draws of denoise_row against the kept set of the formula, up to a real
// vocabulary and with ties at the boundary, and the selection of a threshold against sorting.

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "core/backend.h"
#include "core/rng.h"
#include "cpu/head_kernels.h"
#include "test/check.h"
#include "test/sampling_row.h"

using namespace dn;
using namespace dn::test::sampling;

// Which ids can be drawn at all: each draw lies in the kept set of the formula, and each kept id turns up.
DN_TEST(sampling_filters_keep_exactly_the_right_ids) {
  constexpr int64_t kTries = dn::test::kSanitized ? 1000 : 5000;
  for (const Isa isa : isas()) {
    for (const int64_t V : {2, 17, 257, 1000}) {
      const std::vector<float> logits = made_up_logits(V, 11);
      Row row(isa, logits);
      for (const DenoiseRow& filter : {options(1, 1e-6f), options(1, 0.3f), options(1, 0.97f),
                                       options(4, 0.5f), options(1, 1, 1), options(1, 1, 2), options(1, 1, 7),
                                       options(3, 0.6f, 4), options(3, 0.1f, 16), options(1, 1, 5000)}) {
        const std::vector<double> p = expected_distribution(logits, {}, filter);
        const std::vector<int64_t> counts = row.counts(filter, kTries);
        for (size_t v = 0; v < p.size(); ++v) {
          const std::string what = "id " + std::to_string(v) + " of " + std::to_string(V) + ", top-p " +
                                   std::to_string(filter.top_p) + ", top-k " + std::to_string(filter.top_k);
          if (p[v] == 0) CHECK_MSG(counts[v] == 0, "dropped, yet drawn: " + what);
          if (p[v] * kTries > 30) CHECK_MSG(counts[v] > 0, "kept, yet never drawn: " + what);  // e^-30
        }
      }
    }
  }
}

DN_TEST(sampling_filters_keep_ties_at_the_boundary) {
  const std::vector<float> logits = {1, 2, 2, 1, 3, 2, 0};
  for (const Isa isa : isas()) {
    Row row(isa, logits);
    std::vector<int64_t> n = row.counts(options(1, 1, 2), 5000);
    CHECK(n[4] > 0 && n[1] > 0 && n[2] > 0 && n[5] > 0 && n[0] == 0 && n[3] == 0 && n[6] == 0);
    n = row.counts(options(1, 0.5f),
                   5000);  // masses e^0 and three e^-1 of 2.41: the best has 0.41, so the ties enter
    CHECK(n[4] > 0 && n[1] > 0 && n[2] > 0 && n[5] > 0 && n[0] == 0 && n[3] == 0 && n[6] == 0);
  }
}

DN_TEST(sampling_select_threshold_matches_sorting) {
  struct Item {
    float value, mass;
  };
  for (int round = 0; round < 300; ++round) {
    const int64_t n = round < 240 ? 1 + round * 7 % 400 : 2000 + 300 * (round - 240);
    std::vector<Item> items;
    for (int64_t i = 0; i < n; ++i) {
      const Philox4 r = philox(17, Stream::kInit, static_cast<uint32_t>(round), static_cast<uint64_t>(i));
      const double u = uniform53(r.v[0], r.v[1]);
      float value = static_cast<float>(10 * u - 5);
      if (round % 3 == 1) value = std::floor(value);  // many ties
      if (round % 3 == 2)
        value = static_cast<float>(std::exp(170 * u - 85)) * (r.v[2] % 2 ? 1 : -1);  // all magnitudes
      items.push_back({value, static_cast<float>(r.v[3] % 8)});                      // sums are exact
    }
    double total = 0;
    for (const Item& item : items) total += static_cast<double>(item.mass);
    for (const double share : {0.0, 0.1, 0.5, 0.9, 1.0}) {
      const double budget = std::floor(share * total);
      std::vector<Item> sorted = items;
      std::sort(sorted.begin(), sorted.end(), [](const Item& a, const Item& b) { return a.value > b.value; });
      float expected = sorted[0].value;
      double preceding = 0;
      for (size_t i = 0; i < sorted.size();) {
        if (preceding > budget) break;
        expected = sorted[i].value;
        const float value = sorted[i].value;
        for (; i < sorted.size() && sorted[i].value == value; ++i)
          preceding += static_cast<double>(sorted[i].mass);
      }
      for (const Isa isa : isas()) {
        std::vector<float> values, masses;
        for (const Item& item : items) {
          values.push_back(item.value);
          masses.push_back(item.mass);
        }
        values.resize(values.size() + 16);
        masses.resize(masses.size() + 16);
        CHECK(cpu::select_threshold(
                  {values.data(), masses.data(), nullptr, n, sorted.back().value, sorted.front().value},
                  budget, values.data(), masses.data(), cpu::head_kernels(isa)) == expected);
      }
    }
  }
}

// A budget that nothing exceeds, and a lower bound that is far below every value: the answer is the least
// one.
DN_TEST(sampling_select_threshold_with_room_below) {
  const int64_t n = 5000;
  for (const Isa isa : isas()) {
    std::vector<float> x, mass(static_cast<size_t>(n), 1.0f), values(static_cast<size_t>(n) + 16, -7.0f),
        masses(static_cast<size_t>(n) + 16, -7.0f);
    for (int64_t i = 0; i < n; ++i) x.push_back(3 + static_cast<float>(i * 37 % n) / static_cast<float>(n));
    for (const double budget : {5000.0, 6000.0}) {
      CHECK(cpu::select_threshold({x.data(), mass.data(), nullptr, n, -40, 4}, budget, values.data(),
                                  masses.data(), cpu::head_kernels(isa)) == 3.0f);
    }
  }
}

// At the size of a real vocabulary the kernels and the formulas must agree on the kept set: the draws of many
// positions reach both ends of it.
DN_TEST(sampling_filters_at_full_vocabulary) {
  const int64_t V = 50257;
  for (const bool flat : {false, true}) {
    std::vector<float> logits;
    for (int64_t v = 0; v < V; ++v) {
      const double u = uniform(2, Stream::kInit, 2, static_cast<uint64_t>(v));
      logits.push_back(
          static_cast<float>(flat ? 0.5 * u : -2.0 * std::log(u + 1e-9)));  // flat, or a heavy tail
    }
    for (const Isa isa : isas()) {
      if (dn::test::kSanitized && isa != isas().back()) continue;
      Row row(isa, logits);
      for (const DenoiseRow& filter :
           {options(1, 0.9f), options(0.8f, 0.999f, 300), options(2, 1, 50), options(1, 0.5f, 150)}) {
        const std::vector<double> p = expected_distribution(logits, {}, filter);
        const int64_t draws = dn::test::kSanitized ? 50 : isa == Isa::kPortable ? 200 : 1000;
        const std::vector<int64_t> counts = row.counts(filter, draws);
        double mean = 0, drawn_mean = 0, square = 0;
        for (size_t v = 0; v < p.size(); ++v) {
          CHECK(p[v] > 0 || counts[v] == 0);
          const double x = static_cast<double>(logits[v]);
          mean += p[v] * x;
          square += p[v] * x * x;
          drawn_mean += static_cast<double>(counts[v]) * x / static_cast<double>(draws);
        }
        const double deviation = std::sqrt((square - mean * mean) / static_cast<double>(draws));
        CHECK_MSG(std::fabs(drawn_mean - mean) < 4 * deviation + 1e-6,
                  "mean logit drawn " + std::to_string(drawn_mean) + ", expected " + std::to_string(mean) +
                      " +- " + std::to_string(deviation));
      }
    }
  }
}
