// Philox against the known answers that its authors publish with Random123, and what we build on it.

#include "core/attention_mask.h"
#include "core/rng.h"
#include "test/check.h"

using namespace dn;

namespace {

void check_answer(const uint32_t (&counter)[4], const uint32_t (&key)[2], const uint32_t (&expected)[4]) {
  const Philox4 r = philox4x32(counter[0], counter[1], counter[2], counter[3], key[0], key[1]);
  for (int i = 0; i < 4; ++i) {
    CHECK_MSG(r.v[i] == expected[i], "word " + std::to_string(i) + " is " + std::to_string(r.v[i]) +
                                         ", expected " + std::to_string(expected[i]));
  }
}

}  // namespace

DN_TEST(rng_philox_known_answers) {
  check_answer({0, 0, 0, 0}, {0, 0}, {0x6627e8d5u, 0xe169c58du, 0xbc57ac4cu, 0x9b00dbd8u});
  check_answer({0xffffffffu, 0xffffffffu, 0xffffffffu, 0xffffffffu}, {0xffffffffu, 0xffffffffu},
               {0x408f276du, 0x41c83b0eu, 0xa20bc7c6u, 0x6d5451fdu});
  check_answer({0x243f6a88u, 0x85a308d3u, 0x13198a2eu, 0x03707344u}, {0xa4093822u, 0x299f31d0u},
               {0xd16cfe09u, 0x94fdccebu, 0x5001e420u, 0x24126ea1u});
}

DN_TEST(rng_counter_words) {
  const uint64_t seed = 0x0123456789abcdefull, index = 0xfedcba9876543210ull;
  const Philox4 a = philox(seed, Stream::kDraw, 77, index);
  const Philox4 b = philox4x32(0x76543210u, 0xfedcba98u, 77, 5, 0x89abcdefu, 0x01234567u);
  for (int i = 0; i < 4; ++i) CHECK(a.v[i] == b.v[i]);
}

DN_TEST(rng_uniform_range) {
  CHECK(uniform53(0, 0) == 0.0);
  CHECK(uniform53(0xffffffffu, 0xffffffffu) < 1.0);
  CHECK(uniform53(0xffffffffu, 0xffffffffu) == 1.0 - std::ldexp(1.0, -53));
  CHECK(uniform53(0x80000000u, 0) == 0.5);
  CHECK(uniform53(0, 0x40u) == std::ldexp(1.0, -53));
}

// Mean 1/2, variance 1/12 and a flat histogram: 2^18 numbers, limits at five standard deviations.
DN_TEST(rng_uniform_distribution) {
  constexpr int kCount = 1 << 18, kBins = 64;
  double sum = 0, squares = 0;
  int bins[kBins] = {};
  for (int i = 0; i < kCount; ++i) {
    const double u = uniform(42, Stream::kMask, 3, static_cast<uint64_t>(i));
    CHECK(u >= 0 && u < 1);
    sum += u;
    squares += (u - 0.5) * (u - 0.5);
    ++bins[static_cast<int>(u * kBins)];
  }
  CHECK(std::fabs(sum / kCount - 0.5) < 5 * std::sqrt(1.0 / 12 / kCount));
  CHECK(std::fabs(squares / kCount - 1.0 / 12) < 5 * std::sqrt(1.0 / 180 / kCount));
  double chi = 0;
  for (const int n : bins)
    chi += (n - kCount / kBins) * (n - kCount / kBins) / static_cast<double>(kCount / kBins);
  CHECK_MSG(std::fabs(chi - (kBins - 1)) < 5 * std::sqrt(2.0 * (kBins - 1)),
            "chi-square " + std::to_string(chi));
}

DN_TEST(rng_order_does_not_matter) {
  double forwards[100], backwards[100];
  for (int i = 0; i < 100; ++i) forwards[i] = uniform(1, Stream::kDraw, 2, static_cast<uint64_t>(i));
  for (int i = 99; i >= 0; --i) backwards[i] = uniform(1, Stream::kDraw, 2, static_cast<uint64_t>(i));
  for (int i = 0; i < 100; ++i) CHECK(forwards[i] == backwards[i]);
}

DN_TEST(rng_every_coordinate_matters) {
  const double u = uniform(1, Stream::kDraw, 2, 3);
  CHECK(u != uniform(2, Stream::kDraw, 2, 3));
  CHECK(u != uniform(1ull << 32 | 1, Stream::kDraw, 2, 3));
  CHECK(u != uniform(1, Stream::kMask, 2, 3));
  CHECK(u != uniform(1, Stream::kDraw, 3, 3));
  CHECK(u != uniform(1, Stream::kDraw, 2, 4));
  CHECK(u != uniform(1, Stream::kDraw, 2, 1ull << 32 | 3));
}

DN_TEST(rng_annealed_density) {
  AttentionMask mask;
  mask.kind = MaskKind::kAnnealed;
  mask.seed = 3;
  mask.step = 11;
  constexpr int S = 256;
  constexpr int kPairs = S * (S - 1) / 2;
  for (const double ratio : {0.0, 0.25, 0.9}) {
    mask.threshold = annealing_threshold(ratio);
    int future = 0;
    for (int q = 0; q < S; ++q) {
      for (int k = 0; k <= q; ++k) CHECK(visible(mask, q, k));
      for (int k = q + 1; k < S; ++k) future += visible(mask, q, k);
    }
    const double sd = std::sqrt(ratio * (1 - ratio) * kPairs);
    CHECK_MSG(std::fabs(future - ratio * kPairs) <= 5 * sd,
              "ratio " + std::to_string(ratio) + ": " + std::to_string(future));
  }
  CHECK(annealing_threshold(-1) == 0);
  CHECK(annealing_threshold(1) == 0xFFFFFFFFu);
}
