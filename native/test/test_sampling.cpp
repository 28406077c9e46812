// The draws of a denoising step, on distributions: hand-made logits through denoise_row, counts against the
// formulas by chi-square. A test fails below p = 1e-4; seeds are fixed, so it fails always or never. Two
// planted bugs must fail.

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "core/backend.h"
#include "core/divergence.h"
#include "core/rng.h"
#include "cpu/head_kernels.h"
#include "test/check.h"

namespace {

using namespace dn;
using cpu::Isa;

constexpr double kThreshold = 1e-4;
constexpr int64_t kDraws = dn::test::kSanitized ? 40000 : 200000;

std::vector<Isa> instruction_sets() {
  std::vector<Isa> sets;
  for (const Isa isa : {Isa::kPortable, Isa::kAvx2, Isa::kAvx512}) {
    if (isa <= cpu::detected_isa()) sets.push_back(isa);
  }
  return sets;
}

// Drives denoise_row on copies of one row of logits.
class Row {
 public:
  Row(Isa isa, std::vector<float> logits, std::vector<float> guide = {})
      : kernels_(cpu::head_kernels(isa)),
        logits_(std::move(logits)),
        guide_(std::move(guide)),
        scratch_(logits_.size()),
        memory_(static_cast<size_t>(cpu::denoise_workspace_floats(V())) + 16) {
    workspace_ = memory_.data();
    while (reinterpret_cast<uintptr_t>(workspace_) % 64 != 0) ++workspace_;
  }
  int64_t V() const { return static_cast<int64_t>(logits_.size()); }

  DenoiseStats denoise(const DenoiseRow& row) {
    std::copy(logits_.begin(), logits_.end(), scratch_.begin());
    DenoiseStats stats;
    CHECK(denoise_fault(row, V()).empty());
    const int64_t bad =
        cpu::denoise_row(&stats, nullptr, scratch_.data(), guide_.empty() ? nullptr : guide_.data(), V(), row,
                         nullptr, 0, workspace_, kernels_);
    CHECK(bad == -1);
    return stats;
  }
  // Counts of each id over `draws` positions and seeds.
  std::vector<int64_t> counts(DenoiseRow row, int64_t draws) {
    std::vector<int64_t> n(logits_.size(), 0);
    for (int64_t i = 0; i < draws; ++i) {
      row.seed = static_cast<uint64_t>(i / 5000);
      row.step = static_cast<uint32_t>(i / 100 % 50);
      row.position = static_cast<uint32_t>(i % 100);
      ++n[static_cast<size_t>(denoise(row).drawn)];
    }
    return n;
  }

 private:
  const cpu::HeadKernels& kernels_;
  std::vector<float> logits_, guide_, scratch_, memory_;
  float* workspace_ = nullptr;
};

// The distribution that `row` asks for, by sorting, in double (docs/numerics.md, Sampling: temperature,
// nucleus, top-k).
std::vector<double> expected_distribution(const std::vector<float>& logits, const std::vector<float>& guide,
                                          const DenoiseRow& row) {
  const size_t V = logits.size();
  std::vector<double> l(V), p(V);
  std::vector<size_t> order(V);
  for (size_t v = 0; v < V; ++v) {
    l[v] = static_cast<double>(logits[v]);
    if (!guide.empty()) {
      const double u = static_cast<double>(guide[v]);
      l[v] = u + (static_cast<double>(row.guidance) + 1) * (l[v] - u);
    }
    if (static_cast<int64_t>(v) == row.banned) l[v] = -HUGE_VAL;
    order[v] = v;
  }
  std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return l[a] > l[b]; });
  double total = 0;
  for (size_t v = 0; v < V; ++v)
    total += p[v] = std::exp((l[v] - l[order[0]]) / static_cast<double>(row.temperature));
  double preceding = 0, kept = 0;
  for (size_t i = 0; i < V; ++i) {
    double& mass = p[order[i]];
    const bool in_nucleus = row.top_p >= 1 || i == 0 || preceding <= static_cast<double>(row.top_p) * total;
    const bool in_top = row.top_k == 0 || i < static_cast<size_t>(row.top_k) ||
                        l[order[i]] == l[order[static_cast<size_t>(row.top_k) - 1]];
    preceding += mass;
    if (!in_nucleus || !in_top) mass = 0;
    kept += mass;
  }
  for (double& mass : p) mass /= kept;
  return p;
}

