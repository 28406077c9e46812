// Choosing and deciding, a block per sequence; the rules are those of lib/samplers, with the same doubles in
// the same order. Rows are ranked by counting the better ones (equal scores: the lower position first), which
// depends on no order of execution.

#include "cuda/common.cuh"
#include "cuda/loop.h"

namespace dn::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

// The index of this thread's entry behind those kept before it, of lower threads and of earlier calls;
// *count grows by the number kept. All threads must call.
DN_DEVICE int place(bool keep, int* count, int* scratch) {
  const int lane = thread_index() % kWarp, warp = thread_index() / kWarp;
  int sum = keep ? 1 : 0;
  DN_UNROLL
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const int other = shuffle(sum, lane >= distance ? lane - distance : lane);
    if (lane >= distance) sum += other;
  }
  if (lane == kWarp - 1) scratch[warp] = sum;
  sync_block();
  int before = 0, total = 0;
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) before += scratch[w];
    total += scratch[w];
  }
  sync_block();
  const int index = *count + before + sum - 1;
  *count += total;
  return index;
}

DN_DEVICE int block_min(int x, int* scratch) {
  DN_UNROLL
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    const int other = shuffle_xor(x, mask);
    x = other < x ? other : x;
  }
  if (thread_index() % kWarp == 0) scratch[thread_index() / kWarp] = x;
  sync_block();
  for (int w = 0; w < kWarps; ++w) x = scratch[w] < x ? scratch[w] : x;
  sync_block();
  return x;
}

// Keeps the entries of list (n) that keep(index, entry) says, in order and in place; returns how many.
template <typename Keep>
DN_DEVICE int keep_in_place(int32_t* list, int n, const Keep& keep, int* scratch) {
  int count = 0;
  for (int first = 0; first < n; first += kThreads) {
    const int i = first + thread_index();
    const int32_t entry = i < n ? list[i] : 0;
    const bool kept = i < n && keep(i, entry);
    const int at = place(kept, &count, scratch);  // everybody has read its entry
    if (kept) list[at] = entry;
  }
  sync_block();
  return count;
}

// How many of n entries come before entry i when scores fall and equal ones keep their order.
template <typename T>
DN_DEVICE int rank_of(const T* scores, int n, int i) {
  const T score = scores[i];
  int rank = 0;
  for (int j = 0; j < n; ++j) rank += scores[j] > score || (scores[j] == score && j < i) ? 1 : 0;
  return rank;
}

// What LoopPlan says for one step of a window.
DN_DEVICE int planned_count(const LoopSequence& q, int initial_open, int steps, int step) {
  if (q.plan == LoopPlan::kEven) return initial_open / steps + (step < initial_open % steps ? 1 : 0);
  const int64_t n = initial_open;
  return static_cast<int>(n * (steps - step) / steps - n * (steps - step - 1) / steps);
}

