// Attention whose scores are multiplied in pairs (cpu/attention_pairs_avx512.cpp), kernel by kernel: as exact
// as chains of fma for every kind of query and key that networks have, the same bits for any rows beside, and
// what scales, zeros, the ends of the range and numbers that are not finite do.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "cpu/attention_kernels.h"
#include "cpu/scratch.h"
#include "test/attention_batch.h"
#include "test/check.h"
#include "test/same_bits.h"

namespace dn::cpu {
namespace {

using namespace dn::test::attention;
using test::same_bits;

bool has_pairs() { return detected_isa() >= Isa::kAvx512 && kAttentionForwardPairs.begin != nullptr; }

// One head of T queries and as many keys. Rows of q, k and v lie 3 HS floats apart.
struct Head {
  int64_t T, HS;
  std::vector<float> qkv;

  Head(int64_t tokens, int64_t head_size)
      : T(tokens), HS(head_size), qkv(random_values(tokens * 3 * head_size, 3)) {}
  float* q(int64_t t) { return qkv.data() + t * 3 * HS; }
  float* k(int64_t t) { return q(t) + HS; }
  float* v(int64_t t) { return q(t) + 2 * HS; }
};

struct Result {
  std::vector<float> out, lse;  // (rows, HS), (rows)
};

// Queries [first, first + rows) against all keys.
Result attend(const AttentionForward& forward, Head& head, int64_t first, int64_t rows) {
  const int64_t HS = head.HS, HSp = (HS + kHeadPad - 1) / kHeadPad * kHeadPad;
  const int64_t held = (rows + forward.row_multiple - 1) / forward.row_multiple * forward.row_multiple;
  Scratch scratch;
  ForwardTile t;
  PackedKeys packed;
  t.rows = rows;
  t.HS = HS;
  t.HSp = HSp;
  t.scale = 1.0f / std::sqrt(static_cast<float>(HS));
  lay_out(scratch, [&](Cutter& cut) {
    t.q = cut.take(held * (HSp + forward.query_extra));
    t.acc = cut.take(held * HSp);
    t.max = cut.take(held);
    t.sum = cut.take(held * kSumLanes);
    t.keys = cut.take(HSp * kKeyBlock);
    t.values = cut.take(HSp * kKeyBlock);
    t.scores = cut.take(forward.score_floats);
  });
  t.packed = &packed;
  Result r = {std::vector<float>(static_cast<size_t>(rows * HS), kNan),
              std::vector<float>(static_cast<size_t>(rows), kNan)};
  const ForwardAhead ahead;
  forward.begin(t, head.q(first), 3 * HS, ahead);
  for (int64_t k0 = 0; k0 < head.T; k0 += kKeyBlock)
    forward.block(t, {head.k(k0), head.v(k0), 3 * HS, std::min(kKeyBlock, head.T - k0)}, nullptr, ahead);
  forward.end(t, r.out.data(), HS, r.lse.data(), 1);
  return r;
}

Result in_pairs(Head& head) { return attend(kAttentionForwardPairs, head, 0, head.T); }

// Root mean square difference to the same in double.
double error_of(const Result& result, Head& head) {
  double sum = 0;
  std::vector<double> p(static_cast<size_t>(head.T));
  for (int64_t i = 0; i < head.T; ++i) {
    double most = -1e300, total = 0;
    for (int64_t j = 0; j < head.T; ++j) {
      double score = 0;
      for (int64_t d = 0; d < head.HS; ++d) score += static_cast<double>(head.q(i)[d]) * head.k(j)[d];
      p[static_cast<size_t>(j)] = score / std::sqrt(static_cast<double>(head.HS));
      most = std::max(most, p[static_cast<size_t>(j)]);
    }
    for (double& x : p) total += x = std::exp(x - most);
    for (int64_t d = 0; d < head.HS; ++d) {
      double want = 0;
      for (int64_t j = 0; j < head.T; ++j) want += p[static_cast<size_t>(j)] / total * head.v(j)[d];
      sum += std::pow(result.out[static_cast<size_t>(i * head.HS + d)] - want, 2.0);
    }
  }
  return std::sqrt(sum / static_cast<double>(head.T * head.HS));
}

// A number of a query or a key from a normal one, its row and its channel.
using Shape = std::function<double(double x, int64_t t, int64_t d)>;

struct Operands {
  const char* name;
  Shape q, k;
  double most;  // error expected at most, as a multiple of that of chains
};

}  // namespace

// Channels that stand out in keys, or in queries and keys, means, heavy tails, keys of very different sizes.
DN_TEST(attention_in_pairs_is_as_exact_as_chains) {
  if (!has_pairs() || dn::test::kSanitized) return;
  const Shape normal = [](double x, int64_t, int64_t) { return x; };
  const auto stands_out = [](int64_t first, int64_t last, double size) {
    return [=](double x, int64_t, int64_t d) { return d >= first && d <= last ? size + x : x; };
  };
  const Operands kinds[] = {
      {"normal", normal, normal, 1.5},
      {"sharp", [](double x, int64_t, int64_t) { return 6 * x; }, normal, 1.5},
      {"means", [](double x, int64_t, int64_t) { return 1 + x; },
       [](double x, int64_t, int64_t) { return 0.5 + x; }, 1.5},
      {"heavy tails", [](double x, int64_t, int64_t) { return x * x * x; },
       [](double x, int64_t, int64_t) { return x * std::fabs(x); }, 1.5},
      {"a channel of keys", normal, stands_out(7, 7, 20), 2},
      {"a channel of both", stands_out(7, 7, 4), stands_out(7, 7, 20), 2},
      {"keys of many sizes", normal, [](double x, int64_t t, int64_t) { return std::ldexp(x, t % 9 - 8); },
       1.5},
      {"tiny queries, large keys", [](double x, int64_t, int64_t) { return 1e-25 * x; },
       [](double x, int64_t, int64_t) { return 1e25 * x; }, 1.5},
      // What pairs are worst at: the two that stand out are one pair.
      {"a pair of keys' channels", normal, stands_out(6, 7, 20), 4},
  };
  for (const Operands& kind : kinds) {
    for (const int64_t HS : {64, 80, 97}) {
      Head head(200, HS);
      for (int64_t t = 0; t < head.T; ++t) {
        for (int64_t d = 0; d < HS; ++d) {
          head.q(t)[d] = static_cast<float>(kind.q(head.q(t)[d], t, d));
          head.k(t)[d] = static_cast<float>(kind.k(head.k(t)[d], t, d));
        }
      }
      const double pairs = error_of(in_pairs(head), head);
      const double chains = error_of(attend(kAttentionAvx512.forward, head, 0, head.T), head);
      const std::string what = std::string(kind.name) + ", HS " + std::to_string(HS) + ": error " +
                               std::to_string(pairs * 1e9) + "e-9, " + std::to_string(pairs / chains) +
                               " times that of chains";
      if (HS == 64) std::printf("  %s\n", what.c_str());
      CHECK_MSG(pairs <= kind.most * chains, what);
    }
  }
}

// A query's bits for any number of queries beside it, and for keys in a block that is not full.
DN_TEST(attention_in_pairs_has_the_same_bits_for_any_rows) {
  if (!has_pairs()) return;
  for (const int64_t HS : {64, 70, 96}) {
    for (const int64_t T : {1, 20, 64, 77, 130, 200}) {
      Head head(T, HS);
      const Result all = in_pairs(head);
      for (const int64_t rows : {1, 3, 4, 5, 8, 11, 12, 13, 24, 37}) {
        for (int64_t first = 0; first + rows <= T; first += dn::test::kSanitized ? 61 : 17) {
          const Result some = attend(kAttentionForwardPairs, head, first, rows);
          const auto begin = all.out.begin() + first * HS;
          CHECK_MSG(same_bits(some.out, std::vector<float>(begin, begin + rows * HS)) &&
                        same_bits(some.lse, std::vector<float>(all.lse.begin() + first,
                                                               all.lse.begin() + first + rows)),
                    std::to_string(rows) + " queries from " + std::to_string(first) + " of " +
                        std::to_string(T) + ", HS " + std::to_string(HS));
        }
      }
    }
  }
}

// Powers of two that move from queries to keys change no bit, far beyond where squares are numbers.
DN_TEST(attention_in_pairs_scales_exactly) {
  if (!has_pairs()) return;
  Head head(100, 64);
  std::fill_n(head.q(7), 64, 0.0f);
  std::fill_n(head.k(41), 64, 0.0f);
  const Result want = in_pairs(head);
  for (const int power : {1, 2, 17, 38, 45, 61, 100, 115, -1, -17, -38, -45, -61, -100, -115}) {
    Head moved = head;
    for (int64_t t = 0; t < head.T; ++t) {
      for (int64_t d = 0; d < head.HS; ++d) {
        moved.q(t)[d] = std::ldexp(moved.q(t)[d], power);
        moved.k(t)[d] = std::ldexp(moved.k(t)[d], -power);
      }
    }
    const Result got = in_pairs(moved);
    CHECK_MSG(same_bits(got.out, want.out) && same_bits(got.lse, want.lse),
              "2^" + std::to_string(power) + " from keys to queries");
  }
  // Rows of different sizes, usual ones beside those whose squares are no numbers.
  Head mixed = head;
  for (int64_t t = 0; t < head.T; t += 3) {
    for (int64_t d = 0; d < head.HS; ++d) {
      mixed.q(t)[d] = std::ldexp(mixed.q(t)[d], -100);
      mixed.k(t)[d] = std::ldexp(mixed.k(t)[d], -100);
    }
  }
  CHECK(error_of(in_pairs(mixed), mixed) < 2e-7);
}

DN_TEST(attention_in_pairs_of_zeros_and_of_what_is_not_finite) {
  if (!has_pairs()) return;
  const auto is = [](const Result& r, int64_t t, bool (*kind)(float)) {
    return std::all_of(r.out.begin() + t * 64, r.out.begin() + (t + 1) * 64, kind);
  };
  const auto numbers = +[](float x) { return std::isfinite(x); };
  const auto nans = +[](float x) { return std::isnan(x); };
  // Scores of zeros are exactly 0: all keys of a query the same, and a key of zeros beside large queries and
  // small keys what it is beside others.
  Head zeros(70, 64);
  std::fill_n(zeros.q(5), 64, 0.0f);
  for (int64_t t = 60; t < 70; ++t) std::fill_n(zeros.k(t), 64, 0.0f);
  const Result of_zeros = in_pairs(zeros);
  CHECK(error_of(of_zeros, zeros) < 2e-7);
  CHECK(std::fabs(of_zeros.lse[5] - std::log(70.0)) < 1e-6);
  Head uneven = zeros;
  for (int64_t t = 0; t < 70; ++t) {
    for (int64_t d = 0; d < 64; ++d) {
      uneven.q(t)[d] = std::ldexp(uneven.q(t)[d], 30);
      uneven.k(t)[d] = std::ldexp(uneven.k(t)[d], -30);
    }
  }
  CHECK(same_bits(in_pairs(uneven).out, of_zeros.out));
  for (const float bad : {kNan, std::numeric_limits<float>::infinity()}) {
    for (const int64_t d : {0, 2, 7, 63}) {
      Head query(70, 64), key = query;
      query.q(33)[d] = bad;
      key.k(66)[d] = bad;
      const Result of_query = in_pairs(query), of_key = in_pairs(key);
      for (int64_t t = 0; t < 70; ++t) {
        CHECK_MSG(is(of_query, t, t == 33 ? nans : numbers),
                  "query " + std::to_string(t) + " beside one whose number " + std::to_string(d) + " is " +
                      std::to_string(bad));
        CHECK_MSG(is(of_key, t, nans), "query " + std::to_string(t) + " and a key whose number " +
                                           std::to_string(d) + " is " + std::to_string(bad));
      }
    }
  }
}

// What could overflow is NaN, never a number or a key that is left out.
DN_TEST(attention_in_pairs_of_the_largest_numbers) {
  if (!has_pairs()) return;
  for (const double sign : {1.0, -1.0}) {
    for (const int64_t first : {0, 3}) {  // a pair that is added, and one that is subtracted
      for (const int power : {100, 112, 116, 119, 122, 126, 127}) {
        Head head(20, 64);
        for (int64_t t = 0; t < 20; ++t) {
          for (int64_t d = 0; d < 64; ++d) head.q(t)[d] = std::ldexp(head.q(t)[d], -power);
        }
        std::fill_n(head.k(9), 64, 0.0f);
        head.k(9)[first] = static_cast<float>(std::ldexp(1, power));
        head.k(9)[first + 1] = static_cast<float>(std::ldexp(sign, power));
        const Result got = in_pairs(head);
        const bool is_nan =
            std::all_of(got.out.begin(), got.out.end(), [](float x) { return std::isnan(x); });
        CHECK_MSG((power > 112 && is_nan) || error_of(got, head) < 2e-7,
                  "a key of 2^" + std::to_string(power) + ": error " + std::to_string(error_of(got, head)));
      }
    }
  }
}

// Rows in the same twelve, or sixteen, that are huge, tiny, zero or not finite change no bit of a query.
DN_TEST(attention_in_pairs_does_not_look_at_neighbours) {
  if (!has_pairs()) return;
  Head head(64, 64);
  const Result want = in_pairs(head);
  for (const float factor : {1e30f, 1e-30f, 0.0f, kNan}) {
    Head other = head;
    for (int64_t t = 1; t < 64; t += 2) {
      for (int64_t d = 0; d < 64; ++d) other.q(t)[d] *= factor;
    }
    const Result got = in_pairs(other);
    for (int64_t t = 0; t < 64; t += 2) {
      CHECK_MSG(
          std::equal(got.out.begin() + t * 64, got.out.begin() + (t + 1) * 64, want.out.begin() + t * 64),
          "query " + std::to_string(t) + " beside others times " + std::to_string(factor));
    }
  }
}

// Masks under which the last query sees all keys, and the same keys from a cache: a cache, and masks under
// which it is exact, stay with chains.
DN_TEST(attention_takes_pairs_where_keys_are_not_cached) {
  if (!has_pairs() || !has_fast_pairs()) return;
  std::vector<uint8_t> matrix(100 * 100, 1);
  for (const MaskKind kind :
       {MaskKind::kFull, MaskKind::kMatrix, MaskKind::kCausal, MaskKind::kBlockCausal}) {
    AttentionMask mask = mask_of(kind);
    mask.matrix = matrix.data();
    mask.matrix_width = 100;
    Batch b(1, 64, {100}, mask);
    b.forward(Isa::kAvx512, 1);
    Head head(100, 64);
    head.qkv = b.qkv;
    const std::vector<float> last(b.out.end() - 64, b.out.end());
    const bool stays = kind == MaskKind::kCausal || kind == MaskKind::kBlockCausal;
    const AttentionForward& taken = stays ? kAttentionAvx512.forward : kAttentionForwardPairs;
    const AttentionForward& other = stays ? kAttentionForwardPairs : kAttentionAvx512.forward;
    CHECK_MSG(same_bits(last, attend(taken, head, 99, 1).out),
              "mask " + std::to_string(static_cast<int>(kind)));
    CHECK(!same_bits(last, attend(other, head, 99, 1).out));

    AttentionSequence s;
    s.q_end = 1;
    s.k_len = 100;
    std::vector<float> out(64, kNan);
    const std::vector<float> cache = cache_of(b.qkv_tensor().columns(64, 2 * 64), 1);
    s.cache = cache.data();
    s.mask = mask;
    const int32_t position = 99;
    attention_forward({1, Isa::kAvx512}, Tensor(out.data(), Dtype::kF32, 1, 64), Tensor(),
                      b.qkv_tensor().columns(0, 64).slice(99, 1), Tensor(), &s, 1, &position, 1);
    CHECK(same_bits(out, attend(kAttentionAvx512.forward, head, 99, 1).out));
  }
}

}  // namespace dn::cpu
