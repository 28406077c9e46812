// The head against plain fp64 formulas on full logits: logits, masked cross-entropy with gradients; every
// instruction set, thread counts, rows alone and in a batch; and what the head refuses. Denoising statistics:
// test_head_denoise.cpp.

#include <algorithm>
#include <cmath>
#include <cstring>
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

struct CrossEntropy {
  std::vector<float> losses, dhidden, dwte;
};

CrossEntropy cross_entropy(const Cpu& cpu, Problem& p, const std::vector<int64_t>& rows,
                           const std::vector<int32_t>& targets, const std::vector<float>& weights,
                           bool gradients = true, Store store = Store::kAdd) {
  CrossEntropy out;
  out.losses.assign(rows.size(), kNaN);
  out.dhidden.assign(p.hidden.size(), kNaN);  // must be overwritten
  out.dwte.assign(p.wte.size(), store == Store::kSet ? kNaN : 0.0f);
  cpu::head_cross_entropy(cpu, out.losses.data(), gradients ? tensor(out.dhidden, p.C) : Tensor(),
                          gradients ? tensor(out.dwte, p.C) : Tensor(), p.inputs(), rows.data(),
                          targets.data(), weights.data(), static_cast<int64_t>(rows.size()), p.weight(),
                          MatmulPrecision::kFP32, store);
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

// dwte that is set, also by several chunks of rows and by none, is what is added to zeros.
DN_TEST(head_cross_entropy_sets_gradients) {
  for (const Isa isa : instruction_sets()) {
    for (const int64_t V : {int64_t{257}, int64_t{50257}}) {
      if (is_left_out(isa, V)) continue;
      Problem p(300, 11, V);
      for (const int64_t R : {int64_t{0}, int64_t{5}, int64_t{300}}) {
        const RowList list(R, p.N, V);
        const CrossEntropy added = cross_entropy({2, isa}, p, list.rows, list.targets, list.weights);
        const CrossEntropy set =
            cross_entropy({2, isa}, p, list.rows, list.targets, list.weights, true, Store::kSet);
        CHECK_MSG(same_bits(added.dwte, set.dwte), label("dwte", isa, V));
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
