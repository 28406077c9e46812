// The model at inference: the parameter table and access to it, the forward pass against a naive one in
// double, and everything that must not change a bit (batch mates, listed rows, caches, packing, threads). Bad
// input and full memory.

#include <cstring>
#include <set>

#include "core/error.h"
#include "core/model.h"
#include "test/check.h"
#include "test/naive_gpt2.h"
#include "test/proxy_backend.h"

using namespace dn;
using namespace dn::test;

namespace {

std::vector<float> all_logits(Model& model) {
  const int64_t R = model.hidden().rows;
  std::vector<int64_t> rows;
  for (int64_t r = 0; r < R; ++r) rows.push_back(r);
  std::vector<float> out(static_cast<size_t>(R * model.config().vocab));
  model.logits(out.data(), rows.data(), R);
  return out;
}

std::vector<float> forward_logits(Model& model, const Batch& batch, const std::vector<int64_t>& rows = {}) {
  model.forward(batch, rows);
  return all_logits(model);
}

std::vector<float> get(Model& model, size_t index) {
  std::vector<float> values(static_cast<size_t>(model.parameters()[index].count));
  model.get_parameter(index, values.data());
  return values;
}

bool same_bits(const float* a, const float* b, size_t n) { return std::memcmp(a, b, n * sizeof(float)) == 0; }
bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && same_bits(a.data(), b.data(), a.size());
}

double largest(const Doubles& values) {
  double most = 0;
  for (const double x : values) most = std::max(most, std::fabs(x));
  return most;
}