// Upper tail of the chi-square distribution: Q(k / 2, x / 2), by series or continued fraction (Lentz).
double chi_square_tail(double x, double degrees) {
  const double a = degrees / 2, y = x / 2;
  if (y <= 0) return 1;
  const double front = std::exp(a * std::log(y) - y - std::lgamma(a));
  if (y < a + 1) {
    double term = 1 / a, sum = term;
    for (int n = 1; n < 10000 && term > sum * 1e-15; ++n) sum += term *= y / (a + n);
    return 1 - front * sum;
  }
  double b = y + 1 - a, c = 1e300, d = 1 / b, h = d;
  for (int n = 1; n < 10000; ++n) {
    const double an = -n * (n - a);
    b += 2;
    d = 1 / (an * d + b);
    c = b + an / c;
    h *= d * c;
    if (std::fabs(d * c - 1) < 1e-15) break;
  }
  return front * h;
}

// p-value of the counts; 0 when an impossible id was drawn. Ids expected fewer than 5 times share one bin.
double p_value(const std::vector<int64_t>& counts, const std::vector<double>& p) {
  double draws = 0, statistic = 0, rare_expected = 0, rare_seen = 0;
  for (const int64_t n : counts) draws += static_cast<double>(n);
  int bins = 0;
  for (size_t v = 0; v < p.size(); ++v) {
    const double seen = static_cast<double>(counts[v]), expected = p[v] * draws;
    if (p[v] == 0 && seen > 0) return 0;
    if (expected < 5) {
      rare_expected += expected;
      rare_seen += seen;
      continue;
    }
    statistic += (seen - expected) * (seen - expected) / expected;
    ++bins;
  }
  if (rare_expected > 1e-3) {
    statistic += (rare_seen - rare_expected) * (rare_seen - rare_expected) / rare_expected;
    ++bins;
  }
  return bins < 2 ? 1 : chi_square_tail(statistic, bins - 1);
}

// Uneven logits of a row: spread about 4 nats.
std::vector<float> made_up_logits(int64_t V, uint64_t seed) {
  std::vector<float> l;
  for (int64_t v = 0; v < V; ++v) {
    l.push_back(static_cast<float>(4 * uniform(seed, Stream::kInit, 1, static_cast<uint64_t>(v)) - 11));
  }
  return l;
}

DenoiseRow options(float temperature, float top_p = 1, int32_t top_k = 0, int32_t banned = -1,
                   float guidance = 0) {
  DenoiseRow row;
  row.temperature = temperature;
  row.top_p = top_p;
  row.top_k = top_k;
  row.banned = banned;
  row.guidance = guidance;
  return row;
}

}  // namespace

DN_TEST(sampling_chi_square_tail_matches_tables) {
  CHECK(std::fabs(chi_square_tail(3.841459, 1) - 0.05) < 1e-6);
  CHECK(std::fabs(chi_square_tail(18.307038, 10) - 0.05) < 1e-6);
  CHECK(std::fabs(chi_square_tail(149.449253, 100) - 0.001) < 1e-6);
  CHECK(std::fabs(chi_square_tail(90.0, 100) - 0.7532) < 5e-4);
}

