// The model at inference: the forward pass against a naive one in double, and everything that must not change
// a bit (batch mates, listed rows, packing, threads). Bad batches and full memory. Parameters and caches are
// in test_model_parameters.cpp and test_model_cache.cpp.

#include <algorithm>
#include <cmath>
#include <memory>
#include <string>
#include <vector>

#include "core/error.h"
#include "core/model.h"
#include "test/check.h"
#include "test/model_logits.h"
#include "test/naive_gpt2.h"
#include "test/proxy_backend.h"

using namespace dn;
using namespace dn::test;
using namespace dn::test::inference;

namespace {

double largest(const Doubles& values) {
  double most = 0;
  for (const double x : values) most = std::max(most, std::fabs(x));
  return most;
}

// Three ragged sequences with different masks, one of a single token.
Batch ragged_batch(int32_t vocab) {
  Batch batch;
  Numbers numbers(17);
  append_sequence(batch, numbers, 7, vocab, mask_of(MaskKind::kCausal));
  append_sequence(batch, numbers, 1, vocab, mask_of(MaskKind::kFull));
  append_sequence(batch, numbers, 12, vocab, mask_of(MaskKind::kFull));
  return batch;
}

}  // namespace

DN_TEST(model_logits_match_naive) {
  for (const int32_t channels : {16, 20}) {
    const NaiveGpt2 naive = random_weights(tiny_config(channels, channels == 16 ? 11 : 37), 1);
    const auto model = make_model(naive);
    for (const NamedMask& named : all_masks()) {
      Batch batch;
      Numbers numbers(23);
      for (const int32_t length : {12, 5, 1})
        append_sequence(batch, numbers, length, naive.config.vocab, named.mask);
      double_positions(batch);
      const Doubles expected = naive.logits(batch);
      const std::vector<float> got = forward_logits(*model, batch);
      CHECK(got.size() == expected.size());
      CHECK_CLOSE(got.data(), expected.data(), static_cast<int64_t>(expected.size()),
                  2e-5 * largest(expected), named.name);
    }
  }
}

// A future token must reach earlier rows without a causal mask, and must not with one.
DN_TEST(model_bidirectional_or_causal) {
  const NaiveGpt2 naive = random_weights(tiny_config(), 2);
  const auto model = make_model(naive);
  for (const MaskKind kind : {MaskKind::kFull, MaskKind::kCausal}) {
    Batch batch;
    Numbers numbers(5);
    append_sequence(batch, numbers, 8, naive.config.vocab, mask_of(kind));
    const std::vector<float> before = forward_logits(*model, batch);
    batch.ids[7] = (batch.ids[7] + 1) % naive.config.vocab;
    const std::vector<float> after = forward_logits(*model, batch);
    const size_t earlier = 7 * static_cast<size_t>(naive.config.vocab);
    CHECK(same_bits(before.data(), after.data(), earlier) == (kind == MaskKind::kCausal));
  }
}

DN_TEST(model_ragged_batch_equals_alone) {
  const NaiveGpt2 naive = random_weights(tiny_config(20, 37), 4);
  const auto model = make_model(naive);
  const Batch batch = ragged_batch(naive.config.vocab);
  const size_t V = static_cast<size_t>(naive.config.vocab);
  const std::vector<float> together = forward_logits(*model, batch);
  for (const Sequence& s : batch.sequences) {
    Batch alone;
    alone.ids.assign(batch.ids.begin() + s.begin, batch.ids.begin() + s.end);
    alone.positions.assign(batch.positions.begin() + s.begin, batch.positions.begin() + s.end);
    alone.sequences.push_back(s);
    alone.sequences[0].begin = 0;
    alone.sequences[0].end = s.end - s.begin;
    const std::vector<float> single = forward_logits(*model, alone);
    CHECK(same_bits(single.data(), together.data() + static_cast<size_t>(s.begin) * V, single.size()));
  }
}

