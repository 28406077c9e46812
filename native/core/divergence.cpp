// In double and one id after the other: what a backend of its own memory sends takes longer to arrive.

#include "core/divergence.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace dn {

float update_divergence(const DenoiseRow& row, float* logits, const float* guide, int64_t V) {
  const float infinity = std::numeric_limits<float>::infinity();
  float max = -infinity;
  for (int64_t v = 0; v < V; ++v) {
    if (guide != nullptr) logits[v] = guide[v] + (row.guidance + 1) * (logits[v] - guide[v]);
    if (v == row.banned || v == row.banned_end) logits[v] = -infinity;
    max = std::max(max, logits[v]);
  }
  double total = 0;
  for (int64_t v = 0; v < V; ++v) total += std::exp(static_cast<double>(logits[v] - max));
  const double log_total = std::log(total);
  double sum = 0;
  for (int64_t v = 0; v < V; ++v) {
    const double l = static_cast<double>(logits[v] - max) - log_total;
    if (row.before && v != row.banned && v != row.banned_end)
      sum += std::exp(l) * (l - static_cast<double>(row.before[v]));
    row.keep[v] = static_cast<float>(l);
  }
  return row.before ? static_cast<float>(std::max(0.0, sum)) : infinity;
}

void set_divergences(Model& model, DenoiseStats* stats, const DenoiseRow* rows, int64_t R) {
  constexpr size_t kRows = 64;  // of logits at a time
  const int64_t V = model.config().vocab;
  std::vector<int64_t> listed;  // a row and its guide follow one another
  std::vector<float> logits;
  for (int64_t begin = 0, end = 0; begin < R; begin = end) {
    listed.clear();
    for (end = begin; end < R && listed.size() + 2 <= kRows; ++end) {
      if (rows[end].keep == nullptr) continue;
      listed.push_back(rows[end].row);
      if (rows[end].guide_row >= 0) listed.push_back(rows[end].guide_row);
    }
    if (listed.empty()) continue;
    logits.resize(listed.size() * static_cast<size_t>(V));
    model.logits(logits.data(), listed.data(), static_cast<int64_t>(listed.size()));
    float* next = logits.data();
    for (int64_t r = begin; r < end; ++r) {
      if (rows[r].keep == nullptr) continue;
      const bool guided = rows[r].guide_row >= 0;
      stats[r].divergence = update_divergence(rows[r], next, guided ? next + V : nullptr, V);
      next += guided ? 2 * V : V;
    }
  }
}

}  // namespace dn
