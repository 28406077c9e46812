// The queries, keys and values of the first block, which of all that the network computes depend on one token
// and its position alone. A denoising step changes a few tokens of its canvas: rows that stand where they
// stood in the forward before keep theirs. A product's rows do not depend on each other, so that these are
// the bits that computing all of them gives.

#include "core/model.h"
#include "core/workspace.h"

namespace dn {
namespace {

// Below it a product waits for its weight, whatever its rows.
constexpr int64_t kLeastRows = 16;
// What is kept beside a forward's memory.
constexpr size_t kMostBytes = size_t{64} << 20;

size_t bytes_of(int64_t N, int64_t C) { return idx(N) * idx(3 * C) * sizeof(float); }

}  // namespace

bool Model::keeps_first_block(int64_t N, MatmulPrecision precision) const {
  return !training_ && backend_->host_memory() && precision == MatmulPrecision::kFP32 && N >= kLeastRows &&
         bytes_of(N, config_.channels) <= kMostBytes;
}

void Model::forget_first_block() { workspace_->first.ids.clear(); }

Tensor Model::first_block_qkv(const Batch& batch, const InferenceActivations& t) {
  FirstBlock& first = workspace_->first;
  const int64_t N = t.h.rows, C = config_.channels;
  if (const size_t growth = first.memory.growth(bytes_of(N, C)); growth > 0) {
    first.ids.clear();
    if (growth > backend_->free_bytes()) return Tensor();
    try {
      first.memory.reserve(*backend_, bytes_of(N, C), "queries, keys and values of the first block");
    } catch (const Error& error) {
      if (error.code() != Code::kOutOfMemory) throw;
      return Tensor();  // done without
    }
  }
  const Tensor kept(first.memory.data(), Dtype::kF32, N, 3 * C);

  const int64_t known = static_cast<int64_t>(first.ids.size());
  std::vector<RowRun>& changed = first.changed;
  changed.clear();
  int64_t count = 0;
  for (int64_t n = 0; n < N; ++n) {
    const size_t i = idx(n);
    if (n < known && first.ids[i] == batch.ids[i] && first.positions[i] == batch.positions[i]) continue;
    if (changed.empty() || changed.back().row + changed.back().count < n) changed.push_back({n, 0});
    ++changed.back().count;
    ++count;
  }
  first.ids.clear();  // until they are computed
  // What is computed lies together: input, layer norm and result where the block's own will be.
  BlockActivations a = t.block;
  Tensor inp = t.h;
  if (count < N) {
    for (Tensor* each : {&a.mid, &a.ln1, &a.qkv}) *each = each->slice(0, count);
    inp = a.mid;
  } else {
    a.qkv = kept;
  }
  const auto copy_runs = [&](bool back) {
    int64_t row = 0;
    for (const RowRun& run : changed) {
      back ? backend_->copy(kept.slice(run.row, run.count), a.qkv.slice(row, run.count))
           : backend_->copy(inp.slice(row, run.count), t.h.slice(run.row, run.count));
      row += run.count;
    }
  };
  if (count < N) copy_runs(false);
  if (count > 0) block_qkv(0, inp, a, MatmulPrecision::kFP32);
  if (count < N) copy_runs(true);
  first.positions = batch.positions;
  first.ids = batch.ids;  // last: what they are compared with is there
  return kept;
}

}  // namespace dn