DN_TEST(model_listed_rows_equal_all_rows) {
  const NaiveGpt2 naive = random_weights(tiny_config(20, 37), 5);
  const auto model = make_model(naive);
  const Batch batch = ragged_batch(naive.config.vocab);
  const size_t V = static_cast<size_t>(naive.config.vocab);
  const std::vector<float> all = forward_logits(*model, batch);
  std::vector<int64_t> permutation, repeated, identity;
  for (int64_t n = 0; n < 20; ++n) {
    permutation.push_back((n * 7 + 3) % 20);
    identity.push_back(n);
    repeated.push_back(n % 5);
    repeated.push_back(n);
  }
  for (const std::vector<int64_t>& rows : {std::vector<int64_t>{0},
                                           {19},
                                           {3, 4, 5, 9, 10},
                                           {6, 7, 8},
                                           {12, 2, 7, 0, 19},
                                           permutation,
                                           repeated,
                                           identity}) {
    const std::vector<float> listed = forward_logits(*model, batch, rows);
    CHECK(model.get()->hidden().rows == static_cast<int64_t>(rows.size()));
    for (size_t r = 0; r < rows.size(); ++r) {
      CHECK_MSG(same_bits(&listed[r * V], &all[static_cast<size_t>(rows[r]) * V], V),
                "row " + std::to_string(rows[r]));
    }
  }
}

DN_TEST(model_logits_of_some_rows_and_in_blocks) {
  const NaiveGpt2 naive = random_weights(tiny_config(), 6);
  ProxyControl control;
  control.host_memory = false;
  Model device(std::make_unique<ProxyBackend>(make_cpu_backend(2), &control), naive.config);
  set_weights(device, naive);
  const auto model = make_model(naive);
  Batch batch;
  Numbers numbers(8);
  for (int i = 0; i < 13; ++i)
    append_sequence(batch, numbers, 11, naive.config.vocab, mask_of(MaskKind::kFull));
  const std::vector<float> all = forward_logits(*model, batch);
  CHECK(same_bits(all, forward_logits(device, batch)));  // 143 rows: three blocks
  const int64_t rows[] = {140, 3};
  std::vector<float> two(22);
  model->logits(two.data(), rows, 2);
  CHECK(same_bits(&two[0], &all[140 * 11], 11) && same_bits(&two[11], &all[3 * 11], 11));
}

DN_TEST(model_packed_equals_plain) {
  const NaiveGpt2 naive = random_weights(tiny_config(20, 37), 12);
  const auto model = make_model(naive);
  const Batch batch = ragged_batch(naive.config.vocab);
  const std::vector<float> packed = forward_logits(*model, batch);
  model->begin_training();
  CHECK(same_bits(packed, forward_logits(*model, batch)));
  model->end_training();
  CHECK(same_bits(packed, forward_logits(*model, batch)));
}

DN_TEST(model_threads_change_nothing) {
  const NaiveGpt2 naive = random_weights(tiny_config(20, 37), 13);
  const Batch batch = ragged_batch(naive.config.vocab);
  const std::vector<float> one = forward_logits(*make_model(naive, 1), batch);
  for (const int threads : {2, 8}) CHECK(same_bits(one, forward_logits(*make_model(naive, threads), batch)));
}

DN_TEST(model_denoise_agrees_with_logits) {
  const NaiveGpt2 naive = random_weights(tiny_config(20, 37), 14);
  const auto model = make_model(naive);
  const Batch batch = ragged_batch(naive.config.vocab);
  const Doubles logits = naive.logits(batch);
  model->forward(batch, {4, 11});
  DenoiseRow rows[2];
  rows[0].row = 1;
  rows[0].temperature = 0;
  rows[1].row = 0;
  rows[1].temperature = 0;
  DenoiseStats stats[2];
  const int32_t watch[] = {36};
  float watched[2];
  model->denoise(stats, watched, rows, 2, watch, 1);
  const int64_t packed_rows[] = {11, 4};
  for (size_t r = 0; r < 2; ++r) {
    const double* l = &logits[static_cast<size_t>(packed_rows[r]) * 37];
    int32_t best = 0;
    double sum = 0;
    for (int32_t v = 0; v < 37; ++v) {
      if (l[v] > l[best]) best = v;
      sum += std::exp(l[v]);
    }
    CHECK(stats[r].best == best && stats[r].drawn == best);
    CHECK(std::fabs(stats[r].probability - std::exp(l[best]) / sum) < 1e-4);
    CHECK(std::fabs(watched[r] - std::exp(l[36]) / sum) < 1e-4);
  }
}

