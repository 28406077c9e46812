// The statistics of a denoising step against plain fp64 formulas on full logits: every instruction set,
// thread counts, rows alone and in a batch, planted logits and logits that are not finite. Draws:
// test_sampling.cpp.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "core/backend.h"
#include "core/error.h"
#include "cpu/ops.h"
#include "test/check.h"
#include "test/head_problem.h"

namespace {

using namespace dn;
using namespace dn::test::head;
using cpu::Cpu;

// A mixed batch: guides, a banned id, temperatures, filters.
std::vector<DenoiseRow> mixed_rows(int64_t R, int64_t N, int64_t V) {
  std::vector<DenoiseRow> rows(static_cast<size_t>(R));
  for (int64_t r = 0; r < R; ++r) {
    DenoiseRow& row = rows[static_cast<size_t>(r)];
    row.row = r * 3 % N;
    if (r % 3 == 1) {
      row.guide_row = (r + 1) % N;
      row.guidance = 0.5f * static_cast<float>(r % 4);
    }
    if (r % 2 == 1 && V > 1) row.banned = static_cast<int32_t>(r * 11 % V);
    if (r % 4 == 3 && V > 2) row.banned_end = static_cast<int32_t>((r * 5 + 1) % V);
    const float temperatures[] = {1, 0, 0.5f, 1e-3f, 1e3f, 0.9f};
    row.temperature = temperatures[r % 6];
    row.top_p = r % 5 == 2 ? 0.9f : 1.0f;
    row.top_k = r % 7 == 3 ? 5 : 0;
    row.seed = 99;
    row.step = static_cast<uint32_t>(r / 4);
    row.position = static_cast<uint32_t>(r);
  }
  return rows;
}

struct Denoised {
  std::vector<DenoiseStats> stats;
  std::vector<float> watched;
};

Denoised denoise(const Cpu& cpu, Problem& p, const std::vector<DenoiseRow>& rows,
                 const std::vector<int32_t>& watch) {
  Denoised out;
  out.stats.resize(rows.size());
  out.watched.assign(rows.size() * watch.size(), kNaN);
  cpu::head_denoise(cpu, out.stats.data(), out.watched.data(), p.inputs(), rows.data(),
                    static_cast<int64_t>(rows.size()), watch.data(), static_cast<int64_t>(watch.size()),
                    p.weight());
  return out;
}

}  // namespace

DN_TEST(head_denoise_names_the_row_whose_logits_are_not_finite) {
  for (const Isa isa : instruction_sets()) {
    for (const float bad :
         {kNaN, std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity()}) {
      Problem p(4, 1, 300);
      std::fill(p.wte.begin(), p.wte.end(), 1.0f);
      p.hidden[2] = bad;
      std::vector<DenoiseRow> rows(3);
      for (int64_t r = 0; r < 3; ++r) rows[static_cast<size_t>(r)].row = r;
      std::vector<DenoiseStats> stats(3);
      CHECK_THROWS(cpu::head_denoise({2, isa}, stats.data(), nullptr, p.inputs(), rows.data(), 3, nullptr, 0,
                                     p.weight()),
                   Code::kDiverged, "logits of row 2 are not finite");
    }
  }
}

DN_TEST(head_denoise_statistics_match_fp64) {
  for (const Isa isa : instruction_sets()) {
    for (const int64_t V : kVocabularies) {
      if (is_left_out(isa, V)) continue;
      Problem p(13, 7, V);
      const std::vector<DenoiseRow> rows = mixed_rows(V == 50257 ? 260 : 40, p.N, V);
      const std::vector<int32_t> watch = {0, static_cast<int32_t>(V / 2), static_cast<int32_t>(V - 1)};
      const Denoised got = denoise({2, isa}, p, rows, watch);
      for (size_t r = 0; r < rows.size(); r += dn::test::kSanitized ? 16 : 1) {
        std::vector<double> logits = p.logits(rows[r].row);
        if (rows[r].guide_row >= 0) {
          const std::vector<double> guide = p.logits(rows[r].guide_row);
          for (size_t v = 0; v < logits.size(); ++v) {
            logits[v] = guide[v] + (static_cast<double>(rows[r].guidance) + 1) * (logits[v] - guide[v]);
          }
        }
        const auto banned = [&](int32_t id) { return id == rows[r].banned || id == rows[r].banned_end; };
        for (int32_t v = 0; v < V; ++v) {
          if (banned(v)) logits[static_cast<size_t>(v)] = -HUGE_VAL;
        }
        const std::vector<double> q = softmax(logits);
        const DenoiseStats& s = got.stats[r];
        const size_t best = static_cast<size_t>(std::max_element(q.begin(), q.end()) - q.begin());
        double entropy = 0, runner_up = 0;
        for (size_t v = 0; v < q.size(); ++v) {
          if (q[v] > 0) entropy -= q[v] * std::log(q[v]);
          if (v != best) runner_up = std::max(runner_up, q[v]);
        }
        const double expected[] = {q[best],
                                   q[best] - runner_up,
                                   entropy,
                                   q[static_cast<size_t>(watch[0])],
                                   q[static_cast<size_t>(watch[1])],
                                   q[static_cast<size_t>(watch[2])]};
        const float values[] = {
            s.probability,         s.margin, s.entropy, got.watched[r * 3], got.watched[r * 3 + 1],
            got.watched[r * 3 + 2]};
        const std::string what = label("statistics", isa, V) + ", row " + std::to_string(r);
        CHECK_CLOSE(values, expected, 6, 2e-5, what);
        // The two best may be closer than fp32 logits can tell apart.
        CHECK_MSG(s.best == static_cast<int32_t>(best) || q[best] - q[static_cast<size_t>(s.best)] < 1e-6,
                  what);
        CHECK_MSG(s.drawn >= 0 && s.drawn < V && !banned(s.drawn), what);
        if (rows[r].temperature == 0) CHECK_MSG(s.drawn == s.best, what);
        const double log_prob = std::log(q[static_cast<size_t>(s.drawn)]),
                     drawn_log_prob = static_cast<double>(s.drawn_log_prob);
        CHECK_CLOSE(&drawn_log_prob, &log_prob, 1, 5e-5, what);
        for (size_t w = 0; w < 3; ++w) {
          if (banned(watch[w])) CHECK(got.watched[r * 3 + w] == 0);
        }
      }
    }
  }
}

