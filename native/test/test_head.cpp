// The head against plain fp64 formulas on full logits: logits, masked cross-entropy with gradients, the
// statistics of a denoising step; every instruction set, thread counts, rows alone and in a batch. Draws:
// test_sampling.cpp.

#include <algorithm>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "core/backend.h"
#include "core/error.h"
#include "core/rng.h"
#include "cpu/head_kernels.h"
#include "cpu/ops.h"
#include "test/check.h"

namespace {

using namespace dn;
using cpu::Cpu;
using cpu::Isa;

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

std::vector<Isa> instruction_sets() {
  std::vector<Isa> sets;
  for (const Isa isa : {Isa::kPortable, Isa::kAvx2, Isa::kAvx512, Isa::kAmx}) {
    if (isa <= cpu::detected_isa()) sets.push_back(isa);
  }
  return sets;
}

// Under the sanitizers only the fastest kernels meet a real vocabulary; what is special to the others is in
// the tails of small ones.
bool is_left_out(Isa isa, int64_t V) {
  return dn::test::kSanitized && V == 50257 && isa != cpu::detected_isa();
}

// n numbers, uniform in (-scale, scale).
std::vector<float> noise(int64_t n, float scale, uint64_t seed) {
  std::vector<float> x(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) {
    x[static_cast<size_t>(i)] =
        scale * static_cast<float>(2 * uniform(seed, Stream::kInit, 0, static_cast<uint64_t>(i)) - 1);
  }
  return x;
}

Tensor tensor(std::vector<float>& x, int64_t cols) {
  return Tensor(x.data(), Dtype::kF32, static_cast<int64_t>(x.size()) / cols, cols);
}

// hidden (N, C) and wte (V, C) whose logits have a standard deviation of about 2.
struct Problem {
  int64_t N, C, V;
  std::vector<float> hidden, wte;

  Problem(int64_t n, int64_t c, int64_t v, uint64_t seed = 7)
      : N(n),
        C(c),
        V(v),
        hidden(noise(n * c, 3.0f, seed)),
        wte(noise(v * c, 2.0f / std::sqrt(static_cast<float>(c)), seed + 1)) {}

  Weight weight() const {
    Weight w;
    w.data = wte.data();
    w.order = WeightOrder::kOutIn;
    w.K = C;
    w.N = V;
    return w;
  }
  Tensor inputs() { return tensor(hidden, C); }
  std::vector<double> logits(int64_t row) const {
    std::vector<double> l(static_cast<size_t>(V));
    for (int64_t v = 0; v < V; ++v) {
      double sum = 0;
      for (int64_t c = 0; c < C; ++c)
        sum += static_cast<double>(hidden[row * C + c]) * static_cast<double>(wte[v * C + c]);
      l[static_cast<size_t>(v)] = sum;
    }
    return l;
  }
};

std::vector<double> softmax(const std::vector<double>& logits) {
  const double max = *std::max_element(logits.begin(), logits.end());
  std::vector<double> p;
  double total = 0;
  for (const double l : logits) total += std::exp(l - max);
  for (const double l : logits) p.push_back(std::exp(l - max) / total);
  return p;
}

template <typename T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

const int64_t kVocabularies[] = {1, 2, 17, 257, 1000, 50257};

struct CrossEntropy {
  std::vector<float> losses, dhidden, dwte;
};

CrossEntropy cross_entropy(const Cpu& cpu, Problem& p, const std::vector<int64_t>& rows,
                           const std::vector<int32_t>& targets, const std::vector<float>& weights,
                           bool gradients = true) {
  CrossEntropy out;
  out.losses.assign(rows.size(), kNaN);
  out.dhidden.assign(p.hidden.size(), kNaN);  // must be overwritten
  out.dwte.assign(p.wte.size(), 0.0f);
  cpu::head_cross_entropy(cpu, out.losses.data(), gradients ? tensor(out.dhidden, p.C) : Tensor(),
                          gradients ? tensor(out.dwte, p.C) : Tensor(), p.inputs(), rows.data(),
                          targets.data(), weights.data(), static_cast<int64_t>(rows.size()), p.weight(),
                          MatmulPrecision::kFP32);
  return out;
}

// R rows with repetitions, some of weight 0, some hidden rows unlisted.
struct RowList {
  std::vector<int64_t> rows;
  std::vector<int32_t> targets;
  std::vector<float> weights;