DN_TEST(model_rejects_bad_batches) {
  const NaiveGpt2 naive = random_weights(tiny_config(), 15);
  const auto model = make_model(naive);
  const Batch good = ragged_batch(naive.config.vocab);
  const auto run = [&](void (*change)(Batch&)) {
    Batch batch = good;
    change(batch);
    model->forward(batch, {});
  };
  CHECK_THROWS(model->forward(Batch(), {}), Code::kArgument, "no tokens");
  CHECK_THROWS(run([](Batch& b) { b.ids[3] = 11; }), Code::kArgument, "id 11 of row 3");
  CHECK_THROWS(run([](Batch& b) { b.ids[3] = -1; }), Code::kArgument, "id -1 of row 3");
  CHECK_THROWS(run([](Batch& b) { b.positions[2] = 12; }), Code::kArgument, "position 12 of row 2");
  CHECK_THROWS(run([](Batch& b) { b.positions[2] = -5; }), Code::kArgument, "position -5 of row 2");
  CHECK_THROWS(run([](Batch& b) { b.positions.pop_back(); }), Code::kArgument, "20 ids but 19 positions");
  CHECK_THROWS(run([](Batch& b) { b.mask_positions.assign(3, 0); }), Code::kArgument, "3 mask positions");
  CHECK_THROWS(run([](Batch& b) { b.mask_positions.assign(20, -1); }), Code::kArgument, "mask position -1");
  CHECK_THROWS(run([](Batch& b) { b.sequences.clear(); }), Code::kArgument, "cover 0 of 20");
  CHECK_THROWS(run([](Batch& b) { b.sequences.pop_back(); }), Code::kArgument, "cover 8 of 20");
  CHECK_THROWS(run([](Batch& b) { b.sequences[1].begin = 6; }), Code::kArgument, "starts at 7");
  CHECK_THROWS(run([](Batch& b) { b.sequences[1].end = 7; }), Code::kArgument, "[7, 7) of 20");
  CHECK_THROWS(run([](Batch& b) { b.sequences[2].end = 21; }), Code::kArgument, "[8, 21) of 20");
  CHECK_THROWS(run([](Batch& b) { b.sequences[0].k_len = 6; }), Code::kArgument,
               "k_len is 6 without a cache");
  CHECK_THROWS(run([](Batch& b) { b.sequences[0].mask = mask_of(MaskKind::kBlockCausal, 0); }),
               Code::kArgument, "block is 0");
  CHECK_THROWS(run([](Batch& b) { b.sequences[0].mask.kind = MaskKind::kMatrix; }), Code::kArgument,
               "(0, 0)");
  CHECK_THROWS(run([](Batch& b) {
                 static const uint8_t matrix[36] = {};
                 b.sequences[0].mask.kind = MaskKind::kMatrix;
                 b.sequences[0].mask.matrix = matrix;
                 b.sequences[0].mask.matrix_width = 6;
               }),
               Code::kArgument, "needs (7, 7)");
  CHECK_THROWS(run([](Batch& b) {
                 b.sequences[0].mask = mask_of(MaskKind::kBlockDiffusion, 2);
                 b.sequences[0].mask.half = 3;
               }),
               Code::kArgument, "two halves of 3");
  CHECK_THROWS(model->forward(good, {0, 20}), Code::kArgument, "row 20 is outside the batch of 20");
  CHECK_THROWS(model->forward(good, {-1}), Code::kArgument, "row -1");

  float out[11];
  const int64_t row = 0;
  CHECK_THROWS(model->logits(out, &row, 1), Code::kArgument, "call forward first");
  DenoiseRow ask;
  DenoiseStats stats;
  CHECK_THROWS(model->denoise(&stats, nullptr, &ask, 1, nullptr, 0), Code::kArgument, "call forward first");
  model->forward(good, {1, 2});
  const int64_t beyond = 2;
  CHECK_THROWS(model->logits(out, &beyond, 1), Code::kArgument, "row 2 is outside the 2 rows");
  const auto denoise = [&](void (*change)(DenoiseRow&)) {
    DenoiseRow changed;
    change(changed);
    model->denoise(&stats, nullptr, &changed, 1, nullptr, 0);
  };
  CHECK_THROWS(denoise([](DenoiseRow& r) { r.row = 2; }), Code::kArgument, "row 2");
  CHECK_THROWS(denoise([](DenoiseRow& r) { r.guide_row = 2; }), Code::kArgument, "guide row 2");
  CHECK_THROWS(denoise([](DenoiseRow& r) { r.banned = 11; }), Code::kArgument, "banned id is 11");
  CHECK_THROWS(denoise([](DenoiseRow& r) { r.temperature = -1; }), Code::kArgument, "temperature");
  CHECK_THROWS(denoise([](DenoiseRow& r) { r.temperature = NAN; }), Code::kArgument, "temperature");
  CHECK_THROWS(denoise([](DenoiseRow& r) { r.top_p = 0; }), Code::kArgument, "top_p");
  CHECK_THROWS(denoise([](DenoiseRow& r) { r.top_k = -1; }), Code::kArgument, "top_k");
  CHECK_THROWS(denoise([](DenoiseRow& r) { r.guidance = INFINITY; }), Code::kArgument, "guidance");
  const int32_t watch = 11;
  float watched;
  CHECK_THROWS(model->denoise(&stats, &watched, &ask, 1, &watch, 1), Code::kArgument, "watched id 11");
}

