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

size_t Model::first_block_growth(int64_t N) const {
  return workspace_->first.memory.growth(bytes_of(N, config_.channels));
}

void Model::forget_first_block() { workspace_->first.ids.clear(); }

Tensor Model::first_block_qkv(const Batch& batch, const InferenceActivations& t) {
  FirstBlock& first = workspace_->first;
  const int64_t N = t.h.rows, C = config_.channels;
  if (first.memory.growth(bytes_of(N, C)) > 0) first.ids.clear();
  first.memory.reserve(*backend_, bytes_of(N, C), "queries, keys and values of the first block");
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
  if (count > 0) {
    const Tensor ln = t.block.ln1.slice(0, count), computed = count == N ? kept : t.block.qkv.slice(0, count);
    int64_t row = 0;
    for (const RowRun& run : changed) {
      backend_->layernorm_forward(ln.slice(row, run.count), Tensor(), Tensor(), t.h.slice(run.row, run.count),
                                  tensor(block_parameter(0, kLn1Weight)),
                                  tensor(block_parameter(0, kLn1Bias)));
      row += run.count;
    }
    backend_->matmul_forward(computed, ln, weight(block_parameter(0, kAttnWeight)),
                             tensor(block_parameter(0, kAttnBias)), Epilogue::kNone, Tensor(),
                             MatmulPrecision::kFP32);
    row = 0;
    for (const RowRun& run : changed) {
      if (count < N) backend_->copy(kept.slice(run.row, run.count), computed.slice(row, run.count));
      row += run.count;
    }
  }
  first.ids = batch.ids;
  first.positions = batch.positions;
  return kept;
}

}  // namespace dn