  RowList(int64_t R, int64_t N, int64_t V) {
    for (int64_t r = 0; r < R; ++r) {
      rows.push_back(r * 5 % (N - 1));  // row N - 1 is never listed
      targets.push_back(static_cast<int32_t>(r * 37 % V));
      weights.push_back(r % 4 == 3 ? 0.0f : 0.25f + 0.5f * static_cast<float>(r % 3));
    }
  }
};

// The weighted loss and its gradients from the formulas.
struct Reference {
  std::vector<double> losses, dhidden, dwte;

  Reference(const Problem& p, const RowList& list) : dhidden(p.hidden.size(), 0.0), dwte(p.wte.size(), 0.0) {
    for (size_t r = 0; r < list.rows.size(); ++r) {
      const int64_t row = list.rows[r];
      std::vector<double> d = softmax(p.logits(row));
      losses.push_back(-std::log(d[static_cast<size_t>(list.targets[r])]));
      d[static_cast<size_t>(list.targets[r])] -= 1;
      for (int64_t v = 0; v < p.V; ++v) {
        const double g = d[static_cast<size_t>(v)] * static_cast<double>(list.weights[r]);
        for (int64_t c = 0; c < p.C; ++c) {
          dhidden[row * p.C + c] += g * static_cast<double>(p.wte[v * p.C + c]);
          dwte[v * p.C + c] += g * static_cast<double>(p.hidden[row * p.C + c]);
        }
      }
    }
  }
};

std::string label(const char* what, Isa isa, int64_t V) {
  return std::string(what) + ", " + cpu::isa_name(isa) + ", V = " + std::to_string(V);
}

}  // namespace

DN_TEST(head_logits_of_gathered_rows_match_fp64) {
  for (const Isa isa : instruction_sets()) {
    for (const int64_t V : kVocabularies) {
      Problem p(6, 37, V);
      const std::vector<int64_t> rows = {5, 0, 0, 3};
      std::vector<float> logits(rows.size() * static_cast<size_t>(V), kNaN);
      cpu::head_logits({2, isa}, tensor(logits, V), p.inputs(), rows.data(), 4, p.weight());
      for (size_t r = 0; r < rows.size(); ++r) {
        const std::vector<double> expected = p.logits(rows[r]);
        // 37 products of size up to 3 * 0.33, each rounded to 6e-8.
        CHECK_CLOSE(logits.data() + r * static_cast<size_t>(V), expected.data(), V, 1e-5,
                    label("logits", isa, V));
      }
    }
  }
}

DN_TEST(head_cross_entropy_and_gradients_match_fp64) {
  for (const int64_t V : kVocabularies) {
    const int64_t R = V == 50257 ? 257 : 23;  // 257 rows at V = 50257 take two chunks
    Problem p(12, V == 50257 ? 5 : 19, V);
    const RowList list(R, p.N, V);
    const Reference expected(p, list);
    for (const Isa isa : instruction_sets()) {
      if (is_left_out(isa, V)) continue;
      const CrossEntropy got = cross_entropy({2, isa}, p, list.rows, list.targets, list.weights);
      CHECK_CLOSE(got.losses.data(), expected.losses.data(), R, 1e-5, label("losses", isa, V));
      CHECK_CLOSE(got.dhidden.data(), expected.dhidden.data(), p.N * p.C,
                  4e-7 * static_cast<double>(R) + 2e-6, label("dhidden", isa, V));
      CHECK_CLOSE(got.dwte.data(), expected.dwte.data(), V * p.C, 4e-7 * static_cast<double>(R) + 2e-6,
                  label("dwte", isa, V));
      for (int64_t c = 0; c < p.C; ++c) CHECK(got.dhidden[static_cast<size_t>((p.N - 1) * p.C + c)] == 0);
      const CrossEntropy plain = cross_entropy({2, isa}, p, list.rows, list.targets, list.weights, false);
      CHECK_MSG(same_bits(plain.losses, got.losses), label("losses with and without gradients", isa, V));
    }
  }
}