DN_TEST(model_steps_of_a_known_shape_allocate_nothing) {
  const NaiveGpt2 naive = random_weights(tiny_config(), 17);
  ProxyControl control;
  Model model(std::make_unique<ProxyBackend>(make_cpu_backend(2), &control), naive.config);
  set_weights(model, naive);
  Batch small, large;
  Numbers numbers(9);
  append_sequence(small, numbers, 4, naive.config.vocab, mask_of(MaskKind::kFull));
  append_sequence(large, numbers, 12, naive.config.vocab, mask_of(MaskKind::kFull));
  forward_logits(model, small);
  forward_logits(model, large);
  const size_t held = model.memory().workspace;
  // 11 C floats a token, an eighth on top because the arena grew, and alignment.
  CHECK_MSG(held <= 12u * 11 * 16 * 4 * 9 / 8 + 1024, std::to_string(held) + " bytes");
  control.allocations = 0;
  for (int i = 0; i < 3; ++i) {
    forward_logits(model, small);
    forward_logits(model, large, {3, 1});
  }
  CHECK_MSG(control.allocations == 0, std::to_string(control.allocations) + " allocations");
  CHECK(model.memory().workspace == held);
}

DN_TEST(model_survives_full_memory) {
  const NaiveGpt2 naive = random_weights(tiny_config(), 18);
  ProxyControl control;
  Model model(std::make_unique<ProxyBackend>(make_cpu_backend(2), &control), naive.config);
  set_weights(model, naive);
  Batch batch;
  Numbers numbers(9);
  append_sequence(batch, numbers, 12, naive.config.vocab, mask_of(MaskKind::kFull));
  model.begin_training();
  model.end_training();
  control.fail_at = 0;
  CHECK_THROWS(model.forward(batch, {}), Code::kOutOfMemory, "packing the weights");
  control.fail_at = 1;
  CHECK_THROWS(model.forward(batch, {}), Code::kOutOfMemory, "bytes for the activations of a forward pass");
  const std::vector<float> expected = forward_logits(*make_model(naive), batch);
  CHECK(same_bits(expected, forward_logits(model, batch)));
  const char* const parts[] = {"the gradients", "first moments", "second moments", "unpacking the weights"};
  for (int i = 0; i < 4; ++i) {
    control.fail_at = i;
    CHECK_THROWS(model.begin_training(), Code::kOutOfMemory, parts[i]);
    CHECK(!model.training());
    CHECK(same_bits(expected, forward_logits(model, batch)));
  }
  control.fail_at = 0;
  CHECK_THROWS(KvCache(model.backend(), naive.config, 12), Code::kOutOfMemory, "cache of 12 positions");
  model.begin_training();
  LossRows rows{{1}, {2}, {1.0f}};
  float loss = 0;
  control.fail_at = 0;
  CHECK_THROWS(model.loss_and_gradients(batch, rows, {}, &loss), Code::kOutOfMemory,
               "activations of a training step");
  model.loss_and_gradients(batch, rows, {}, &loss);
  CHECK(std::fabs(loss - naive.losses(batch, rows)[0]) < 1e-4);
  CHECK(model.memory().training == 3 * model.memory().parameters);
  model.end_training();
  CHECK(model.memory().training == 0);
  CHECK(same_bits(expected, forward_logits(model, batch)));
}

#ifndef DN_WITH_CUDA
DN_TEST(model_cuda_is_absent_and_says_so) {
  CHECK_THROWS(make_cuda_backend(0), Code::kDevice, "no CUDA support");
}
#endif