// The step's window, and in `chosen` the positions it looks at.
DN_KERNEL(kThreads) choose_kernel(LoopCall p) {
  int* const scratch = shared_memory<int>();
  LoopItem& item = p.items[block_x()];
  const LoopSequence& q = item.sequence;
  const int thread = thread_index();
  int32_t* const chosen = p.chosen + q.begin;
  const uint8_t* const open = p.open + q.begin;
  const int windows_end = q.window_end;
  int window = q.window_begin, block_step = q.block_step, initial_open = q.initial_open, n = 0, planned = 0;
  uint32_t step = q.step;
  LoopCommit commit = LoopCommit::kNone;

  while (window < windows_end) {
    const LoopWindow range = p.windows[window];
    n = 0;
    for (int first = range.begin; first < range.end; first += kThreads) {
      const int position = first + thread;
      const bool keep = position < range.end && open[position] != 0;
      const int at = place(keep, &n, scratch);
      if (keep) chosen[at] = position;
    }
    sync_block();
    if (n == 0) {
      ++window;
      block_step = 0;
      continue;
    }
    if (block_step == 0) initial_open = n;
    if (q.sampler == LoopSampler::kAncestral) {
      // When a position is revealed was drawn with the counter of the window's first step; the last step
      // leaves nothing, whatever the counter.
      const uint32_t drawn_at = step - static_cast<uint32_t>(block_step);
      const auto is_due = [&](int, int32_t position) {
        const double u = uniform(q.seed, dn::Stream::kOrder, drawn_at, static_cast<uint64_t>(position));
        return static_cast<int>(u * range.steps) == block_step || block_step + 1 >= range.steps;
      };
      n = keep_in_place(chosen, n, is_due, scratch);
      if (n == 0) {  // costs no forward
        ++step;
        ++block_step;
        continue;
      }
      commit = LoopCommit::kAll;
    } else if (q.sampler == LoopSampler::kConfidence) {
      planned = planned_count(q, initial_open, range.steps, block_step);
      planned = planned < n ? planned : n;
      if (planned == 0 && block_step + 1 < range.steps) {  // costs no forward
        ++step;
        ++block_step;
        continue;
      }
      commit = LoopCommit::kRanked;
      if (q.score == LoopScore::kRandom) {
        double* const keys = p.keys + q.begin;
        for (int i = thread; i < n; i += kThreads)
          keys[i] = uniform(q.seed, dn::Stream::kOrder, step, static_cast<uint64_t>(chosen[i]));
        sync_block();
        const int all = n;
        n = keep_in_place(
            chosen, n, [&](int i, int32_t) { return rank_of(keys, all, i) < planned; }, scratch);
        commit = LoopCommit::kAll;
      }
    } else {
      const bool last = range.steps > 0 && block_step + 1 >= range.steps;
      commit = last ? LoopCommit::kAll : LoopCommit::kRanked;
    }
    break;
  }
  if (window == windows_end) n = 0;
  sync_block();  // everybody has read what is written now
  if (thread != 0) return;
  item.rows = n;
  item.planned = planned;
  item.commit = commit;
  item.sequence.window_begin = window;
  item.sequence.block_step = block_step;
  item.sequence.initial_open = initial_open;
  item.sequence.step = step;
}

// The chosen positions of all sequences as one list of rows, and how many there are.
DN_KERNEL(kThreads) list_kernel(LoopCall p) {
  int* const scratch = shared_memory<int>();
  const int s = block_x(), thread = thread_index();
  const LoopItem& item = p.items[s];
  const LoopSequence& q = item.sequence;
  int before = 0, total = 0;
  for (int other = thread; other < p.S; other += kThreads) {
    const int rows = p.items[other].rows;
    total += rows;
    if (other < s) before += rows;
  }
  before = block_sum(before, scratch);
  total = block_sum(total, scratch);
  for (int k = thread; k < item.rows; k += kThreads) {
    const int64_t r = before + k;
    const int position = p.chosen[q.begin + k];
    // The mistake: a list that begins one row late.
    const int row = DN_PLANTED(17) && position + 1 < q.end - q.begin ? position + 1 : position;
    p.rows[r] = q.begin + row - q.shift;
    p.query_positions[r] = position - q.shift;
    DenoiseRow draw;
    draw.row = r;
    draw.temperature = q.temperature;
    draw.top_p = q.top_p;
    draw.top_k = q.top_k;
    draw.banned = q.banned;
    draw.banned_end = q.banned_end;
    draw.seed = q.seed;
    draw.step = q.step;
    draw.position = static_cast<uint32_t>(position);
    p.draws[r] = draw;
    // Here, because a division calls a routine that makes larger kernels spill.
    const bool falls = q.sampler == LoopSampler::kFactor;
    p.keys[q.begin + k] = falls ? 1 - q.parameter / (k + 2) : q.parameter;
  }
  if (thread != 0) return;
  p.listed[s].q_begin = before;
  p.listed[s].q_end = before + item.rows;
  if (s != 0) return;
  p.counters->rows = total;
  p.counters->tokens = total > 0 ? p.counters->N : 0;
  ++p.counters->steps;
}

DN_DEVICE float score_of(const LoopSequence& q, const DenoiseStats& stats) {
  if (q.sampler == LoopSampler::kConfidence) {
    if (q.score == LoopScore::kMargin) return stats.margin;
    if (q.score == LoopScore::kEntropy) return -stats.entropy;
  }
  return stats.probability;
}

// The order of the rows of sequences that commit the best ones.
DN_KERNEL(kThreads) rank_kernel(LoopCall p) {
  const LoopItem& item = p.items[block_x()];
  if (item.commit != LoopCommit::kRanked) return;
  const int64_t first = p.listed[block_x()].q_begin;
  const int n = item.rows;
  float* const scores = p.scores + first;
  for (int j = thread_index(); j < n; j += kThreads)
    scores[j] = score_of(item.sequence, p.results[first + j].stats);
  sync_block();
  for (int j = thread_index(); j < n; j += kThreads) p.order[first + rank_of(scores, n, j)] = j;
}

