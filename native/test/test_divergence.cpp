// How far distributions are from the step before: one row by every instruction set and by the form for logits
// that are not in host memory, against the formula; and many rows of a model, some guided, some that keep
// nothing, against the formula on the model's own logits.

#include <algorithm>
#include <cmath>
#include <memory>
#include <string>
#include <vector>

#include "core/divergence.h"
#include "core/model.h"
#include "cpu/head_kernels.h"
#include "test/check.h"
#include "test/naive_gpt2.h"
#include "test/proxy_backend.h"
#include "test/sampling_row.h"

using namespace dn;
using namespace dn::test;
using namespace dn::test::sampling;

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
      for (const Isa isa : isas()) {
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
