// Attention backward on tensor cores, in two kernels that both recompute the probabilities from the saved
// log-sum-exp: one owns a tile of keys and walks the queries (dk, dv), the other owns a tile of queries and
// walks the keys (dq). That costs seven products for five, and makes every sum a fixed order: no float
// atomics, the same bits in every run. With s = scale q.k, p = e^(s - lse):  dv += p dout,  dp = dout.v,  ds
// = p (dp - delta),  dq += scale ds k,  dk += scale ds q.

#include "cuda/attention.h"
#include "cuda/attention_mask.cuh"
#include "cuda/tile.cuh"

namespace dn::cuda {
namespace {

constexpr int kThreads = 128;
constexpr float kLog2e = 1.4426950408889634f;

struct BackwardParams {
  AttentionCall call;
  bf16* dqkv;
  int64_t dqkv_stride;
  const bf16* qkv;
  int64_t qkv_stride;
  const bf16* dout;
  int64_t dout_stride;
  const float* lse;    // (N, NH)
  const float* delta;  // (N, NH)
  int64_t C;
  float scale;
};

// What the walk over queries needs of each, in shared memory.
struct QueryFacts {
  float lse_log2[kQueryTile];
  float delta[kQueryTile];
  int32_t position[kQueryTile];
  Spans spans[kQueryTile];
};

// Rows of the other side that are scored at a time: fewer for wide heads, whose accumulators need the
// registers.
template <int kHead>
struct PerStep {
  static constexpr int kCount = kHead > 64 ? 32 : 64;
};

template <int kHead>
constexpr size_t keys_shared_bytes() {
  return (2 * kKeyTile + 4 * PerStep<kHead>::kCount) * kHead * sizeof(bf16) + 2 * sizeof(QueryFacts);
}

// dk and dv of 64 keys of one head; a warp owns 16 keys. Scores are computed transposed, (keys, queries), so
// that they come out in the layout of an A operand for the products that follow.
template <int kHead>
DN_KERNEL(kThreads)
attention_backward_keys_kernel(BackwardParams p) {
  constexpr int kQueries = PerStep<kHead>::kCount;
  bf16* const tile_k = shared_memory<bf16>();
  bf16* const tile_v = tile_k + kKeyTile * kHead;
  bf16* const tile_q = tile_v + kKeyTile * kHead;  // two buffers
  bf16* const tile_do = tile_q + 2 * kQueries * kHead;
  QueryFacts* const facts = reinterpret_cast<QueryFacts*>(tile_do + 2 * kQueries * kHead);
  const int thread = thread_index(), warp = thread / kWarp, lane = thread % kWarp, head = block_y();
  const AttentionTile tile = p.call.key_tiles[block_x()];
  const AttentionItem& item = p.call.items[tile.item];
  const AttentionMask mask = item.mask;
  const int k_len = item.k_len, HS = p.call.HS, NH = p.call.NH;
  const int64_t head_offset = static_cast<int64_t>(head) * HS;
  const bf16* const q = p.qkv + head_offset;
  const bf16* const dout = p.dout + head_offset;
  const int queries = static_cast<int>(item.q_end - item.q_begin);
  const float scale_log2 = p.scale * kLog2e;

  // The next step, from `query` on, in which somebody may see one of these keys.
  const auto next_step = [&](int query) {
    while (query < queries && !may_see(p.call.tile_spans[item.first_tile + query / kQueryTile], tile.first,
                                       tile.first + kKeyTile))
      query += kQueries;
    return query;
  };
  const auto load_queries = [&](int query, int buffer) {
    load_tile<kQueries, kHead, kThreads>(tile_q + buffer * kQueries * kHead, q, p.qkv_stride,
                                         item.q_begin + query, item.q_end, 0, HS, thread);
    load_tile<kQueries, kHead, kThreads>(tile_do + buffer * kQueries * kHead, dout, p.dout_stride,
                                         item.q_begin + query, item.q_end, 0, HS, thread);
    if (thread >= kQueries) return;
    const int64_t row = item.q_begin + query + thread;
    QueryFacts& f = facts[buffer];
    const bool valid = row < item.q_end;
    f.lse_log2[thread] = valid ? p.lse[row * NH + head] * kLog2e : 0.0f;
    f.delta[thread] = valid ? p.delta[row * NH + head] : 0.0f;
    f.position[thread] = valid ? p.call.positions[row] : 0;
    f.spans[thread] = valid ? spans_of(mask, f.position[thread], k_len) : Spans{0, 0, 0, 0};
    if (!valid) f.position[thread] = -1;
  };

  const KeysValues<bf16> kv(p.call, item, head_offset);
  load_tile<kKeyTile, kHead, kThreads>(tile_k, kv.k, kv.stride, tile.first, k_len, 0, HS, thread);
  load_tile<kKeyTile, kHead, kThreads>(tile_v, kv.v, kv.stride, tile.first, k_len, 0, HS, thread);
  int query = next_step(0);
  if (query < queries) load_queries(query, 0);
  commit_copies();

  float dk[kHead / 8][4], dv[kHead / 8][4];
  DN_UNROLL
  for (int i = 0; i < kHead / 8; ++i) {
    DN_UNROLL
    for (int e = 0; e < 4; ++e) dk[i][e] = dv[i][e] = 0;
  }
  const int key0 = tile.first + warp * 16 + lane / 4;  // and key0 + 8

  for (int buffer = 0; query < queries; buffer ^= 1) {
    const int next = next_step(query + kQueries);
    if (next < queries) load_queries(next, buffer ^ 1);
    commit_copies();
    wait_copies<1>();
    sync_block();
    const bf16* const queries_tile = tile_q + buffer * kQueries * kHead;
    const bf16* const douts = tile_do + buffer * kQueries * kHead;
    const QueryFacts& f = facts[buffer];

    float s[kQueries / 8][4], dp[kQueries / 8][4];
    DN_UNROLL
    for (int j = 0; j < kQueries / 8; ++j) {
      DN_UNROLL
      for (int e = 0; e < 4; ++e) s[j][e] = dp[j][e] = 0;
    }
    DN_UNROLL
    for (int kk = 0; kk < kHead / 16; ++kk) {
      uint32_t k_fragment[4], v_fragment[4];
      load_a<kHead>(k_fragment, tile_k, warp * 16, kk * 2, lane);
      load_a<kHead>(v_fragment, tile_v, warp * 16, kk * 2, lane);
      DN_UNROLL
      for (int j = 0; j < kQueries / 16; ++j) {
        uint32_t b[4];
        load_b<kHead>(b, queries_tile, j * 16, kk * 2, lane);
        mma_bf16(s[2 * j], k_fragment, b[0], b[1]);
        mma_bf16(s[2 * j + 1], k_fragment, b[2], b[3]);
        load_b<kHead>(b, douts, j * 16, kk * 2, lane);
        mma_bf16(dp[2 * j], v_fragment, b[0], b[1]);
        mma_bf16(dp[2 * j + 1], v_fragment, b[2], b[3]);
      }
    }
    // s becomes p, dp becomes ds.
    DN_UNROLL
    for (int j = 0; j < kQueries / 8; ++j) {
      DN_UNROLL
      for (int c = 0; c < 2; ++c) {
        const int at = j * 8 + (lane & 3) * 2 + c;
        const Spans spans = f.spans[at];
        const int position = f.position[at];
        const float lse_log2 = f.lse_log2[at], delta = f.delta[at];
        DN_UNROLL
        for (int r = 0; r < 2; ++r) {
          const int e = 2 * r + c, key = key0 + r * 8;
          const bool seen = position >= 0 && sees(mask, spans, position, key, k_len);
          const float weight = seen ? exp2_fast(s[j][e] * scale_log2 - lse_log2) : 0.0f;
          dp[j][e] = weight * (dp[j][e] - delta);
          s[j][e] = weight;
        }
      }
    }
    DN_UNROLL
    for (int kk = 0; kk < kQueries / 16; ++kk) {
      const uint32_t weights[4] = {
          pack_bf16(s[2 * kk][0], s[2 * kk][1]), pack_bf16(s[2 * kk][2], s[2 * kk][3]),
          pack_bf16(s[2 * kk + 1][0], s[2 * kk + 1][1]), pack_bf16(s[2 * kk + 1][2], s[2 * kk + 1][3])};
      const uint32_t ds[4] = {
          pack_bf16(dp[2 * kk][0], dp[2 * kk][1]), pack_bf16(dp[2 * kk][2], dp[2 * kk][3]),
          pack_bf16(dp[2 * kk + 1][0], dp[2 * kk + 1][1]), pack_bf16(dp[2 * kk + 1][2], dp[2 * kk + 1][3])};
      DN_UNROLL
      for (int d = 0; d < kHead / 16; ++d) {
        uint32_t b[4];
        load_b_trans<kHead>(b, douts, kk * 16, d * 2, lane);
        mma_bf16(dv[2 * d], weights, b[0], b[1]);
        mma_bf16(dv[2 * d + 1], weights, b[2], b[3]);
        load_b_trans<kHead>(b, queries_tile, kk * 16, d * 2, lane);
        mma_bf16(dk[2 * d], ds, b[0], b[1]);
        mma_bf16(dk[2 * d + 1], ds, b[2], b[3]);
      }
    }
    sync_block();
    query = next;
  }
  wait_copies<0>();

  DN_UNROLL
  for (int r = 0; r < 2; ++r) {
    const int key = key0 + r * 8;
    if (key >= k_len) continue;
    // Queries and keys are the same tokens: row q_begin + key.
    bf16* const row = p.dqkv + (item.q_begin + key) * p.dqkv_stride + head_offset;
    DN_UNROLL
    for (int d = 0; d < kHead / 8; ++d) {
      const int col = d * 8 + (lane & 3) * 2;
      if (col >= HS) continue;
      *reinterpret_cast<uint32_t*>(row + p.C + col) =
          pack_bf16(dk[d][2 * r] * p.scale, dk[d][2 * r + 1] * p.scale);
      *reinterpret_cast<uint32_t*>(row + 2 * p.C + col) = pack_bf16(dv[d][2 * r], dv[d][2 * r + 1]);
    }
  }
}

template <int kHead>
constexpr size_t queries_shared_bytes() {
  return (2 * kQueryTile + 4 * kKeyTile) * kHead * sizeof(bf16);
}

// dq of 64 queries of one head; a warp owns 16 queries.
template <int kHead>
DN_KERNEL(kThreads)
attention_backward_queries_kernel(BackwardParams p) {
  constexpr int kKeys = PerStep<kHead>::kCount;
  bf16* const tile_q = shared_memory<bf16>();
  bf16* const tile_do = tile_q + kQueryTile * kHead;
  bf16* const tile_k = tile_do + kQueryTile * kHead;  // two buffers
  bf16* const tile_v = tile_k + 2 * kKeyTile * kHead;
  const int thread = thread_index(), warp = thread / kWarp, lane = thread % kWarp, head = block_y();
  const AttentionTile tile = p.call.query_tiles[block_x()];
  const AttentionItem& item = p.call.items[tile.item];
  const AttentionMask mask = item.mask;
  const int k_len = item.k_len, HS = p.call.HS, NH = p.call.NH;
  const int64_t head_offset = static_cast<int64_t>(head) * HS, first_row = item.q_begin + tile.first;
  const KeysValues<bf16> kv(p.call, item, head_offset);
  const KeyTiles visits(p.call.tile_spans[block_x()]);
  const float scale_log2 = p.scale * kLog2e;

  const auto load_keys = [&](int i) {
    const int buffer = (i & 1) * kKeyTile * kHead, first = visits[i] * kKeyTile;
    load_tile<kKeyTile, kHead, kThreads>(tile_k + buffer, kv.k, kv.stride, first, k_len, 0, HS, thread);
    load_tile<kKeyTile, kHead, kThreads>(tile_v + buffer, kv.v, kv.stride, first, k_len, 0, HS, thread);
  };
  load_tile<kQueryTile, kHead, kThreads>(tile_q, p.qkv + head_offset, p.qkv_stride, first_row, item.q_end, 0,
                                         HS, thread);
  load_tile<kQueryTile, kHead, kThreads>(tile_do, p.dout + head_offset, p.dout_stride, first_row, item.q_end,
                                         0, HS, thread);
  if (visits.count > 0) load_keys(0);
  commit_copies();

  int64_t row[2];
  int position[2];
  Spans spans[2];
  float lse_log2[2], delta[2];
  DN_UNROLL
  for (int r = 0; r < 2; ++r) {
    row[r] = first_row + warp * 16 + lane / 4 + r * 8;
    const bool valid = row[r] < item.q_end;
    position[r] = valid ? p.call.positions[row[r]] : 0;
    spans[r] = spans_of(mask, position[r], k_len);
    lse_log2[r] = valid ? p.lse[row[r] * NH + head] * kLog2e : 0.0f;
    delta[r] = valid ? p.delta[row[r] * NH + head] : 0.0f;
  }
  float dq[kHead / 8][4];
  DN_UNROLL
  for (int i = 0; i < kHead / 8; ++i) {
    DN_UNROLL
    for (int e = 0; e < 4; ++e) dq[i][e] = 0;
  }

  for (int i = 0; i < visits.count; ++i) {
    if (i + 1 < visits.count) load_keys(i + 1);
    commit_copies();
    wait_copies<1>();
    sync_block();
    const bf16* const keys = tile_k + (i & 1) * kKeyTile * kHead;
    const bf16* const values = tile_v + (i & 1) * kKeyTile * kHead;
    for (int step = 0; step < kKeyTile; step += kKeys) {
      float s[kKeys / 8][4], dp[kKeys / 8][4];
      DN_UNROLL
      for (int j = 0; j < kKeys / 8; ++j) {
        DN_UNROLL
        for (int e = 0; e < 4; ++e) s[j][e] = dp[j][e] = 0;
      }
      DN_UNROLL
      for (int kk = 0; kk < kHead / 16; ++kk) {
        uint32_t q_fragment[4], do_fragment[4];
        load_a<kHead>(q_fragment, tile_q, warp * 16, kk * 2, lane);
        load_a<kHead>(do_fragment, tile_do, warp * 16, kk * 2, lane);
        DN_UNROLL
        for (int j = 0; j < kKeys / 16; ++j) {
          uint32_t b[4];
          load_b<kHead>(b, keys, step + j * 16, kk * 2, lane);
          mma_bf16(s[2 * j], q_fragment, b[0], b[1]);
          mma_bf16(s[2 * j + 1], q_fragment, b[2], b[3]);
          load_b<kHead>(b, values, step + j * 16, kk * 2, lane);
          mma_bf16(dp[2 * j], do_fragment, b[0], b[1]);
          mma_bf16(dp[2 * j + 1], do_fragment, b[2], b[3]);
        }
      }
      const int first = visits[i] * kKeyTile + step;
      DN_UNROLL
      for (int r = 0; r < 2; ++r) {
        const bool all = spans[r].begin0 <= first && spans[r].end0 >= first + kKeys;
        DN_UNROLL
        for (int j = 0; j < kKeys / 8; ++j) {
          const int bits =
              all ? 3 : sees_pair(mask, spans[r], position[r], first + j * 8 + (lane & 3) * 2, k_len);
          DN_UNROLL
          for (int c = 0; c < 2; ++c) {
            const int e = 2 * r + c;
            const float weight = bits >> c & 1 ? exp2_fast(s[j][e] * scale_log2 - lse_log2[r]) : 0.0f;
            dp[j][e] = weight * (dp[j][e] - delta[r]);
          }
        }
      }
      DN_UNROLL
      for (int kk = 0; kk < kKeys / 16; ++kk) {
        const uint32_t ds[4] = {
            pack_bf16(dp[2 * kk][0], dp[2 * kk][1]), pack_bf16(dp[2 * kk][2], dp[2 * kk][3]),
            pack_bf16(dp[2 * kk + 1][0], dp[2 * kk + 1][1]), pack_bf16(dp[2 * kk + 1][2], dp[2 * kk + 1][3])};
        DN_UNROLL
        for (int d = 0; d < kHead / 16; ++d) {
          uint32_t b[4];
          load_b_trans<kHead>(b, keys, step + kk * 16, d * 2, lane);
          mma_bf16(dq[2 * d], ds, b[0], b[1]);
          mma_bf16(dq[2 * d + 1], ds, b[2], b[3]);
        }
      }
    }
    sync_block();
  }
  wait_copies<0>();

  DN_UNROLL
  for (int r = 0; r < 2; ++r) {
    if (row[r] >= item.q_end) continue;
    bf16* const out = p.dqkv + row[r] * p.dqkv_stride + head_offset;
    DN_UNROLL
    for (int d = 0; d < kHead / 8; ++d) {
      const int col = d * 8 + (lane & 3) * 2;
      if (col < HS)
        *reinterpret_cast<uint32_t*>(out + col) =
            pack_bf16(dq[d][2 * r] * p.scale, dq[d][2 * r + 1] * p.scale);
    }
  }
}

template <int kHead>
void run(const BackwardParams& p, Stream stream) {
  const unsigned heads = static_cast<unsigned>(p.call.NH);
  launch(attention_backward_keys_kernel<kHead>, Grid{static_cast<unsigned>(p.call.key_tile_count), heads},
         kThreads, keys_shared_bytes<kHead>(), stream, p);
  launch(attention_backward_queries_kernel<kHead>,
         Grid{static_cast<unsigned>(p.call.query_tile_count), heads}, kThreads, queries_shared_bytes<kHead>(),
         stream, p);
}

}  // namespace

void attention_backward_tensor_cores(const AttentionCall& call, Tensor dqkv, Tensor dout, Tensor qkv,
                                     Tensor lse, const float* delta, Stream stream) {
  BackwardParams p;
  p.call = call;
  p.dqkv = static_cast<bf16*>(dqkv.data);
  p.dqkv_stride = dqkv.stride;
  p.qkv = static_cast<const bf16*>(qkv.data);
  p.qkv_stride = qkv.stride;
  p.dout = static_cast<const bf16*>(dout.data);
  p.dout_stride = dout.stride;
  p.lse = static_cast<const float*>(lse.data);
  p.delta = delta;
  p.C = qkv.cols / 3;
  p.scale = 1 / std::sqrt(static_cast<float>(call.HS));
  if (call.HS <= 32) {
    run<32>(p, stream);
  } else if (call.HS <= 64) {
    run<64>(p, stream);
  } else {
    run<128>(p, stream);
  }
}

}  // namespace dn::cuda
