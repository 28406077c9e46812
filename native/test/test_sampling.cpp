// The draws of a denoising step, on distributions: hand-made logits through denoise_row, counts against the
// formulas by chi-square. A test fails below p = 1e-4; seeds are fixed, so it fails always or never. Two
// planted bugs must fail. The sets that top-p and top-k keep are in test_sampling_filters.cpp.

#include <cmath>
#include <string>
#include <vector>

#include "core/backend.h"
#include "core/rng.h"
#include "cpu/head_kernels.h"
#include "test/check.h"
#include "test/sampling_row.h"

namespace {

using namespace dn;
using namespace dn::test::sampling;

constexpr double kThreshold = 1e-4;
constexpr int64_t kDraws = dn::test::kSanitized ? 40000 : 200000;

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
  for (const Isa isa : isas()) {
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
  for (const Isa isa : isas()) {
    Row row(isa, logits);
    const int64_t draws = isa == Isa::kPortable ? 100000 : 1000000;
    const std::vector<int64_t> counts = row.counts(options(1, 1, 0, 1), draws);
    CHECK(counts[1] == 0);
    CHECK(p_value(counts, expected_distribution(logits, {}, options(1, 1, 0, 1))) > kThreshold);
    const DenoiseStats stats = row.denoise(options(0, 1, 0, 1));
    CHECK(stats.best == 3 && stats.drawn == 3);
  }
}

DN_TEST(sampling_extreme_temperatures_do_not_overflow) {
  const std::vector<float> logits = {-300, 88, 87.5f, 3e38f, 1, -3e38f};
  const std::vector<float> mild = {1, 2, 3, 4};
  for (const Isa isa : isas()) {
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
