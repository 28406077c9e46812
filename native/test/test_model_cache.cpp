// Key-value caches: forward passes that go on in one against the whole sequence at once, bit for bit, and
// what is refused.

#include <string>
#include <vector>

#include "core/error.h"
#include "core/model.h"
#include "test/check.h"
#include "test/model_logits.h"
#include "test/naive_gpt2.h"

using namespace dn;
using namespace dn::test;
using namespace dn::test::inference;

namespace {

// Rows [begin, end) of a sequence as a batch that goes on in a cache.
Batch cached_part(const Batch& whole, int32_t begin, int32_t end, KvCache* cache) {
  Batch batch;
  batch.ids.assign(whole.ids.begin() + begin, whole.ids.begin() + end);
  batch.positions.assign(whole.positions.begin() + begin, whole.positions.begin() + end);
  Sequence s = whole.sequences[0];
  s.begin = 0;
  s.end = end - begin;
  s.k_len = end;
  s.cache = cache;
  batch.sequences.push_back(s);
  return batch;
}

}  // namespace

DN_TEST(model_cached_decoding_equals_recomputation) {
  const NaiveGpt2 naive = random_weights(tiny_config(20, 37), 9);
  const auto model = make_model(naive);
  const size_t V = static_cast<size_t>(naive.config.vocab);
  Batch whole;
  Numbers numbers(3);
  append_sequence(whole, numbers, 12, naive.config.vocab, mask_of(MaskKind::kCausal));
  const std::vector<float> expected = forward_logits(*model, whole);
  KvCache cache(model->backend(), naive.config, 12);
  CHECK(cache.capacity() == 12 && cache.bytes() == 2u * model->backend().kv_cache_bytes(12, 20));
  // A prompt of 4, then tokens one by one.
  for (int32_t begin = 0, end = 4; begin < 12; begin = end++) {
    const std::vector<float> part = forward_logits(*model, cached_part(whole, begin, end, &cache));
    CHECK_MSG(same_bits(part.data(), &expected[static_cast<size_t>(begin) * V], part.size()),
              "from " + std::to_string(begin));
  }
  // Only the last row of a prompt, as a decoder asks for it.
  KvCache fresh(model->backend(), naive.config, 12);
  const std::vector<float> last = forward_logits(*model, cached_part(whole, 0, 9, &fresh), {8});
  CHECK(same_bits(last.data(), &expected[8 * V], V));
  const std::vector<float> next = forward_logits(*model, cached_part(whole, 9, 10, &fresh));
  CHECK(same_bits(next.data(), &expected[9 * V], V));
}

// Block-causal decoding denoises a block several times in place; only its last version may count.
DN_TEST(model_cache_blocks_are_overwritten) {
  const NaiveGpt2 naive = random_weights(tiny_config(20, 37), 10);
  const auto model = make_model(naive);
  const size_t V = static_cast<size_t>(naive.config.vocab);
  Batch whole;
  Numbers numbers(4);
  append_sequence(whole, numbers, 12, naive.config.vocab, mask_of(MaskKind::kBlockCausal, 4));
  const std::vector<float> expected = forward_logits(*model, whole);
  KvCache cache(model->backend(), naive.config, 12);
  for (int32_t begin = 0; begin < 12; begin += 4) {
    Batch noisy = cached_part(whole, begin, begin + 4, &cache);
    for (int32_t& id : noisy.ids) id = 36;
    const std::vector<float> first = forward_logits(*model, noisy);
    CHECK(!same_bits(first.data(), &expected[static_cast<size_t>(begin) * V], first.size()));
    const std::vector<float> clean = forward_logits(*model, cached_part(whole, begin, begin + 4, &cache));
    CHECK_MSG(same_bits(clean.data(), &expected[static_cast<size_t>(begin) * V], clean.size()),
              "block " + std::to_string(begin));
  }
  // The middle of a full-attention sequence against stale neighbours: what changed nothing changes nothing.
  for (Sequence& s : whole.sequences) s.mask = mask_of(MaskKind::kFull);
  const std::vector<float> full = forward_logits(*model, whole);
  forward_logits(*model, cached_part(whole, 0, 12, &cache));
  Batch middle = cached_part(whole, 5, 8, &cache);
  middle.sequences[0].k_len = 12;
  const std::vector<float> again = forward_logits(*model, middle);
  CHECK(same_bits(again.data(), &full[5 * V], again.size()));
}

DN_TEST(model_cached_and_plain_sequences_in_one_batch) {
  const NaiveGpt2 naive = random_weights(tiny_config(20, 37), 11);
  const auto model = make_model(naive);
  const size_t V = static_cast<size_t>(naive.config.vocab);
  Batch causal, full;
  Numbers numbers(6);
  append_sequence(causal, numbers, 8, naive.config.vocab, mask_of(MaskKind::kCausal));
  append_sequence(full, numbers, 5, naive.config.vocab, mask_of(MaskKind::kFull));
  const std::vector<float> expected_causal = forward_logits(*model, causal),
                           expected_full = forward_logits(*model, full);
  KvCache cache(model->backend(), naive.config, 10);
  forward_logits(*model, cached_part(causal, 0, 6, &cache));
  Batch both = cached_part(causal, 6, 8, &cache);
  both.ids.insert(both.ids.end(), full.ids.begin(), full.ids.end());
  both.positions.insert(both.positions.end(), full.positions.begin(), full.positions.end());
  both.sequences.push_back(full.sequences[0]);
  both.sequences[1].begin = 2;
  both.sequences[1].end = 7;
  const std::vector<float> got = forward_logits(*model, both);
  CHECK(same_bits(got.data(), &expected_causal[6 * V], 2 * V));
  CHECK(same_bits(got.data() + 2 * V, expected_full.data(), expected_full.size()));
  const std::vector<float> listed = forward_logits(*model, both, {6, 1, 2});
  CHECK(same_bits(&listed[0], &got[6 * V], V) && same_bits(&listed[V], &got[V], V) &&
        same_bits(&listed[2 * V], &got[2 * V], V));
}

DN_TEST(model_rejects_bad_caches) {
  const NaiveGpt2 naive = random_weights(tiny_config(), 16);
  const auto model = make_model(naive);
  CHECK_THROWS(KvCache(model->backend(), naive.config, 0), Code::kArgument, "capacity is 0");
  CHECK_THROWS(KvCache(model->backend(), naive.config, 13), Code::kArgument, "capacity is 13");
  KvCache cache(model->backend(), naive.config, 6), other(model->backend(), tiny_config(32), 6);
  Batch whole;
  Numbers numbers(7);
  append_sequence(whole, numbers, 8, naive.config.vocab, mask_of(MaskKind::kCausal));
  CHECK_THROWS(model->forward(cached_part(whole, 0, 7, &cache), {}), Code::kArgument, "capacity, 6");
  CHECK_THROWS(model->forward(cached_part(whole, 0, 4, &other), {}), Code::kArgument, "bytes");
  Batch batch = cached_part(whole, 0, 4, &cache);
  batch.sequences[0].k_len = 0;
  CHECK_THROWS(model->forward(batch, {}), Code::kArgument, "k_len is 0");
  batch.sequences[0].k_len = 3;
  CHECK_THROWS(model->forward(batch, {}), Code::kArgument, "row 3 is at position 3, but k_len is 3");
  batch.sequences[0].k_len = 4;
  batch.ids.push_back(0);
  batch.positions.push_back(0);
  batch.sequences.push_back(batch.sequences[0]);
  batch.sequences[1].begin = 4;
  batch.sequences[1].end = 5;
  CHECK_THROWS(model->forward(batch, {}), Code::kArgument, "already belongs");
}