// The formulas of Reference are checked by central differences of the weighted loss, in double.
DN_TEST(head_cross_entropy_gradients_match_finite_differences) {
  const int64_t V = 17;
  Problem p(6, 5, V);
  const RowList list(9, p.N, V);
  const auto weighted_loss = [&](const Problem& q) {
    const Reference reference(q, list);
    double loss = 0;
    for (size_t r = 0; r < list.rows.size(); ++r)
      loss += static_cast<double>(list.weights[r]) * reference.losses[r];
    return loss;
  };
  const auto slope = [&](bool of_hidden, size_t i) {
    const float step = 1.0f / 256;
    Problem up = p, down = p;
    float& x = (of_hidden ? up.hidden : up.wte)[i];
    float& y = (of_hidden ? down.hidden : down.wte)[i];
    x += step;
    y -= step;
    return (weighted_loss(up) - weighted_loss(down)) / (static_cast<double>(x) - static_cast<double>(y));
  };
  std::vector<double> dhidden, dwte;
  for (size_t i = 0; i < p.hidden.size(); ++i) dhidden.push_back(slope(true, i));
  for (size_t i = 0; i < p.wte.size(); ++i) dwte.push_back(slope(false, i));
  for (const Isa isa : instruction_sets()) {
    const CrossEntropy got = cross_entropy({1, isa}, p, list.rows, list.targets, list.weights);
    CHECK_CLOSE(got.dhidden.data(), dhidden.data(), static_cast<int64_t>(dhidden.size()), 2e-4,
                label("dhidden", isa, V));
    CHECK_CLOSE(got.dwte.data(), dwte.data(), static_cast<int64_t>(dwte.size()), 2e-4, label("dwte", isa, V));
  }
}

DN_TEST(head_cross_entropy_has_the_same_bits_for_any_threads_and_batch) {
  for (const Isa isa : instruction_sets()) {
    for (const int64_t V : {int64_t{257}, int64_t{50257}}) {
      if (is_left_out(isa, V)) continue;
      const int64_t R = V == 257 ? 70 : 171;
      Problem p(300, 11, V);
      RowList list(R, p.N, V);
      for (int64_t r = 0; r < R; ++r) list.rows[static_cast<size_t>(r)] = (r * 7) % p.N;  // no repetitions
      const CrossEntropy one = cross_entropy({1, isa}, p, list.rows, list.targets, list.weights);
      for (const int threads : {2, 8}) {
        const CrossEntropy more = cross_entropy({threads, isa}, p, list.rows, list.targets, list.weights);
        CHECK_MSG(same_bits(one.losses, more.losses), label("losses", isa, V));
        CHECK_MSG(same_bits(one.dhidden, more.dhidden), label("dhidden", isa, V));
        CHECK_MSG(same_bits(one.dwte, more.dwte), label("dwte", isa, V));
      }
      for (const size_t r : {size_t{0}, size_t{5}, static_cast<size_t>(R - 1)}) {
        const CrossEntropy alone =
            cross_entropy({2, isa}, p, {list.rows[r]}, {list.targets[r]}, {list.weights[r]});
        CHECK_MSG(alone.losses[0] == one.losses[r], label("loss of a row alone", isa, V));
        const int64_t offset = list.rows[r] * p.C;
        CHECK_MSG(std::memcmp(&alone.dhidden[static_cast<size_t>(offset)],
                              &one.dhidden[static_cast<size_t>(offset)],
                              static_cast<size_t>(p.C) * sizeof(float)) == 0,
                  label("dhidden of a row alone", isa, V));
      }
    }
  }
}

DN_TEST(head_cross_entropy_of_planted_logits_is_exact) {
  for (const Isa isa : instruction_sets()) {
    for (const int64_t V : kVocabularies) {
      Problem p(2, 4, V);
      std::fill(p.hidden.begin(), p.hidden.end(), 0.0f);  // uniform logits
      const int32_t last = static_cast<int32_t>(V - 1);
      CrossEntropy got = cross_entropy({1, isa}, p, {0}, {last}, {1.0f});
      CHECK_MSG(got.losses[0] == static_cast<float>(std::log(static_cast<double>(V))), label("ln V", isa, V));

      std::fill(p.wte.begin(), p.wte.end(), 0.0f);  // logits 40 at the last id, 0 elsewhere
      p.wte[static_cast<size_t>(last * p.C)] = 40;
      p.hidden[0] = 1;
      got = cross_entropy({1, isa}, p, {0}, {last}, {1.0f});
      CHECK_MSG(got.losses[0] >= 0 && got.losses[0] < 1e-12f, label("loss of a certain target", isa, V));
      got = cross_entropy({1, isa}, p, {0}, {0}, {1.0f});
      if (V > 1) CHECK_MSG(got.losses[0] == 40.0f, label("loss of an impossible target", isa, V));
    }
  }
}