// How many rows are committed, best first. order (n): ranked rows of `results`; limits (n): by rank, the
// least probabilities of kThreshold and kFactor.
DN_DEVICE int ranked_count(const LoopItem& item, const DenoiseResult* results, const int32_t* order,
                           const double* limits, int n, int* scratch) {
  const LoopSequence& q = item.sequence;
  if (q.sampler == LoopSampler::kConfidence) return item.planned;
  int count = n;
  if (q.sampler == LoopSampler::kEntropyBound) {  // every thread adds in the same order, rarely for long
    double sum = 0, largest = 0;
    for (count = 0; count < n; ++count) {
      const double entropy = static_cast<double>(results[order[count]].stats.entropy);
      sum += entropy;
      largest = largest > entropy ? largest : entropy;
      if (count > 0 && sum - largest > q.parameter) break;
    }
    return count;
  }
  for (int rank = thread_index(); rank < n; rank += kThreads) {
    const double probability = static_cast<double>(results[order[rank]].stats.probability);
    if (rank > 0 && probability < limits[rank] && rank < count) count = rank;
  }
  return block_min(count, scratch);
}

DN_KERNEL(kThreads) decide_kernel(LoopCall p) {
  int* const scratch = shared_memory<int>();
  const int s = block_x(), thread = thread_index(), step = p.counters->steps - 1;
  LoopItem& item = p.items[s];
  const LoopSequence& q = item.sequence;
  const int64_t first = p.listed[s].q_begin;
  // The mistake: rows beyond the sequence's own are decided on too.
  const int n = DN_PLANTED(18) && item.rows > 0 ? p.counters->rows : item.rows;
  const DenoiseResult* const results = p.results + first;
  LoopEvent& event = p.events[step * p.S + s];
  int bad = n;
  for (int j = thread; j < n; j += kThreads) {
    if (results[j].not_finite >= 0) bad = bad < j ? bad : j;
  }
  bad = block_min(bad, scratch);
  if (n == 0 || bad < n) {
    if (thread != 0) return;
    event = {q.step, 0, 0};
    if (n == 0) return;
    p.failures[s] = {results[bad].not_finite, p.chosen[q.begin + bad], results[bad].value};
    item.sequence.window_begin = q.window_end;  // it is over
    return;
  }

  const int32_t begin = step * p.counters->log_rows + static_cast<int32_t>(first);
  LoopRow* const log = p.log + begin;
  const bool all = item.commit == LoopCommit::kAll;
  const auto commit = [&](int j) {
    const int64_t at = q.begin + p.chosen[q.begin + j];
    p.ids[at] = results[j].stats.drawn;
    p.open[at] = 0;
  };
  for (int j = thread; j < n; j += kThreads) {
    log[j] = {results[j].stats, p.chosen[q.begin + j], all ? 1 : 0};
    if (all) commit(j);
  }
  if (item.commit == LoopCommit::kRanked) {
    const int32_t* const order = p.order + first;
    sync_block();  // the log is written
    const int count = ranked_count(item, results, order, p.keys + q.begin, n, scratch);
    for (int rank = thread; rank < count; rank += kThreads) {
      log[order[rank]].committed = 1;
      commit(order[rank]);
    }
  }
  sync_block();  // everybody has read the counters
  if (thread != 0) return;
  event = {q.step, begin, begin + n};
  // The mistake: a replay draws with the numbers of the step before it.
  if (!DN_PLANTED(16)) ++item.sequence.step;
  ++item.sequence.block_step;
}

}  // namespace

void choose_rows(const LoopCall& call, Stream stream) {
  const Grid grid{static_cast<unsigned>(call.S)};
  launch(choose_kernel, grid, kThreads, kWarps * sizeof(int), stream, call);
  launch(list_kernel, grid, kThreads, kWarps * sizeof(int), stream, call);
}

void decide_rows(const LoopCall& call, Stream stream) {
  const Grid grid{static_cast<unsigned>(call.S)};
  launch(rank_kernel, grid, kThreads, 0, stream, call);
  launch(decide_kernel, grid, kThreads, kWarps * sizeof(int), stream, call);
}

}  // namespace dn::cuda
