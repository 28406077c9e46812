// Checks of what is asked of the head when rows are sampled, the same for every backend; see backend.h.

#include <cmath>
#include <string>

#include "core/backend.h"
#include "core/error.h"

namespace dn {
namespace {

bool bans_all(const DenoiseRow& row, int64_t V) {
  return V <= (row.banned >= 0) + (row.banned_end >= 0 && row.banned_end != row.banned);
}

}  // namespace

std::string denoise_fault(const DenoiseRow& row, int64_t V) {
  if (!(row.temperature >= 0) || !std::isfinite(row.temperature))
    return "temperature is " + std::to_string(row.temperature) + ", expected a finite number of at least 0";
  if (!(row.top_p > 0 && row.top_p <= 1))
    return "top_p is " + std::to_string(row.top_p) + ", expected more than 0 and at most 1";
  if (row.top_k < 0) return "top_k is " + std::to_string(row.top_k) + ", expected 0 (all) or more";
  if (!std::isfinite(row.guidance))
    return "guidance is " + std::to_string(row.guidance) + ", expected a finite number";
  for (const int32_t banned : {row.banned, row.banned_end}) {
    if (banned < -1 || banned >= V)
      return "banned id is " + std::to_string(banned) + ", expected -1 or an id below " + std::to_string(V);
  }
  if (bans_all(row, V)) return "the vocabulary has no id that is not banned";
  return {};
}

void check_denoise(const char* op, const DenoiseRow* rows, int64_t R, int64_t hidden_rows,
                   const int32_t* watch, int64_t watch_count, int64_t V) {
  const auto refuse = [op](const std::string& what) {
    throw Error(Code::kArgument, std::string(op) + ": " + what);
  };
  const auto refuse_row = [&](int64_t r, const char* which, int64_t row) {
    refuse("row " + std::to_string(r) + " of the list: " + which + " row " + std::to_string(row) +
           " is outside the " + std::to_string(hidden_rows) + " that there are");
  };
  for (int64_t r = 0; r < R; ++r) {
    const DenoiseRow& row = rows[r];
    if (row.row < 0 || row.row >= hidden_rows) refuse_row(r, "hidden", row.row);
    if (row.guide_row < -1 || row.guide_row >= hidden_rows) refuse_row(r, "guide", row.guide_row);
    const std::string fault = denoise_fault(row, V);
    if (!fault.empty()) refuse("row " + std::to_string(r) + " of the list: " + fault);
  }
  for (int64_t w = 0; w < watch_count; ++w) {
    if (watch[w] < 0 || watch[w] >= V)
      refuse("watched id " + std::to_string(watch[w]) + " is outside the vocabulary of " + std::to_string(V));
  }
}

}  // namespace dn