DN_TEST(head_cross_entropy_passes_nan_on) {
  for (const Isa isa : instruction_sets()) {
    Problem p(3, 4, 300);
    p.hidden[5] = kNaN;  // row 1
    const CrossEntropy got = cross_entropy({1, isa}, p, {0, 1}, {3, 4}, {1.0f, 1.0f});
    CHECK(std::isfinite(got.losses[0]));
    CHECK(std::isnan(got.losses[1]));
    CHECK(std::isfinite(got.dhidden[0]));
    CHECK(std::isnan(got.dhidden[4]));
    CHECK(std::isnan(got.dwte[0]));
  }
}

DN_TEST(head_refuses_bad_arguments) {
  Problem p(3, 4, 20);
  const Cpu cpu{1, cpu::detected_isa()};
  CHECK_THROWS(cross_entropy(cpu, p, {3}, {0}, {1}), Code::kArgument, "outside hidden (3, 4)");
  CHECK_THROWS(cross_entropy(cpu, p, {0}, {20}, {1}), Code::kArgument, "vocabulary of 20");
  CHECK_THROWS(cross_entropy(cpu, p, {0}, {-1}, {1}), Code::kArgument, "vocabulary of 20");
  std::vector<float> losses(1), small(8), dhidden(12);
  const int64_t rows[] = {0};
  const int32_t targets[] = {0};
  const float weights[] = {1};
  CHECK_THROWS(cpu::head_cross_entropy(cpu, losses.data(), tensor(dhidden, 4), tensor(small, 4), p.inputs(),
                                       rows, targets, weights, 1, p.weight(), MatmulPrecision::kFP32),
               Code::kArgument, "expected (3, 4) and (20, 4)");
  CHECK_THROWS(cpu::head_logits(cpu, tensor(small, 4), p.inputs(), rows, 1, p.weight()), Code::kArgument,
               "(1, 20)");

  DenoiseStats stats;
  const auto denoise = [&](const DenoiseRow& row, Weight w) {
    cpu::head_denoise(cpu, &stats, nullptr, p.inputs(), &row, 1, nullptr, 0, w);
  };
  DenoiseRow row;
  row.temperature = kNaN;
  CHECK_THROWS(denoise(row, p.weight()), Code::kArgument, "temperature is nan");
  row = DenoiseRow();
  row.temperature = -1;
  CHECK_THROWS(denoise(row, p.weight()), Code::kArgument, "temperature");
  row = DenoiseRow();
  row.top_p = kNaN;
  CHECK_THROWS(denoise(row, p.weight()), Code::kArgument, "top_p is nan");
  for (const float beyond : {0.0f, 1.5f}) {
    row.top_p = beyond;
    CHECK_THROWS(denoise(row, p.weight()), Code::kArgument, "expected more than 0 and at most 1");
  }
  row = DenoiseRow();
  row.top_k = -3;
  CHECK_THROWS(denoise(row, p.weight()), Code::kArgument, "top_k is -3");
  row = DenoiseRow();
  row.banned = 20;
  CHECK_THROWS(denoise(row, p.weight()), Code::kArgument, "banned id is 20");
  row = DenoiseRow();
  row.guide_row = 3;
  CHECK_THROWS(denoise(row, p.weight()), Code::kArgument, "guide row 3 is outside the 3");
  row.guide_row = -2;
  CHECK_THROWS(denoise(row, p.weight()), Code::kArgument, "guide row -2");
  row = DenoiseRow();
  row.banned = 0;
  Weight one = p.weight();
  one.N = 1;
  CHECK_THROWS(denoise(row, one), Code::kArgument, "no id that is not banned");
  one.N = 2;
  row.banned_end = 0;
  denoise(row, one);
  CHECK(stats.best == 1);
  row.banned_end = 1;
  CHECK_THROWS(denoise(row, one), Code::kArgument, "no id that is not banned");
  row.banned_end = 2;
  CHECK_THROWS(denoise(row, one), Code::kArgument, "banned id is 2");
}

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

namespace {

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
