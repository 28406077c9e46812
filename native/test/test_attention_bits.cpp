// What must not change a bit of attention: threads, batch composition, keys from a cache, selected queries,
// and what an earlier call prepared; and where tiles may add in another order.
#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "core/backend.h"
#include "cpu/ops.h"
#include "test/attention_batch.h"
#include "test/check.h"
#include "test/same_bits.h"

namespace dn::cpu {
namespace {

using namespace dn::test::attention;

using test::same_bits;

}  // namespace

DN_TEST(attention_bits_do_not_depend_on_threads) {
  for (const Isa isa : isas()) {
    for (const MaskKind kind : kRuleKinds) {
      for (const int64_t HS : {20, 32, 70}) {
        if (dn::test::kSanitized && HS == 20) continue;
        Batch one(6, HS, {1, 7, 64, 65, 200}, mask_of(kind)), other = one;
        one.forward(isa, 1);
        one.backward(isa, 1);
        for (const int threads : {2, 8}) {
          other.forward(isa, threads);
          other.backward(isa, threads);
          CHECK_MSG(same_bits(one.out, other.out) && same_bits(one.lse, other.lse) &&
                        same_bits(one.dqkv, other.dqkv),
                    describe(one, isa, mask_of(kind)) + ": bits differ with " + std::to_string(threads) +
                        " threads");
        }
      }
    }
  }
}

DN_TEST(attention_bits_do_not_depend_on_the_batch) {
  for (const Isa isa : isas()) {
    for (const MaskKind kind : kRuleKinds) {
      for (const int64_t HS : {20, 32, 64}) {
        Batch all(2, HS, {1, 7, 64, 65, 200}, mask_of(kind));
        all.forward(isa, 2);
        all.backward(isa, 2);
        const int64_t C = all.C();
        for (const AttentionSequence& s : all.sequences) {
          Batch alone(2, HS, {s.k_len}, mask_of(kind));
          std::memcpy(alone.qkv.data(), all.qkv.data() + s.q_begin * 3 * C, alone.qkv.size() * sizeof(float));
          std::memcpy(alone.dout.data(), all.dout.data() + s.q_begin * C, alone.dout.size() * sizeof(float));
          alone.forward(isa, 1);
          alone.backward(isa, 1);
          const auto equal = [](const std::vector<float>& a, const float* b) {
            return std::memcmp(a.data(), b, a.size() * sizeof(float)) == 0;
          };
          CHECK_MSG(equal(alone.out, all.out.data() + s.q_begin * C) &&
                        equal(alone.lse, all.lse.data() + s.q_begin * 2) &&
                        equal(alone.dqkv, all.dqkv.data() + s.q_begin * 3 * C),
                    describe(all, isa, mask_of(kind)) + ": a sequence of " + std::to_string(s.k_len) +
                        " differs alone");
        }
      }
    }
  }
}

// Some queries of a sequence, with keys from a cache as long as they need: the bits of the full call.
DN_TEST(attention_with_a_cache_equals_full_recomputation) {
  for (const Isa isa : isas()) {
    for (const MaskKind kind : {MaskKind::kCausal, MaskKind::kBlockCausal}) {
      for (const int64_t HS : {64, 20}) {
        Batch full(3, HS, {200}, mask_of(kind));
        full.forward(isa, 2);
        const int64_t C = full.C();
        const std::vector<float> cache = cache_of(full.qkv_tensor().columns(C, 2 * C), 3);
        for (const int64_t q : {0, 4, 62, 63, 64, 99, 127, 128, 199}) {
          for (const int64_t count : {1, 3, 40}) {
            if (q + 1 < count) continue;
            AttentionSequence s;
            s.q_end = count;
            s.k_len = kind == MaskKind::kCausal ? q + 1 : std::min<int64_t>(200, (q / 5 + 1) * 5);
            s.cache = cache.data();
            s.mask = mask_of(kind);
            const int64_t first = q + 1 - count;
            std::vector<float> out(static_cast<size_t>(count * C), kNan),
                lse(static_cast<size_t>(count * 3), kNan);
            attention_forward({2, isa}, Tensor(out.data(), Dtype::kF32, count, C),
                              Tensor(lse.data(), Dtype::kF32, count, 3),
                              full.qkv_tensor().columns(0, C).slice(first, count), Tensor(), &s, 1,
                              full.positions.data() + first, 3);
            CHECK_MSG(std::memcmp(out.data(), &full.out[static_cast<size_t>(first * C)],
                                  out.size() * sizeof(float)) == 0 &&
                          std::memcmp(lse.data(), &full.lse[static_cast<size_t>(first * 3)],
                                      lse.size() * sizeof(float)) == 0,
                      describe(full, isa, s.mask) + ": " + std::to_string(count) +
                          " queries up to position " + std::to_string(q) + " differ from the full call");
          }
        }
      }
    }
  }
}

// Scattered queries of a sequence, as a sampler asks for them, without lse.
DN_TEST(attention_of_selected_queries) {
  for (const Isa isa : isas()) {
    for (const MaskKind kind : kRuleKinds) {
      for (const int64_t HS : {16, 32, 64}) {
        Batch full(6, HS, {150}, mask_of(kind));
        full.forward(isa, 2);
        const int64_t C = full.C();
        const std::vector<int32_t> chosen = {149, 3, 77, 64, 0};
        std::vector<float> q, out(chosen.size() * static_cast<size_t>(C), kNan);
        for (const int32_t t : chosen)
          q.insert(q.end(), &full.qkv[static_cast<size_t>(t * 3 * C)],
                   &full.qkv[static_cast<size_t>(t * 3 * C)] + C);
        AttentionSequence s = full.sequences[0];
        s.q_end = static_cast<int64_t>(chosen.size());
        attention_forward({2, isa}, Tensor(out.data(), Dtype::kF32, s.q_end, C), Tensor(),
                          Tensor(q.data(), Dtype::kF32, s.q_end, C), full.qkv_tensor().columns(C, 2 * C), &s,
                          1, chosen.data(), 6);
        for (size_t i = 0; i < chosen.size(); ++i) {
          CHECK_MSG(
              std::memcmp(&out[i * static_cast<size_t>(C)], &full.out[static_cast<size_t>(chosen[i] * C)],
                          C * sizeof(float)) == 0,
              describe(full, isa, s.mask) + ": selected query " + std::to_string(chosen[i]) + " differs");
        }
      }
    }
  }
}

// A kernel may prepare the next block of keys; when nobody sees it and it has changed by the next call, what
// was prepared must not be used.
DN_TEST(attention_does_not_remember_keys) {
  const int32_t T = 128;
  std::vector<uint8_t> early(static_cast<size_t>(T) * T), late(early.size());
  for (int32_t i = 0; i < T * T; ++i) (i % T < 64 ? early : late)[static_cast<size_t>(i)] = 1;
  for (const Isa isa : isas()) {
    Batch b(1, 64, {T}, mask_of(MaskKind::kMatrix));
    AttentionMask& mask = b.sequences[0].mask;
    mask.matrix_width = T;
    mask.matrix = early.data();
    b.forward(isa, 1);
    for (float& x : b.qkv) x = -x;
    mask.matrix = late.data();
    b.forward(isa, 1);
    const Reference r = reference(b);
    CHECK_CLOSE(b.out.data(), r.out.data(), b.N * b.C(), 3e-6, describe(b, isa, mask) + " out");
  }
}

// Tiles add in another order than vectors do. Keys from a cache, and masks that make a cache exact, stay with
// the vectors.
DN_TEST(attention_takes_tiles_where_keys_are_not_cached) {
  if (detected_isa() < Isa::kAmx) return;
  for (const MaskKind kind : kRuleKinds) {
    Batch vectors(2, 64, {100}, mask_of(kind)), tiles = vectors;
    vectors.forward(Isa::kAvx512, 1);
    tiles.forward(Isa::kAmx, 1);
    const bool stays = kind == MaskKind::kCausal || kind == MaskKind::kBlockCausal;
    CHECK_MSG(same_bits(vectors.out, tiles.out) == stays, describe(tiles, Isa::kAmx, mask_of(kind)));

    // The first 40 rows as queries, the others as if they were a cache.
    AttentionSequence s;
    s.q_end = 40;
    s.k_len = 20;
    const std::vector<float> cache =
        cache_of(vectors.qkv_tensor().columns(vectors.C(), 2 * vectors.C()).slice(40, 20), 2);
    s.cache = cache.data();
    s.mask = mask_of(kind);
    s.mask.half = 10;
    std::vector<float> out[2];
    for (const Isa isa : {Isa::kAvx512, Isa::kAmx}) {
      std::vector<float>& o = out[isa == Isa::kAmx];
      o.assign(static_cast<size_t>(40 * vectors.C()), kNan);
      attention_forward({1, isa}, Tensor(o.data(), Dtype::kF32, 40, vectors.C()), Tensor(),
                        vectors.qkv_tensor().columns(0, vectors.C()).slice(0, 40), Tensor(), &s, 1,
                        vectors.positions.data(), 2);
    }
    CHECK_MSG(same_bits(out[0], out[1]), describe(tiles, Isa::kAmx, s.mask) + ": a cache went on tiles");
  }
}

}  // namespace dn::cpu
