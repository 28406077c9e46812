// Several tokens in one call (Model::decode) against single steps.

#include <cstring>

#include "core/error.h"
#include "core/model.h"
#include "test/check.h"
#include "test/proxy_backend.h"

using namespace dn;

namespace {

const ModelConfig kConfig{2, 2, 32, 48, 90};
const std::vector<int32_t> kWatch = {3, 41};

Batch step_of(const std::vector<int32_t>& ids, int32_t from, KvCache* cache) {
  Batch batch;
  for (size_t i = static_cast<size_t>(from); i < ids.size(); ++i) {
    batch.ids.push_back(ids[i]);
    batch.positions.push_back(static_cast<int32_t>(i));
  }
  Sequence sequence;
  sequence.end = static_cast<int64_t>(batch.ids.size());
  sequence.k_len = static_cast<int64_t>(ids.size());
  sequence.mask.kind = MaskKind::kCausal;
  sequence.cache = cache;
  batch.sequences.push_back(sequence);
  return batch;
}

DenoiseRow row_at(size_t position, uint32_t step) {
  DenoiseRow row;
  row.temperature = 1.2f;
  row.top_p = 0.9f;
  row.banned = 89;
  row.seed = 7;
  row.step = step;
  row.position = static_cast<uint32_t>(position);
  return row;
}

struct Decoded {
  std::vector<int32_t> ids;
  std::vector<DenoiseStats> stats;
  std::vector<float> watched;
};

// `tokens` tokens behind a prompt of five, at most `most` in a call.
Decoded decode(Model& model, size_t tokens, int64_t most, std::vector<int32_t> stops = {}) {
  Decoded d;
  d.ids = {4, 8, 15, 16, 23};
  KvCache cache(model.backend(), kConfig, 40);
  int32_t fed = 0;
  for (uint32_t step = 0; d.stats.size() < tokens;) {
    const Batch batch = step_of(d.ids, fed, &cache);
    Model::DecodeLimits limits;
    limits.most = std::min<int64_t>(most, static_cast<int64_t>(tokens - d.stats.size()));
    limits.stops = stops;
    const size_t before = d.stats.size();
    model.decode(batch, {static_cast<int64_t>(batch.ids.size()) - 1}, row_at(d.ids.size(), step), kWatch,
                 limits, &d.stats, &d.watched);
    fed = static_cast<int32_t>(d.ids.size() + d.stats.size() - before - 1);
    for (size_t i = before; i < d.stats.size(); ++i) d.ids.push_back(d.stats[i].drawn);
    step += static_cast<uint32_t>(d.stats.size() - before);
    if (!stops.empty() && std::count(stops.begin(), stops.end(), d.ids.back()) > 0) break;
  }
  return d;
}

}  // namespace

DN_TEST(decode_gives_what_single_steps_give) {
  Model model(make_cpu_backend(2), kConfig);
  model.initialise(3);
  // Single steps without decode().
  Decoded expected;
  expected.ids = {4, 8, 15, 16, 23};
  KvCache cache(model.backend(), kConfig, 40);
  int32_t fed = 0;
  for (uint32_t step = 0; step < 20; ++step) {
    const Batch batch = step_of(expected.ids, fed, &cache);
    fed = static_cast<int32_t>(expected.ids.size());
    model.forward(batch, {static_cast<int64_t>(batch.ids.size()) - 1});
    const DenoiseRow row = row_at(expected.ids.size(), step);
    DenoiseStats stats;
    float watched[2];
    model.denoise(&stats, watched, &row, 1, kWatch.data(), 2);
    expected.stats.push_back(stats);
    expected.watched.insert(expected.watched.end(), watched, watched + 2);
    expected.ids.push_back(stats.drawn);
  }
  for (const int64_t most : {1, 3, 20}) {
    const Decoded got = decode(model, 20, most);
    CHECK(got.ids == expected.ids);
    CHECK(got.watched == expected.watched);
    CHECK(std::memcmp(got.stats.data(), expected.stats.data(), 20 * sizeof(DenoiseStats)) == 0);
  }
  // After the fourth token nothing is computed.
  const int32_t stop = expected.ids[5 + 3];
  const Decoded stopped = decode(model, 20, 20, {stop});
  CHECK(stopped.ids.back() == stop && stopped.stats.size() <= 4);
}

DN_TEST(decode_takes_one_sequence_with_a_cache_and_one_row) {
  Model model(make_cpu_backend(1), kConfig);
  model.initialise(3);
  KvCache cache(model.backend(), kConfig, 40);
  const Batch good = step_of({1, 2, 3}, 0, &cache);
  const auto refused = [&](const char* part, const auto& spoil) {
    Batch batch = good;
    std::vector<int64_t> rows = {2};
    DenoiseRow row = row_at(3, 0);
    Model::DecodeLimits limits;
    limits.most = 2;
    spoil(&batch, &rows, &row, &limits);
    std::vector<DenoiseStats> stats;
    std::vector<float> watched;
    CHECK_THROWS(model.decode(batch, rows, row, kWatch, limits, &stats, &watched), Code::kArgument, part);
  };
  refused("expected one, with a cache",
          [](Batch* b, auto*, auto*, auto*) { b->sequences[0].cache = nullptr; });
  refused("expected one row", [](Batch*, std::vector<int64_t>* rows, auto*, auto*) { rows->push_back(1); });
  refused("expected one row", [](Batch*, auto*, DenoiseRow* row, auto*) { row->guide_row = 0; });
  refused("0 tokens", [](Batch*, auto*, auto*, Model::DecodeLimits* limits) { limits->most = 0; });
}
