// Checking a batch and planning it: which rows ask which keys, what goes into caches, and which rows the last
// block keeps.

#include <algorithm>

#include "core/error.h"
#include "core/model.h"
#include "core/workspace.h"

namespace dn {
namespace {

// A mask must be able to answer visible(q, k) for q < q_end and k < k_end.
void check_mask(const AttentionMask& mask, int64_t q_end, int64_t k_end, const std::string& where) {
  if ((mask.kind == MaskKind::kBlockCausal || mask.kind == MaskKind::kBlockDiffusion) && mask.block < 1) {
    bad(where + ": the mask's block is " + str(mask.block) + ", expected at least 1");
  }
  const int64_t length = std::max(q_end, k_end);
  if (mask.kind == MaskKind::kBlockDiffusion &&
      (mask.half < 1 || 2 * static_cast<int64_t>(mask.half) < length)) {
    bad(where + ": the block-diffusion mask covers two halves of " + str(mask.half) + ", the sequence has " +
        str(length) + " positions");
  }
  if (mask.kind == MaskKind::kMatrix && (!mask.matrix || mask.matrix_width < length)) {
    bad(where + ": the mask matrix is (" + str(mask.matrix_width) + ", " + str(mask.matrix_width) +
        "), the sequence needs (" + str(length) + ", " + str(length) + ")");
  }
}

}  // namespace

void QueryPlan::clear() {
  sequences.clear();
  caches.clear();
  positions.clear();
}

void BatchPlan::clear() {
  N = R = 0;
  listed = false;
  all.clear();
  rows.clear();
  gathers.clear();
  cache_writes.clear();
  loop = nullptr;
}

void QueryPlan::use_layer(int32_t layer) {
  for (size_t s = 0; s < sequences.size(); ++s) {
    if (caches[s]) sequences[s].cache = caches[s]->layer(layer);
  }
}

void gather(Backend& backend, const BatchPlan& plan, Tensor dst, Tensor src) {
  if (plan.loop) {
    plan.loop->gather(dst, src);
    return;
  }
  int64_t r = 0;
  for (const RowRun& run : plan.gathers) {
    backend.copy(dst.slice(r, run.count), src.slice(run.row, run.count));
    r += run.count;
  }
}

void scatter(Backend& backend, const BatchPlan& plan, Tensor dst, Tensor src) {
  backend.zero(dst.data, static_cast<size_t>(dst.rows * dst.cols) * dtype_bytes(dst.dtype));
  int64_t r = 0;
  for (const RowRun& run : plan.gathers) {
    backend.copy(dst.slice(run.row, run.count), src.slice(r, run.count));
    r += run.count;
  }
}

void Model::plan_batch(const Batch& batch, const std::vector<int64_t>& rows) {
  BatchPlan& plan = workspace_->plan;
  const int64_t N = static_cast<int64_t>(batch.ids.size());
  plan.clear();
  plan.N = N;
  if (N == 0) bad("batch: there are no tokens");
  if (batch.positions.size() != idx(N)) {
    bad("batch: " + str(N) + " ids but " + std::to_string(batch.positions.size()) + " positions");
  }
  if (!batch.mask_positions.empty() && batch.mask_positions.size() != idx(N)) {
    bad("batch: " + str(N) + " ids but " + std::to_string(batch.mask_positions.size()) + " mask positions");
  }
  for (int64_t n = 0; n < N; ++n) {
    const int32_t id = batch.ids[idx(n)], position = batch.positions[idx(n)];
    if (id < 0 || id >= config_.vocab) {
      bad("batch: id " + str(id) + " of row " + str(n) + " is outside the vocabulary of " +
          str(config_.vocab));
    }
    if (position < 0 || position >= config_.context) {
      bad("batch: position " + str(position) + " of row " + str(n) + " is outside the context of " +
          str(config_.context));
    }
    if (plan.query_position(batch, n) < 0) {
      bad("batch: mask position " + str(plan.query_position(batch, n)) + " of row " + str(n) +
          " is negative");
    }
  }

  int64_t covered = 0;
  for (size_t s = 0; s < batch.sequences.size(); ++s) {
    const Sequence& sequence = batch.sequences[s];
    const std::string where = "sequence " + std::to_string(s);
    if (sequence.begin != covered || sequence.end <= sequence.begin || sequence.end > N) {
      bad(where + ": rows [" + str(sequence.begin) + ", " + str(sequence.end) + ") of " + str(N) +
          ", expected a non-empty range that starts at " + str(covered));
    }
    covered = sequence.end;
    const int64_t length = sequence.end - sequence.begin;
    AttentionSequence a;
    a.q_begin = sequence.begin;
    a.q_end = sequence.end;
    a.kv_begin = sequence.begin;
    a.k_len = length;
    a.mask = sequence.mask;
    if (const KvCache* cache = sequence.cache) {
      const size_t expected =
          idx(config_.layers) * backend_->kv_cache_bytes(cache->capacity(), config_.channels);
      if (cache->bytes() != expected) {
        bad(where + ": its key-value cache has " + std::to_string(cache->bytes()) +
            " bytes, one of this model's shape and " + str(cache->capacity()) + " positions has " +
            std::to_string(expected));
      }
      if (std::find(plan.all.caches.begin(), plan.all.caches.end(), cache) != plan.all.caches.end()) {
        bad(where + ": its key-value cache already belongs to an earlier sequence of the batch");
      }
      if (sequence.k_len < 1 || sequence.k_len > cache->capacity()) {
        bad(where + ": k_len is " + str(sequence.k_len) + ", expected 1 to the cache's capacity, " +
            str(cache->capacity()));
      }
      a.k_len = sequence.k_len;
      for (int64_t n = sequence.begin; n < sequence.end; ++n) {
        const int64_t position = batch.positions[idx(n)];
        if (position >= sequence.k_len) {
          bad(where + ": row " + str(n) + " is at position " + str(position) + ", but k_len is " +
              str(sequence.k_len));
        }
        CacheRun* last = n > sequence.begin ? &plan.cache_writes.back() : nullptr;
        if (last && last->position + last->count == position) {
          ++last->count;
        } else {
          plan.cache_writes.push_back({cache, n, position, 1});
        }
      }
    } else if (sequence.k_len != 0 && sequence.k_len != length) {
      bad(where + ": k_len is " + str(sequence.k_len) + " without a cache, expected its own length, " +
          str(length));
    }
    int64_t q_end = 0;
    for (int64_t n = sequence.begin; n < sequence.end; ++n) {
      q_end = std::max<int64_t>(q_end, plan.query_position(batch, n) + int64_t{1});
    }
    check_mask(sequence.mask, q_end, a.k_len, where);
    plan.all.sequences.push_back(a);
    plan.all.caches.push_back(sequence.cache);
  }
  if (covered != N) bad("batch: the sequences cover " + str(covered) + " of " + str(N) + " rows");
  plan.all.positions = batch.mask_positions.empty() ? batch.positions : batch.mask_positions;

  plan.R = rows.empty() ? N : static_cast<int64_t>(rows.size());
  plan.listed = plan.R != N;
  for (size_t r = 0; r < rows.size(); ++r) {
    if (rows[r] < 0 || rows[r] >= N)
      bad("row " + str(rows[r]) + " is outside the batch of " + str(N) + " rows");
    if (rows[r] != static_cast<int64_t>(r)) plan.listed = true;
  }
  if (!plan.listed) return;
  // Rows that follow each other in the list and stand in one sequence share an entry; the order is the
  // list's.
  size_t previous = batch.sequences.size();
  for (const int64_t row : rows) {
    const auto after = std::upper_bound(batch.sequences.begin(), batch.sequences.end(), row,
                                        [](int64_t n, const Sequence& s) { return n < s.begin; });
    const size_t s = static_cast<size_t>(after - batch.sequences.begin()) - 1;
    const int64_t r = static_cast<int64_t>(plan.rows.positions.size());
    if (s == previous) {
      ++plan.rows.sequences.back().q_end;
    } else {
      plan.rows.sequences.push_back(plan.all.sequences[s]);
      plan.rows.sequences.back().q_begin = r;
      plan.rows.sequences.back().q_end = r + 1;
      plan.rows.caches.push_back(plan.all.caches[s]);
      previous = s;
    }
    plan.rows.positions.push_back(plan.all.positions[idx(row)]);
    if (!plan.gathers.empty() && plan.gathers.back().row + plan.gathers.back().count == row) {
      ++plan.gathers.back().count;
    } else {
      plan.gathers.push_back({row, 1});
    }
  }
}

}  // namespace dn