DN_TEST(sampling_draws_follow_the_distribution) {
  struct Case {
    const char* name;
    int64_t V;
    DenoiseRow row;
    bool guided;
  };
  const Case cases[] = {
      {"temperature 1", 12, options(1), false},
      {"temperature 0.5", 12, options(0.5f), false},
      {"temperature 2.5", 12, options(2.5f), false},
      {"top-p 0.9", 12, options(1, 0.9f), false},
      {"top-p 0.5, temperature 1.5", 12, options(1.5f, 0.5f), false},
      {"top-k 3", 12, options(1, 1, 3), false},
      {"top-p 0.8, top-k 5, temperature 0.7, banned", 12, options(0.7f, 0.8f, 5, 4), false},
      {"guidance 1.5", 12, options(1, 1, 0, -1, 1.5f), true},
      {"guidance 0.5, top-p 0.9, temperature 0.8, banned", 12, options(0.8f, 0.9f, 0, 2, 0.5f), true},
      {"three tiles", 600, options(1), false},
      {"three tiles, top-p 0.9, top-k 100", 600, options(1.2f, 0.9f, 100, 300), false},
  };
  const int64_t draws = dn::test::kSanitized ? kDraws / 8 : kDraws;
  for (const Isa isa : instruction_sets()) {
    for (const Case& c : cases) {
      const std::vector<float> logits = made_up_logits(c.V, 3);
      const std::vector<float> guide = c.guided ? made_up_logits(c.V, 4) : std::vector<float>();
      Row row(isa, logits, guide);
      const double p = p_value(row.counts(c.row, c.V == 12 ? draws : draws / 2),
                               expected_distribution(logits, guide, c.row));
      CHECK_MSG(p > kThreshold,
                std::string(c.name) + ", " + cpu::isa_name(isa) + ": p = " + std::to_string(p));
    }
  }
}

DN_TEST(sampling_test_detects_temperature_used_as_a_factor) {
  const std::vector<float> logits = made_up_logits(12, 3);
  Row row(cpu::detected_isa(), logits);
  const std::vector<int64_t> counts = row.counts(options(1 / 0.9f), kDraws);  // the bug: logits * 0.9
  CHECK(p_value(counts, expected_distribution(logits, {}, options(0.9f))) < kThreshold);
  CHECK(p_value(counts, expected_distribution(logits, {}, options(1 / 0.9f))) > kThreshold);
}

// One likely id and 50256 rare ones, each e^-17 as likely, about one draw in 480 together. Gumbel noise from
// fp32 uniforms cannot exceed -ln(2^-24) = 16.6, so the rare ids win only when the likely one has a small
// noise.
DN_TEST(sampling_test_detects_fp32_gumbel_noise) {
  if (dn::test::kSanitized) return;  // the same calls as in the tests above
  const int64_t V = 50257, draws = 30000;
  std::vector<float> logits(static_cast<size_t>(V), -17.0f);
  logits[0] = 0;
  const double rare = static_cast<double>(V - 1) * std::exp(-17.0);
  const std::vector<double> expected = {1 / (1 + rare), rare / (1 + rare)};

  std::vector<int64_t> gumbel(2, 0);
  for (int64_t i = 0; i < draws; ++i) {
    const Philox4 r = philox(5, Stream::kDraw, 0, static_cast<uint64_t>(i));
    const auto noise = [](double u) { return -std::log(-std::log(static_cast<float>(u))); };
    const double grid = 16777216.0;  // uniforms k / 2^24
    const float likely = noise(std::floor(uniform53(r.v[0], r.v[1]) * grid) / grid);
    // The greatest of V - 1 such uniforms.
    const double most = std::pow(uniform53(r.v[2], r.v[3]), 1.0 / static_cast<double>(V - 1));
    ++gumbel[-17.0f + noise(std::floor(most * grid) / grid) > likely ? 1 : 0];
  }
  CHECK(p_value(gumbel, expected) < kThreshold);

  Row row(cpu::detected_isa(), logits);
  const std::vector<int64_t> counts = row.counts(options(1), draws);
  const double p = p_value({counts[0], draws - counts[0]}, expected);
  CHECK_MSG(p > kThreshold, "inverse CDF: p = " + std::to_string(p));
}

