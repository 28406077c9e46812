// Left-to-right decoding, several tokens in one call: what a caller that takes single steps would do, without
// the way to it and back between two tokens.

#include <algorithm>
#include <chrono>
#include <string>

#include "core/error.h"
#include "core/model.h"

namespace dn {
namespace {

// After so long a call ends with the token that it has: others wait, and an abort.
constexpr std::chrono::milliseconds kLongest{25};

[[noreturn]] void bad(const std::string& message) { throw Error(Code::kArgument, "decode: " + message); }

}  // namespace

void Model::decode(Batch batch, std::vector<int64_t> rows, DenoiseRow row, const std::vector<int32_t>& watch,
                   const DecodeLimits& limits, std::vector<DenoiseStats>* stats,
                   std::vector<float>* watched) {
  if (batch.sequences.size() != 1 || !batch.sequences[0].cache)
    bad(std::to_string(batch.sequences.size()) + " sequences, expected one, with a cache");
  if (rows.size() != 1 || row.row != 0 || row.guide_row >= 0 || row.keep)
    bad("expected one row, without a guide and with nothing to keep");
  if (limits.most < 1) bad(std::to_string(limits.most) + " tokens, expected at least 1");
  const auto end = std::chrono::steady_clock::now() + kLongest;
  const int64_t W = static_cast<int64_t>(watch.size());
  for (int64_t n = 0; n < limits.most; ++n) {
    if (n > 0) {
      const int32_t drawn = stats->back().drawn;
      if (std::find(limits.stops.begin(), limits.stops.end(), drawn) != limits.stops.end()) return;
      if (std::chrono::steady_clock::now() >= end) return;
      // The drawn token stands where the row before it was asked for.
      batch.ids = {drawn};
      batch.positions = {static_cast<int32_t>(row.position)};
      rows = {0};
      Sequence& sequence = batch.sequences[0];
      sequence.begin = 0;
      sequence.end = 1;
      ++sequence.k_len;
      ++row.position;
      ++row.step;
    }
    forward(batch, rows);
    stats->emplace_back();
    watched->resize(watched->size() + watch.size());
    denoise(&stats->back(), watched->data() + watched->size() - watch.size(), &row, 1, watch.data(), W);
  }
}

}  // namespace dn
