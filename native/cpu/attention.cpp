// Attention: plans the tasks of a call, turns masks into visibility words, and runs the kernels of
// attention_kernels.h. A forward task is a block of queries of one sequence and some heads; a backward task
// is some heads of one sequence. No task shares an output with another, and how a call is cut into tasks
// never changes a result: a query's keys are always visited in the same blocks in the same order, and blocks
// it does not see leave its sums untouched.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <new>
#include <string>
#include <vector>

#include "core/error.h"
#include "cpu/attention_kernels.h"
#include "cpu/attention_visibility.h"
#include "cpu/isa.h"
#include "cpu/kv_cache.h"
#include "cpu/ops.h"
#include "cpu/scratch.h"
#include "cpu/thread_pool.h"

namespace dn::cpu {
namespace {

constexpr int64_t kMinQueryBlock = 32;
// Heads that share the words of masks that are costly to evaluate, and how many queries they may have in all:
// beyond it their sums leave L2 between two blocks of keys.
constexpr int64_t kMaskedHeadGroup = 4;
constexpr int64_t kMaskedHeadQueries = 1056;
// Rows of q, k and v (or of their gradients) that the heads of a task share, at most: half of L2. A task of
// several heads finishes whole rows of memory while they are near, and makes the words of a mask once.
constexpr int64_t kTaskFloats = int64_t{256} << 10;
// Tasks a thread, at least, as long as queries can be cut: each packs all keys of its head anew.
constexpr int64_t kTasksOfThread = 3;

const AttentionKernels& kernels(const Cpu& cpu) {
#if defined(__x86_64__) || defined(_M_X64)
  if (cpu.isa >= Isa::kAvx512) return kAttentionAvx512;
  if (cpu.isa >= Isa::kAvx2) return kAttentionAvx2;
#endif
  (void)cpu;
  return kAttentionPortable;
}

// Tiles and pairs pay where many queries share the packing of keys: keys that are not cached, and neither of
// the masks under which a cache gives the bits of the whole sequence at once (causal and block-causal
// attention, one query or a few at a time). Tiles want heads of whole steps.
const AttentionForward& forward_kernels(const Cpu& cpu, const AttentionSequence& s, int64_t HS) {
  if (s.cache || s.mask.kind == MaskKind::kCausal || s.mask.kind == MaskKind::kBlockCausal)
    return kernels(cpu).forward;
  if (cpu.isa >= Isa::kAmx && kAttentionForwardAmx.begin && HS % kTileHead == 0) return kAttentionForwardAmx;
  if (cpu.isa >= Isa::kAvx512 && has_fast_pairs() && kAttentionForwardPairs.begin && HS >= kPairHead)
    return kAttentionForwardPairs;
  return kernels(cpu).forward;
}

int64_t blocks_of(int64_t n, int64_t block) { return (n + block - 1) / block; }
int64_t round_up(int64_t n, int64_t multiple) { return blocks_of(n, multiple) * multiple; }

// What a thread keeps between tasks.
struct Workspace {
  Scratch scratch;
  Visibility visibility;
  std::vector<ForwardTile> tiles;
  PackedKeys packed;
};

Workspace& workspace() {
  static thread_local Workspace w;
  return w;
}

// parallel(), or parallel_near(), for tasks that may run out of memory: they must not throw inside the pool.
template <typename F>
void run_tasks(const Cpu& cpu, const char* op, int64_t tasks, bool near, F f) {
  std::atomic<bool> out_of_memory{false};
  const auto run = [&](int64_t task, int) {
    try {
      f(task);
    } catch (const std::bad_alloc&) {
      out_of_memory = true;
    } catch (const Error&) {  // of a scratch block
      out_of_memory = true;
    }
  };
  near ? parallel_near(cpu.threads, tasks, run) : parallel(cpu.threads, tasks, run);
  if (out_of_memory)
    throw Error(Code::kOutOfMemory, std::string(op) + ": no memory for the scratch of a task");
}

void require(bool condition, const char* op, const std::string& what) {
  if (!condition) throw Error(Code::kInternal, std::string(op) + ": " + what);
}

void require_sequence(const char* op, const AttentionSequence& s, int64_t index, int64_t queries,
                      int64_t keys) {
  const std::string name = "sequence " + std::to_string(index);
  require(s.q_begin >= 0 && s.q_begin <= s.q_end && s.q_end <= queries, op,
          name + " has queries [" + std::to_string(s.q_begin) + ", " + std::to_string(s.q_end) + ") of " +
              std::to_string(queries) + " rows");
  require(s.k_len >= 0, op, name + " has " + std::to_string(s.k_len) + " keys");
  require(s.cache || (s.kv_begin >= 0 && s.kv_begin + s.k_len <= keys), op,
          name + " has keys [" + std::to_string(s.kv_begin) + ", " + std::to_string(s.kv_begin + s.k_len) +
              ") of " + std::to_string(keys) + " rows");
}

struct ForwardTask {
  int64_t sequence;
  int64_t q_begin;
  int64_t rows;
  int64_t head;
  int64_t heads;
  int64_t cost;
};

// Keys that the query at position q looks at, roughly: the cost of a task is its rows times this.
int64_t keys_seen(const AttentionSequence& s, int64_t q) {
  if (s.mask.kind == MaskKind::kCausal) return std::min(s.k_len, q + 1);
  if (s.mask.kind == MaskKind::kBlockCausal) return std::min(s.k_len, q + s.mask.block);
  return s.k_len;
}

// Heads that a task takes of a sequence of T tokens: what fits kTaskFloats, and no more than leaves some four
// tasks a thread of the `blocks` x NH there are.
int64_t heads_together(const Cpu& cpu, int64_t T, int64_t HS, int64_t NH, int64_t blocks) {
  const int64_t fit = kTaskFloats / (3 * HS * std::max<int64_t>(T, 1)),
                busy = blocks * NH / (4 * cpu.threads);
  return std::clamp<int64_t>(std::min(fit, busy), 1, NH);
}

// Cuts sequences into tasks, the most expensive first so that threads finish together. Blocks are as large as
// keeps all threads busy. Heads of long sequences go one by one, except where a task would be dominated by
// what heads can share: words of costly masks, or (few queries) neighbouring stretches of a cache, or pages
// of key rows.
//
// Returns whether tasks are in the order of heads, each thread to begin with a share of them, as it did when
// their queries, keys and values were made (Weight::column_parts): those of one sequence whose queries all
// see as many keys.
bool plan_forward(const Cpu& cpu, const AttentionSequence* sequences, int64_t S, const int32_t* positions,
                  int64_t NH, int64_t HS, std::vector<ForwardTask>* tasks) {
  const auto block_of = [&](const AttentionSequence& s, int64_t halvings) {
    return std::max(forward_kernels(cpu, s, HS).most_rows >> halvings, kMinQueryBlock);
  };
  int64_t halvings = 0, count = 0;
  for (;; ++halvings) {
    count = 0;
    for (int64_t s = 0; s < S; ++s)
      count += blocks_of(sequences[s].q_end - sequences[s].q_begin, block_of(sequences[s], halvings));
    if (kMaxQueryBlock >> halvings <= kMinQueryBlock || count * NH >= kTasksOfThread * cpu.threads) break;
  }
  tasks->clear();
  for (int64_t s = 0; s < S; ++s) {
    const AttentionSequence& sequence = sequences[s];
    const int64_t block = block_of(sequence, halvings);
    const bool costly_mask =
        sequence.mask.kind == MaskKind::kAnnealed || sequence.mask.kind == MaskKind::kMatrix;
    for (int64_t q = sequence.q_begin; q < sequence.q_end; q += block) {
      const int64_t rows = std::min(block, sequence.q_end - q);
      int64_t group = heads_together(cpu, std::max(rows, sequence.k_len), HS, NH, count);
      if (costly_mask)
        group = std::max(group, std::min(kMaskedHeadGroup, std::max<int64_t>(1, kMaskedHeadQueries / rows)));
      if (rows <= kFewQueries) group = blocks_of(NH, cpu.threads);
      const int64_t seen = keys_seen(sequence, positions[q + rows - 1]);
      for (int64_t head = 0; head < NH; head += group) {
        const int64_t heads = std::min(group, NH - head);
        tasks->push_back({s, q, rows, head, heads, rows * heads * seen});
      }
    }
  }
  const bool by_heads = S == 1 && sequences[0].mask.kind != MaskKind::kCausal &&
                        sequences[0].mask.kind != MaskKind::kBlockCausal;
  std::stable_sort(tasks->begin(), tasks->end(), [=](const ForwardTask& a, const ForwardTask& b) {
    return by_heads ? a.head < b.head : a.cost > b.cost;
  });
  return by_heads;
}

void run_forward_task(const Cpu& cpu, const ForwardTask& task, const AttentionSequence& sequence,
                      const int32_t* positions, Tensor out, Tensor lse, Tensor q, Tensor kv, int64_t NH) {
  const int64_t C = q.cols, HS = C / NH, HSp = round_up(HS, kHeadPad), rows = task.rows;
  const AttentionForward& forward = forward_kernels(cpu, sequence, HS);
  const int64_t all_rows = round_up(rows, forward.row_multiple);
  const auto numbers = [&](int64_t n) {
    return blocks_of(n * forward.number_bytes, static_cast<int64_t>(sizeof(float)));
  };
  Workspace& w = workspace();
  w.visibility.prepare(kernels(cpu), sequence.mask, sequence.k_len, positions + task.q_begin, rows);

  w.tiles.resize(static_cast<size_t>(task.heads));
  lay_out(w.scratch, [&](Cutter& cut) {
    float* const keys = cut.take(numbers(HSp * kKeyBlock) * forward.key_buffers);
    float* const values = cut.take(numbers(HSp * kKeyBlock) * forward.key_buffers);
    float* const scores = cut.take(forward.score_floats);
    for (ForwardTile& t : w.tiles) {
      t.q = cut.take(numbers(all_rows * (HSp + forward.query_extra)));
      t.acc = cut.take(all_rows * HSp);
      t.max = cut.take(all_rows);
      t.sum = cut.take(all_rows * kSumLanes);
      t.keys = keys;
      t.values = values;
      t.scores = scores;
      t.packed = &w.packed;
    }
  });
  w.packed = PackedKeys();
  const float* const cache = static_cast<const float*>(sequence.cache);
  const int64_t key_end = w.visibility.key_end();
  const auto keys_of = [&](int64_t h, int64_t k0) {
    const int64_t head = task.head + h, count = std::clamp<int64_t>(sequence.k_len - k0, 0, kKeyBlock);
    if (cache) return cached_keys(cache, k0, count, head, NH, HS);
    const float* const k = kv.f32(sequence.kv_begin + k0) + head * HS;
    return KeyRows{k, k + C, kv.stride, count};
  };
  // The n-th block from (h, k0) on, in the order of the loops below; without keys when there is none.
  const auto keys_after = [&](int64_t h, int64_t k0, int64_t n) {
    const int64_t i = k0 / kKeyBlock * task.heads + h + n, start = i / task.heads * kKeyBlock;
    return start < key_end ? keys_of(i % task.heads, start) : KeyRows();
  };
  const auto out_of = [&](int64_t h) { return out.f32(task.q_begin) + (task.head + h) * HS; };

  for (int64_t h = 0; h < task.heads; ++h) {
    ForwardTile& t = w.tiles[static_cast<size_t>(h)];
    t.rows = rows;
    t.HS = HS;
    t.HSp = HSp;
    t.scale = 1.0f / std::sqrt(static_cast<float>(HS));
    ForwardAhead ahead;
    if (h == 0) ahead.next = keys_after(0, 0, 0);
    forward.begin(t, q.f32(task.q_begin) + (task.head + h) * HS, q.stride, ahead);
  }

  uint64_t words[kMaxQueryBlock];
  for (int64_t k0 = 0; k0 < key_end; k0 += kKeyBlock) {
    const int64_t count = keys_of(0, k0).count;
    const Seen seen = w.visibility.words(0, rows, k0, count, words);
    if (seen == Seen::kNone) continue;
    const bool is_last = k0 + kKeyBlock >= key_end;
    for (int64_t h = 0; h < task.heads; ++h) {
      ForwardAhead ahead;
      ahead.next = keys_after(h, k0, 1);
      ahead.after = keys_after(h, k0, 2);
      if (is_last) ahead.out = out_of(h);
      ahead.out_stride = out.stride;
      forward.block(w.tiles[static_cast<size_t>(h)], keys_of(h, k0), seen == Seen::kAll ? nullptr : words,
                    ahead);
    }
  }
  for (int64_t h = 0; h < task.heads; ++h) {
    forward.end(w.tiles[static_cast<size_t>(h)], out_of(h), out.stride,
                lse ? lse.f32(task.q_begin) + task.head + h : nullptr, lse.stride);
  }
}

// All of one head of one sequence. Every gradient has one order of additions: dq over key blocks, dk and dv
// over queries.
void run_backward_task(const AttentionKernels& kernels, const AttentionSequence& sequence, int64_t head,
                       const int32_t* positions, Tensor dqkv, Tensor dout, Tensor qkv, Tensor out, Tensor lse,
                       int64_t NH) {
  const int64_t C = out.cols, HS = C / NH, HSp = round_up(HS, kHeadPad),
                T = sequence.q_end - sequence.q_begin;
  Workspace& w = workspace();
  w.visibility.prepare(kernels, sequence.mask, T, positions + sequence.q_begin, T);

  BackwardTile t;
  t.T = T;
  t.HS = HS;
  t.HSp = HSp;
  t.scale = 1.0f / std::sqrt(static_cast<float>(HS));
  lay_out(w.scratch, [&](Cutter& cut) {
    t.q = cut.take(T * HSp);
    t.dout = cut.take(T * HSp);
    t.dq = cut.take(T * HSp);
    t.lse = cut.take(T);
    t.delta = cut.take(T);
    t.keys = cut.take(kKeyBlock * HSp);
    t.keys_t = cut.take(kKeyBlock * HSp);
    t.values_t = cut.take(kKeyBlock * HSp);
    t.dk = cut.take(kKeyBlock * HSp);
    t.dv = cut.take(kKeyBlock * HSp);
    t.p = cut.take(kKeyBlock * kKeyBlock);
    t.ds = cut.take(kKeyBlock * kKeyBlock);
  });

  const int64_t row = sequence.q_begin;
  const float* const q = qkv.f32(row) + head * HS;
  float* const dq = dqkv.f32(row) + head * HS;
  kernels.backward_begin(t, q, qkv.stride, dout.f32(row) + head * HS, dout.stride, out.f32(row) + head * HS,
                         out.stride, lse.f32(row) + head, lse.stride);
  uint64_t words[kKeyBlock];
  for (int64_t k0 = 0; k0 < T; k0 += kKeyBlock) {
    t.count = std::min(kKeyBlock, T - k0);
    kernels.backward_keys(t, q + C + k0 * qkv.stride, q + 2 * C + k0 * qkv.stride, qkv.stride);
    for (int64_t q0 = 0; q0 < T; q0 += kKeyBlock) {
      const int64_t rows = std::min(kKeyBlock, T - q0);
      const Seen seen = w.visibility.words(q0, rows, k0, t.count, words);
      if (seen == Seen::kNone) continue;
      kernels.backward_block(t, q0, rows, seen == Seen::kAll ? nullptr : words);
    }
    kernels.backward_keys_end(t, dq + C + k0 * dqkv.stride, dq + 2 * C + k0 * dqkv.stride, dqkv.stride);
  }
  kernels.backward_end(t, dq, dqkv.stride);
}

}  // namespace

void attention_forward(const Cpu& cpu, Tensor out, Tensor lse, Tensor q, Tensor kv,
                       const AttentionSequence* sequences, int64_t S, const int32_t* query_positions,
                       int64_t NH) {
  const char* const op = "attention_forward";
  const int64_t C = q.cols;
  require(NH > 0 && C % NH == 0, op,
          std::to_string(C) + " channels do not divide into " + std::to_string(NH) + " heads");
  require(out.rows == q.rows && out.cols == C, op, "out " + out.shape() + " does not match q " + q.shape());
  require(!lse || (lse.rows == q.rows && lse.cols == NH), op,
          "lse " + lse.shape() + " does not match q " + q.shape());
  require(!kv || kv.cols == 2 * C, op, "kv " + kv.shape() + " does not match q " + q.shape());
  for (int64_t s = 0; s < S; ++s) require_sequence(op, sequences[s], s, q.rows, kv ? kv.rows : 0);

  static thread_local std::vector<ForwardTask> plan;
  const bool near = plan_forward(cpu, sequences, S, query_positions, NH, C / NH, &plan);
  const ForwardTask* const tasks = plan.data();
  run_tasks(cpu, op, static_cast<int64_t>(plan.size()), near, [&, tasks](int64_t i) {
    run_forward_task(cpu, tasks[i], sequences[tasks[i].sequence], query_positions, out, lse, q, kv, NH);
  });
}

void attention_backward(const Cpu& cpu, Tensor dqkv, Tensor dout, Tensor qkv, Tensor out, Tensor lse,
                        const AttentionSequence* sequences, int64_t S, const int32_t* query_positions,
                        int64_t NH) {
  const char* const op = "attention_backward";
  const int64_t C = out.cols;
  require(NH > 0 && C % NH == 0, op,
          std::to_string(C) + " channels do not divide into " + std::to_string(NH) + " heads");
  require(qkv.cols == 3 * C && qkv.rows == out.rows, op,
          "qkv " + qkv.shape() + " does not match out " + out.shape());
  require(dqkv.cols == 3 * C && dqkv.rows == out.rows, op,
          "dqkv " + dqkv.shape() + " does not match out " + out.shape());
  require(dout.cols == C && dout.rows == out.rows, op,
          "dout " + dout.shape() + " does not match out " + out.shape());
  require(lse.cols == NH && lse.rows == out.rows, op,
          "lse " + lse.shape() + " does not match out " + out.shape());
  std::vector<int64_t> order(static_cast<size_t>(S));
  for (int64_t s = 0; s < S; ++s) {
    const AttentionSequence& sequence = sequences[s];
    require_sequence(op, sequence, s, out.rows, out.rows);
    require(!sequence.cache && sequence.kv_begin == sequence.q_begin &&
                sequence.k_len == sequence.q_end - sequence.q_begin,
            op, "the queries and keys of sequence " + std::to_string(s) + " must be the same tokens");
    order[static_cast<size_t>(s)] = s;
  }
  // Longest sequences first.
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return sequences[a].k_len > sequences[b].k_len; });
  const AttentionKernels& k = kernels(cpu);
  const int64_t longest = S > 0 ? sequences[order[0]].k_len : 0;
  const int64_t group = heads_together(cpu, longest, C / NH, NH, S), groups = blocks_of(NH, group);
  run_tasks(cpu, op, S * groups, false, [&](int64_t i) {
    const AttentionSequence& sequence = sequences[order[static_cast<size_t>(i / groups)]];
    if (sequence.k_len == 0) return;
    const int64_t head = i % groups * group, end = std::min(NH, head + group);
    for (int64_t h = head; h < end; ++h)
      run_backward_task(k, sequence, h, query_positions, dqkv, dout, qkv, out, lse, NH);
  });
}

}  // namespace dn::cpu
