// The inner loops of attention, one table per instruction set; attention.cpp plans tasks, decides who sees
// whom and calls them. The unit of work is one head of one block of queries against one block of kKeyBlock
// keys; key blocks start at multiples of kKeyBlock, so that a query's sums are grouped the same way in every
// call.
//
// Visibility comes as one 64-bit word per query and key block: bit i is key (block start + i). A null pointer
// stands for "all keys of the block". Invisible keys are exact no-ops, wherever
// they lie, as long as their values are finite: they have probability 0.
//
// This header is also seen by sources compiled for AVX: types only, no functions.
#pragma once

#include <stdint.h>

namespace dn::cpu {

constexpr int64_t kKeyBlock = 64;
constexpr int64_t kKeyGroup = 16;  // keys that are transposed together in a cache
constexpr int64_t kHeadPad = 16;   // head rows in scratch are padded with zeros to a multiple of this: HSp
constexpr int64_t kSumLanes = 16;
constexpr int64_t kMaxQueryBlock = 1024;  // most_rows of any kernels
constexpr int64_t kFewQueries = 4;        // up to here a task waits for memory rather than for arithmetic
constexpr int64_t kScoreRows = 16;        // queries whose scores the vector kernels hold at once
// What the vector kernels want of scratch (AttentionForward); 264 is a multiple of their 12 and 6 rows.
constexpr int64_t kVectorRows = 264;
constexpr int64_t kVectorScores = kScoreRows * kKeyBlock;

// A block of keys and values of one head: `count` rows of HS floats each, `stride` floats apart; or keys
// that are transposed already, (kKeyBlock / kKeyGroup, HS, kKeyGroup), of which the first `count` are there.
struct KeyRows {
  const float* k = nullptr;
  const float* v = nullptr;
  int64_t stride = 0;
  int64_t count = 0;
  bool transposed = false;
};

// What a kernel asks the caches for, or packs, while it computes, spread over its work. Rows of a head that
// are not in a KvCache lie whole pages apart, which no hardware prefetcher follows.
struct ForwardAhead {
  KeyRows next;                // the block that probably follows; count 0: none
  KeyRows after;               // the one after that
  const float* out = nullptr;  // rows of the tile that forward_end will write soon, or null
  int64_t out_stride = 0;
};

// The keys that a kernel has packed ahead: those at k in the buffer `turn`; null: none.
struct PackedKeys {
  const float* k = nullptr;
  int64_t turn = 0;
};

// One head of a block of queries, with scratch of the calling thread (64-byte aligned). In brackets how the
// vector kernels use it; on tiles see attention_amx.cpp.
struct ForwardTile {
  int64_t rows = 0;  // queries
  int64_t HS = 0;
  int64_t HSp = 0;
  float scale = 0;          // 1 / sqrt(HS)
  float* q = nullptr;       // (rows, HSp), scaled; in pairs in groups, see PairScores
  float* acc = nullptr;     // (rows, HSp): sum of e^(score - max) v
  float* max = nullptr;     // (rows): running maximum of the visible scores, -inf at first
  float* sum = nullptr;     // (rows, kSumLanes): partial sums of e^(score - max)
  float* keys = nullptr;    // (HSp, kKeyBlock): the block's keys, transposed; shared by the heads of a task
  float* values = nullptr;  // (kKeyBlock, HSp)
  float* scores = nullptr;  // (kScoreRows, kKeyBlock)
  PackedKeys* packed = nullptr;  // shared like keys; unused
};

// One head of one sequence in the backward pass: T queries, T keys.
struct BackwardTile {
  int64_t T = 0;
  int64_t HS = 0;
  int64_t HSp = 0;
  float scale = 0;
  float* q = nullptr;      // (T, HSp), scaled
  float* dout = nullptr;   // (T, HSp)
  float* dq = nullptr;     // (T, HSp), of the scaled q
  float* lse = nullptr;    // (T)
  float* delta = nullptr;  // (T): sum over the head of dout * out
  // The current block of keys.
  int64_t count = 0;          // keys in it
  float* keys = nullptr;      // (kKeyBlock, HSp)
  float* keys_t = nullptr;    // (HSp, kKeyBlock)
  float* values_t = nullptr;  // (HSp, kKeyBlock)
  float* dk = nullptr;        // (kKeyBlock, HSp)
  float* dv = nullptr;        // (kKeyBlock, HSp)
  float* p = nullptr;         // (kKeyBlock queries, kKeyBlock): probabilities
  float* ds = nullptr;        // (kKeyBlock queries, kKeyBlock): gradients of the scores
};

struct AttentionForward {
  int64_t most_rows;     // of a block of queries: amortises loading a block of keys
  int64_t row_multiple;  // rows in scratch are rounded up to it
  int64_t number_bytes;  // of a number of q, keys and values in scratch
  int64_t key_buffers;   // blocks of keys and values in scratch
  int64_t score_floats;  // of ForwardTile::scores
  int64_t query_extra;   // numbers of a query in scratch beyond HSp
  // Loads the queries and resets the running sums.
  void (*begin)(const ForwardTile& t, const float* q, int64_t q_stride, const ForwardAhead& ahead);
  // One block of at most kKeyBlock keys. words (rows), or null.
  void (*block)(const ForwardTile& t, const KeyRows& keys, const uint64_t* words, const ForwardAhead& ahead);
  // Writes out and, unless null, lse.
  void (*end)(const ForwardTile& t, float* out, int64_t out_stride, float* lse, int64_t lse_stride);
};

struct AttentionKernels {
  AttentionForward forward;

  // Loads q, dout, lse, forms delta and clears dq. stride: of q; out_stride: of dout and out.
  void (*backward_begin)(const BackwardTile& t, const float* q, int64_t stride, const float* dout,
                         int64_t dout_stride, const float* out, int64_t out_stride, const float* lse,
                         int64_t lse_stride);
  // Loads t.count keys and values, clears dk and dv.
  void (*backward_keys)(const BackwardTile& t, const float* k, const float* v, int64_t stride);
  // Adds what the queries [first, first + rows), at most kKeyBlock, contribute to dq, dk and dv. words
  // (rows), or null.
  void (*backward_block)(const BackwardTile& t, int64_t first, int64_t rows, const uint64_t* words);
  // Writes dk and dv of the block; dq of the sequence.
  void (*backward_keys_end)(const BackwardTile& t, float* dk, float* dv, int64_t stride);
  void (*backward_end)(const BackwardTile& t, float* dq, int64_t stride);

  // The random bits of query q for the keys k0 .. k0 + 63 (k0 a multiple of 64): annealed_bit of
  // core/attention_mask.h.
  uint64_t (*annealed_word)(uint64_t seed, uint32_t stream, uint32_t step, uint32_t threshold, uint32_t q,
                            uint32_t k0);
};

// For heads of whole steps of tiles (kTileHead). Where the compiler or the machine lacks the instructions it
// has no kernels (begin is null).
constexpr int64_t kTileHead = 32;
extern const AttentionForward kAttentionForwardAmx;
// Scores in pairs, for heads of at least kPairHead. Likewise.
constexpr int64_t kPairHead = 64;
extern const AttentionForward kAttentionForwardPairs;

extern const AttentionKernels kAttentionPortable;
extern const AttentionKernels kAttentionAvx2;
extern const AttentionKernels kAttentionAvx512;

}  // namespace dn::cpu