DN_TEST(head_denoise_has_the_same_bits_for_any_threads_and_batch) {
  for (const Isa isa : instruction_sets()) {
    for (const int64_t V : {int64_t{257}, int64_t{50257}}) {
      if (is_left_out(isa, V)) continue;
      Problem p(50, 9, V);
      const std::vector<DenoiseRow> rows = mixed_rows(V == 257 ? 60 : 150, p.N, V);
      const std::vector<int32_t> watch = {3, 100};
      const Denoised one = denoise({1, isa}, p, rows, watch);
      for (const int threads : {2, 8}) {
        const Denoised more = denoise({threads, isa}, p, rows, watch);
        CHECK_MSG(same_bits(one.stats, more.stats) && same_bits(one.watched, more.watched),
                  label("threads", isa, V));
      }
      for (size_t r = 0; r < rows.size(); r += V == 257 ? 1 : 13) {
        const Denoised alone = denoise({2, isa}, p, {rows[r]}, watch);
        CHECK_MSG(std::memcmp(alone.stats.data(), &one.stats[r], sizeof(DenoiseStats)) == 0,
                  label("a row alone", isa, V));
        CHECK_MSG(std::memcmp(alone.watched.data(), &one.watched[r * 2], 2 * sizeof(float)) == 0,
                  label("watched of a row alone", isa, V));
      }
    }
  }
}

DN_TEST(head_denoise_of_planted_logits_is_exact) {
  for (const Isa isa : instruction_sets()) {
    for (const int64_t V : kVocabularies) {
      Problem p(2, 4, V);
      std::fill(p.hidden.begin(), p.hidden.end(), 0.0f);  // uniform logits
      std::vector<DenoiseRow> rows(1);
      DenoiseStats s = denoise({1, isa}, p, rows, {}).stats[0];
      CHECK_MSG(s.best == 0, label("the smallest id among equals", isa, V));
      CHECK_MSG(s.probability == static_cast<float>(1.0 / static_cast<double>(V)), label("1 / V", isa, V));
      CHECK_MSG(s.margin == (V == 1 ? 1.0f : 0.0f), label("margin", isa, V));
      CHECK_MSG(s.entropy == static_cast<float>(std::log(static_cast<double>(V))), label("ln V", isa, V));
      if (V > 1) {
        rows[0].banned = 0;
        s = denoise({1, isa}, p, rows, {}).stats[0];
        CHECK_MSG(s.best == 1, label("the smallest id that is not banned", isa, V));
        CHECK_MSG(s.entropy == static_cast<float>(std::log(static_cast<double>(V - 1))),
                  label("ln(V - 1)", isa, V));
        rows[0].banned = -1;
      }
      std::fill(p.wte.begin(), p.wte.end(), 0.0f);  // one id 200 above the others
      p.wte[static_cast<size_t>((V - 1) * p.C)] = 200;
      p.hidden[0] = 1;
      s = denoise({1, isa}, p, rows, {}).stats[0];
      CHECK_MSG(s.best == V - 1 && s.drawn == V - 1, label("certain id", isa, V));
      CHECK_MSG(s.probability == 1 && s.margin == 1 && s.entropy == 0 && s.drawn_log_prob == 0,
                label("certain statistics", isa, V));
    }
  }
}