AttentionMask mask_of(MaskKind kind, int32_t block = 1) {
  AttentionMask mask;
  mask.kind = kind;
  mask.block = block;
  return mask;
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

DN_TEST(model_parameter_table_of_gpt2) {
  ModelConfig config;
  config.layers = 12;
  config.heads = 12;
  config.channels = 768;
  config.context = 1024;
  config.vocab = 50257;
  const auto table = make_parameter_table(config);
  CHECK(table.size() == 148);
  int64_t count = 0, end = 0;
  for (const Parameter& p : table) {
    count += p.count;
    CHECK(p.offset % 16 == 0 && p.offset >= end);
    CHECK(p.is_matrix == (p.shape.size() == 2));
    end = p.offset + p.count;
  }
  CHECK(count == 124439808);
  CHECK(table[0].name == "wte.weight" && table[1].name == "wpe.weight");
  const Parameter& qkv = table[2 + 12 * 3 + 2];
  CHECK(qkv.name == "h.3.attn.c_attn.weight" && qkv.shape == (std::vector<int64_t>{768, 2304}));
  CHECK(table[147].name == "ln_f.bias");
}

DN_TEST(model_rejects_bad_configs) {
  const auto build = [](void (*change)(ModelConfig&)) {
    ModelConfig config = tiny_config();
    change(config);
    Model model(make_cpu_backend(1), config);
  };
  CHECK_THROWS(build([](ModelConfig& c) { c.layers = 0; }), Code::kArgument, "layers is 0");
  CHECK_THROWS(build([](ModelConfig& c) { c.heads = -2; }), Code::kArgument, "heads is -2");
  CHECK_THROWS(build([](ModelConfig& c) { c.channels = 0; }), Code::kArgument, "channels is 0");
  CHECK_THROWS(build([](ModelConfig& c) { c.context = 0; }), Code::kArgument, "context is 0");
  CHECK_THROWS(build([](ModelConfig& c) { c.vocab = -1; }), Code::kArgument, "vocab is -1");
  CHECK_THROWS(build([](ModelConfig& c) { c.heads = 3; }), Code::kArgument, "heads = 3");
  CHECK_THROWS(build([](ModelConfig& c) { c.vocab = 2147483647; }), Code::kArgument, "vocab is 2147483647");
  CHECK_THROWS(build([](ModelConfig& c) { c.channels = 2147483646; }), Code::kArgument,
               "channels is 2147483646");
}

DN_TEST(model_initialisation) {
  ModelConfig config = tiny_config(32, 1000);
  Model a(make_cpu_backend(1), config), b(make_cpu_backend(2), config), other(make_cpu_backend(1), config);
  a.initialise(7);
  b.prepare_inference();  // a packed model becomes a plain, initialised one
  b.initialise(7);
  other.initialise(8);
  for (size_t i = 0; i < a.parameters().size(); ++i) {
    const Parameter& p = a.parameters()[i];
    const std::vector<float> values = get(a, i);
    CHECK_MSG(same_bits(values, get(b, i)), p.name);
    double sum = 0, squares = 0;
    for (const float x : values) {
      sum += x;
      squares += static_cast<double>(x) * x;
    }
    const double n = static_cast<double>(values.size());
    if (p.is_matrix) {
      const double sd = p.name.find("c_proj") != std::string::npos ? 0.02 / 2 : 0.02;  // sqrt(2 layers) = 2
      CHECK_MSG(std::fabs(sum / n) < 5 * sd / std::sqrt(n), p.name + ": mean " + std::to_string(sum / n));
      CHECK_MSG(std::fabs(squares / n / (sd * sd) - 1) < 5 * std::sqrt(2 / n), p.name + ": variance");
      CHECK_MSG(!same_bits(values, get(other, i)), p.name);
      CHECK_MSG(std::set<float>(values.begin(), values.end()).size() > values.size() * 99 / 100,
                p.name + ": repeats");
    } else {
      const float expected = p.name.find("weight") != std::string::npos ? 1.0f : 0.0f;
      for (const float x : values) CHECK_MSG(x == expected, p.name);
    }
  }
}

DN_TEST(model_parameters_survive_packing) {
  for (const bool host : {true, false}) {
    const NaiveGpt2 naive = random_weights(tiny_config(20, 37), 3), other = random_weights(naive.config, 30);
    ProxyControl control;
    control.host_memory = host;
    Model model(std::make_unique<ProxyBackend>(make_cpu_backend(2), &control), naive.config);
    const auto check = [&](const NaiveGpt2& weights, const char* when) {
      for (size_t i = 0; i < weights.p.size(); ++i) {
        const std::vector<float> expected(weights.p[i].begin(), weights.p[i].end());
        CHECK_MSG(same_bits(get(model, i), expected), model.parameters()[i].name + " " + when);
      }
    };
    for (size_t i = 0; i < model.parameters().size(); ++i) {
      for (const float x : get(model, i)) CHECK(x == 0);
    }
    set_weights(model, naive);
    check(naive, "after loading");
    model.begin_training();
    check(naive, "in training");
    set_weights(model, other);
    check(other, "set in training");
    model.end_training();
    check(other, "after training");
    model.prepare_inference();
    check(other, "packed");
    set_weights(model, naive);
    check(naive, "set while packed");
    float value;
    CHECK_THROWS(model.get_parameter(28, &value), Code::kArgument, "parameter 28 is outside the model's 28");
    CHECK_THROWS(model.set_parameter(28, &value), Code::kArgument, "parameter 28");
  }
}

DN_TEST(model_find_parameter) {
  Model model(make_cpu_backend(1), tiny_config());
  CHECK(model.parameters()[model.find_parameter("h.1.mlp.c_proj.bias")].name == "h.1.mlp.c_proj.bias");
  CHECK_THROWS(model.find_parameter("h.2.ln_1.weight"), Code::kArgument, "'h.2.ln_1.weight'");
}

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

DN_TEST(model_cached_decoding_equals_recomputation) {
  const NaiveGpt2 naive = random_weights(tiny_config(20, 37), 9);
  const auto model = make_model(naive);
  const size_t V = static_cast<size_t>(naive.config.vocab);
  Batch whole;
  Numbers numbers(3);
  append_sequence(whole, numbers, 12, naive.config.vocab, mask_of(MaskKind::kCausal));
  const std::vector<float> expected = forward_logits(*model, whole);
  KvCache cache(model->backend(), naive.config, 12);
  CHECK(cache.capacity() == 12 && cache.bytes() == 2u * 2 * 12 * 20 * sizeof(float));
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
  // 7 C floats a token, an eighth on top because the arena grew, and alignment.
  CHECK_MSG(held <= 12u * 7 * 16 * 4 * 9 / 8 + 1024, std::to_string(held) + " bytes");
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

#if !defined(__SANITIZE_ADDRESS__)  // the sanitizer ends the process on such a request
DN_TEST(model_reports_absurd_sizes) {
  ModelConfig config = tiny_config();
  config.layers = 1024;
  config.channels = 65536;  // 211 TB
  CHECK_THROWS(Model(make_cpu_backend(1), config), Code::kOutOfMemory, "bytes for the parameters");
}
#endif

#ifndef DN_WITH_CUDA
DN_TEST(model_cuda_is_absent_and_says_so) {
  CHECK_THROWS(make_cuda_backend(0), Code::kDevice, "no CUDA support");
}
#endif
