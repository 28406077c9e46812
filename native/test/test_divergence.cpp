// How far distributions are from the step before, where the logits are not in host memory: many rows, some
// guided, some that keep nothing, against the formula on the model's own logits.

#include <cmath>
#include <memory>
#include <vector>

#include "core/model.h"
#include "test/check.h"
#include "test/naive_gpt2.h"
#include "test/proxy_backend.h"

using namespace dn;
using namespace dn::test;

DN_TEST(divergence_of_many_rows_on_a_backend_of_its_own_memory) {
  constexpr int32_t kVocab = 37, kRows = 96, kBanned = 5, kBannedEnd = 20;
  const NaiveGpt2 naive = random_weights(tiny_config(20, kVocab), 14);
  ProxyControl control;
  control.host_memory = false;
  Model model(std::make_unique<ProxyBackend>(make_cpu_backend(2), &control), naive.config);
  set_weights(model, naive);
  Batch batch;
  Numbers numbers(17);
  for (int s = 0; s < kRows / 12; ++s) append_sequence(batch, numbers, 12, kVocab, AttentionMask());
  model.forward(batch, {});
  std::vector<int64_t> all;
  for (int64_t r = 0; r < kRows; ++r) all.push_back(r);
  std::vector<float> logits(size_t{kRows} * kVocab);
  model.logits(logits.data(), all.data(), kRows);

  std::vector<std::vector<float>> before(kRows), keep(kRows, std::vector<float>(kVocab));
  std::vector<DenoiseRow> rows(kRows);
  std::vector<double> expected(kRows);
  for (size_t r = 0; r < kRows; ++r) {
    DenoiseRow& row = rows[r];
    row.row = static_cast<int64_t>(r);
    row.temperature = 0;
    row.banned = kBanned;
    row.banned_end = kBannedEnd;
    row.guidance = 0.7f;
    if (r % 3 == 1) row.guide_row = static_cast<int64_t>((r * 7 + 1) % kRows);
    if (r % 5 == 4) continue;  // keeps nothing
    row.keep = keep[r].data();
    expected[r] = HUGE_VAL;
    if (r % 4 == 2) continue;  // nothing to compare with
    std::vector<double> l(kVocab);
    double total = 0;
    for (size_t v = 0; v < kVocab; ++v) {
      l[v] = static_cast<double>(logits[r * kVocab + v]);
      const size_t guide = static_cast<size_t>(row.guide_row) * kVocab + v;
      if (row.guide_row >= 0) {
        const double u = static_cast<double>(logits[guide]);
        l[v] = u + 1.7 * (l[v] - u);
      }
      if (v != kBanned && v != kBannedEnd) total += std::exp(l[v]);
      before[r].push_back(-3.5f - 0.01f * static_cast<float>((r + v) % 11));
    }
    expected[r] = 0;
    for (size_t v = 0; v < kVocab; ++v) {
      const double log_p = l[v] - std::log(total);
      if (v != kBanned && v != kBannedEnd)
        expected[r] += std::exp(log_p) * (log_p - static_cast<double>(before[r][v]));
    }
    row.before = before[r].data();
  }
  std::vector<DenoiseStats> stats(kRows);
  model.denoise(stats.data(), nullptr, rows.data(), kRows, nullptr, 0);
  for (size_t r = 0; r < kRows; ++r) {
    const double found = static_cast<double>(stats[r].divergence);
    CHECK_MSG(found == expected[r] || std::fabs(found - std::max(0.0, expected[r])) < 1e-4,
              "row " + std::to_string(r) + ": " + std::to_string(found) + ", expected " +
                  std::to_string(expected[r]));
  }
}