DN_TEST(sampling_never_draws_the_banned_id) {
  std::vector<float> logits = {0.5f, 9.0f, 0.25f, 1.0f, -1.0f};  // the banned id is by far the best
  for (const Isa isa : instruction_sets()) {
    Row row(isa, logits);
    const int64_t draws = isa == Isa::kPortable ? 100000 : 1000000;
    const std::vector<int64_t> counts = row.counts(options(1, 1, 0, 1), draws);
    CHECK(counts[1] == 0);
    CHECK(p_value(counts, expected_distribution(logits, {}, options(1, 1, 0, 1))) > kThreshold);
    const DenoiseStats stats = row.denoise(options(0, 1, 0, 1));
    CHECK(stats.best == 3 && stats.drawn == 3);
  }
}

// Which ids can be drawn at all: each draw lies in the kept set of the formula, and each kept id turns up.
DN_TEST(sampling_filters_keep_exactly_the_right_ids) {
  constexpr int64_t kTries = dn::test::kSanitized ? 1000 : 5000;
  for (const Isa isa : instruction_sets()) {
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
  for (const Isa isa : instruction_sets()) {
    Row row(isa, logits);
    std::vector<int64_t> n = row.counts(options(1, 1, 2), 5000);
    CHECK(n[4] > 0 && n[1] > 0 && n[2] > 0 && n[5] > 0 && n[0] == 0 && n[3] == 0 && n[6] == 0);
    n = row.counts(options(1, 0.5f),
                   5000);  // masses e^0 and three e^-1 of 2.41: the best has 0.41, so the ties enter
    CHECK(n[4] > 0 && n[1] > 0 && n[2] > 0 && n[5] > 0 && n[0] == 0 && n[3] == 0 && n[6] == 0);
  }
}

DN_TEST(sampling_extreme_temperatures_do_not_overflow) {
  const std::vector<float> logits = {-300, 88, 87.5f, 3e38f, 1, -3e38f};
  const std::vector<float> mild = {1, 2, 3, 4};
  for (const Isa isa : instruction_sets()) {
    for (const float temperature : {1e-45f, 1e-30f, 1e-3f, 1.0f, 1e3f}) {
      Row row(isa, logits);
      const DenoiseStats stats = row.denoise(options(temperature));
      CHECK(stats.best == 3 && stats.drawn == 3 && stats.probability == 1 && stats.entropy == 0);
      Row cold(isa, mild);
      if (temperature <= 1e-3f) CHECK(cold.counts(options(temperature, 0.9f, 3), 1000)[3] == 1000);
    }
    Row hot(isa, mild);
    for (const float temperature : {1e3f, 1e30f, 3.4e38f}) {
      CHECK(p_value(hot.counts(options(temperature), kDraws / 10),
                    expected_distribution(mild, {}, options(temperature))) > kThreshold);
    }
  }
}

DN_TEST(sampling_draw_depends_on_seed_step_and_position_only) {
  const std::vector<float> logits = made_up_logits(1000, 8);
  DenoiseRow row = options(1);
  row.seed = 1;
  Row one(cpu::detected_isa(), logits);
  const int32_t drawn = one.denoise(row).drawn;
  CHECK(one.denoise(row).drawn == drawn);
  int changed = 0;
  for (uint32_t k = 1; k <= 10; ++k) {
    DenoiseRow other = row;
    other.position = k;
    changed += one.denoise(other).drawn != drawn;
    other = row;
    other.step = k;
    changed += one.denoise(other).drawn != drawn;
    other = row;
    other.seed = row.seed + (uint64_t{k} << 40);
    changed += one.denoise(other).drawn != drawn;
  }
  CHECK(changed >= 28);
}

// KL(now || before) of what `expected_distribution` says at temperature 1, and the log probabilities that are
// left; by every instruction set and by the form for backends of their own memory.
DN_TEST(sampling_divergence_from_the_step_before_matches_the_formula) {
  for (const int64_t V : {2, 15, 16, 257, 600, 50257}) {
    for (const bool guided : {false, true}) {
      const std::vector<float> first = made_up_logits(V, 1), second = made_up_logits(V, 2);
      const std::vector<float> guide = guided ? made_up_logits(V, 3) : std::vector<float>();
      DenoiseRow row = options(1, 1, 0, V > 2 ? static_cast<int32_t>(V - 2) : -1, guided ? 0.8f : 0);
      const std::vector<double> p = expected_distribution(second, guide, row),
                                q = expected_distribution(first, guide, row);
      double expected = 0;
      for (size_t v = 0; v < p.size(); ++v)
        if (p[v] > 0) expected += p[v] * std::log(p[v] / q[v]);
      std::vector<float> before(first.size()), keep(first.size());
      const auto check = [&](double of_first, double of_second, double of_itself) {
        CHECK(of_first == HUGE_VAL);
        CHECK(std::fabs(of_second - expected) < 1e-5 * (1 + expected));
        CHECK(of_itself >= 0 && of_itself < 1e-6);
        for (size_t v = 0; v < p.size(); ++v) {
          const double l = static_cast<double>(keep[v]);
          CHECK(p[v] > 0 ? std::fabs(l - std::log(p[v])) < 1e-5 : l == -HUGE_VAL);
        }
      };
      for (const Isa isa : instruction_sets()) {
        Row a(isa, first, guide), b(isa, second, guide);
        row.keep = before.data();
        row.before = nullptr;
        row.temperature = 0.5f;  // of the draw alone
        const float of_first = a.denoise(row).divergence;
        row.keep = keep.data();
        row.before = before.data();
        const float of_second = b.denoise(row).divergence;
        std::vector<float> again(first.size());
        row.keep = again.data();
        row.before = keep.data();
        const float of_itself = b.denoise(row).divergence;
        CHECK(again == keep);
        check(static_cast<double>(of_first), static_cast<double>(of_second), static_cast<double>(of_itself));
      }
      const auto on_host = [&](std::vector<float> logits, const float* compared, std::vector<float>* kept) {
        row.before = compared;
        row.keep = kept->data();
        return static_cast<double>(update_divergence(row, logits.data(), guided ? guide.data() : nullptr, V));
      };
      const double of_first = on_host(first, nullptr, &before),
                   of_second = on_host(second, before.data(), &keep);
      std::vector<float> again(first.size());
      check(of_first, of_second, on_host(second, keep.data(), &again));
    }
  }
}

DN_TEST(sampling_keeps_nothing_unless_asked) {
  Row row(cpu::detected_isa(), made_up_logits(40, 1));
  CHECK(row.denoise(options(1)).divergence == 0);
}

DN_TEST(sampling_draw_from_quantiles_at_the_edges) {
  // Masses 0 0 1 0 1 0 in the second of three tiles, 2 at the very end but one.
  const int64_t V = 3 * cpu::kTileIds - 5;
  std::vector<float> mass(static_cast<size_t>(V), 0.0f);
  const int64_t first = cpu::kTileIds + 2, second = cpu::kTileIds + 4, third = V - 2;
  mass[static_cast<size_t>(first)] = 1;
  mass[static_cast<size_t>(second)] = 1;
  mass[static_cast<size_t>(third)] = 2;
  const double tiles[] = {0, 2, 2};
  const auto draw = [&](double u) { return cpu::draw_from(mass.data(), tiles, V, u); };
  CHECK(draw(0) == first);
  CHECK(draw(std::nextafter(0.25, 0.0)) == first);
  CHECK(draw(0.25) == second);  // an id owns [its lower end, its upper end)
  CHECK(draw(std::nextafter(0.5, 0.0)) == second);
  CHECK(draw(0.5) == third);
  CHECK(draw(std::nextafter(1.0, 0.0)) == third);
  CHECK(draw(1) == third);     // past the end
  CHECK(draw(1.01) == third);  // further
  // A tile whose stored sum is more than its ids: the last id with mass, not one without.
  const double generous[] = {0, 2.5, 2};
  CHECK(cpu::draw_from(mass.data(), generous, V, 2.2 / 4.5) == second);
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
      for (const Isa isa : instruction_sets()) {
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
  for (const Isa isa : instruction_sets()) {
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
    for (const Isa isa : instruction_sets()) {
      if (dn::test::kSanitized && isa != instruction_sets().back()) continue;
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
