// Attention forward on tensor cores: online softmax over tiles of keys (Milakov and Gimelshein, "Online
// normalizer calculation for softmax", 2018; Dao, "FlashAttention-2", 2023). A block is 64 queries of one
// head, a warp 16 of them; scores never leave registers. A tile in which a query sees nothing leaves its sums
// untouched to the bit, so results do not depend on which queries share a tile.

#include "cuda/attention.h"
#include "cuda/attention_mask.cuh"
#include "cuda/tile.cuh"

namespace dn::cuda {
namespace {

constexpr int kThreads = 128;
constexpr float kLog2e = 1.4426950408889634f;

// The union of what the queries of each tile may see. One warp per tile.
DN_KERNEL(32) tile_spans_kernel(AttentionCall call) {
  const AttentionTile tile = call.query_tiles[block_x()];
  const AttentionItem& item = call.items[tile.item];
  constexpr int kNone = 0x7FFFFFFF;
  int begin0 = kNone, end0 = 0, begin1 = kNone, end1 = 0;
  for (int r = thread_index(); r < kQueryTile; r += kWarp) {
    const int64_t row = item.q_begin + tile.first + r;
    if (row >= item.q_end) continue;
    Spans s = spans_of(item.mask, call.positions[row], item.k_len);
    if (is_open(item.mask)) s = {0, item.k_len, 0, 0};
    if (s.end0 > s.begin0) {
      begin0 = s.begin0 < begin0 ? s.begin0 : begin0;
      end0 = s.end0 > end0 ? s.end0 : end0;
    }
    if (s.end1 > s.begin1) {
      begin1 = s.begin1 < begin1 ? s.begin1 : begin1;
      end1 = s.end1 > end1 ? s.end1 : end1;
    }
  }
  DN_UNROLL
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    const int b0 = shuffle_xor(begin0, mask), e0 = shuffle_xor(end0, mask);
    const int b1 = shuffle_xor(begin1, mask), e1 = shuffle_xor(end1, mask);
    begin0 = b0 < begin0 ? b0 : begin0;
    end0 = e0 > end0 ? e0 : end0;
    begin1 = b1 < begin1 ? b1 : begin1;
    end1 = e1 > end1 ? e1 : end1;
  }
  if (thread_index() != 0) return;
  call.tile_spans[block_x()] = {begin0 == kNone ? 0 : begin0, end0, begin1 == kNone ? 0 : begin1, end1};
}

struct ForwardParams {
  AttentionCall call;
  bf16* out;
  int64_t out_stride;
  float* lse;  // may be null
  const bf16* q;
  int64_t q_stride;
  float scale;
};

template <int kHead>
constexpr size_t forward_shared_bytes() {
  return (kQueryTile + 4 * kKeyTile) * kHead * sizeof(bf16);
}

// kHead: head size rounded up to 32, 64 or 128; columns from HS on are zeros.
template <int kHead>
DN_KERNEL(kThreads)
attention_forward_kernel(ForwardParams p) {
  bf16* const tile_q = shared_memory<bf16>();
  bf16* const tile_k = tile_q + kQueryTile * kHead;  // two buffers
  bf16* const tile_v = tile_k + 2 * kKeyTile * kHead;
  const int thread = thread_index(), warp = thread / kWarp, lane = thread % kWarp, head = block_y();
  const AttentionTile tile = p.call.query_tiles[block_x()];
  const AttentionItem& item = p.call.items[tile.item];
  if (is_idle(p.call, item, tile)) return;
  const AttentionMask mask = item.mask;
  const int k_len = item.k_len, HS = p.call.HS;
  const KeysValues<bf16> kv(p.call, item, static_cast<int64_t>(head) * HS);
  const KeyTiles visits(p.call.tile_spans[block_x()]);
  const float scale_log2 = p.scale * kLog2e;

  const auto load_keys = [&](int i) {
    const int buffer = (i & 1) * kKeyTile * kHead, first = visits[i] * kKeyTile;
    load_tile<kKeyTile, kHead, kThreads>(tile_k + buffer, kv.k, kv.stride, first, k_len, 0, HS, thread);
    load_tile<kKeyTile, kHead, kThreads>(tile_v + buffer, kv.v, kv.stride, first, k_len, 0, HS, thread);
  };
  load_tile<kQueryTile, kHead, kThreads>(tile_q, p.q + static_cast<int64_t>(head) * HS, p.q_stride,
                                         item.q_begin + tile.first, item.q_end, 0, HS, thread);
  if (visits.count > 0) load_keys(0);
  commit_copies();

  // This thread's two rows of the tile, as the accumulators of mma lay them out.
  int64_t row[2];
  int position[2];
  Spans spans[2];
  DN_UNROLL
  for (int r = 0; r < 2; ++r) {
    row[r] = item.q_begin + tile.first + warp * 16 + lane / 4 + r * 8;
    position[r] = row[r] < item.q_end ? p.call.positions[row[r]] : 0;
    spans[r] = spans_of(mask, position[r], k_len);
  }
  float acc[kHead / 8][4], max[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};
  DN_UNROLL
  for (int i = 0; i < kHead / 8; ++i) {
    DN_UNROLL
    for (int e = 0; e < 4; ++e) acc[i][e] = 0;
  }
  uint32_t q_fragment[kHead / 16][4];

  for (int i = 0; i < visits.count; ++i) {
    if (i + 1 < visits.count) load_keys(i + 1);
    commit_copies();
    if (!DN_PLANTED(1)) wait_copies<1>();
    if (!DN_PLANTED(2)) sync_block();
    if (i == 0) {
      DN_UNROLL
      for (int kk = 0; kk < kHead / 16; ++kk) load_a<kHead>(q_fragment[kk], tile_q, warp * 16, kk * 2, lane);
    }
    const bf16* const keys = tile_k + (i & 1) * kKeyTile * kHead;
    const bf16* const values = tile_v + (i & 1) * kKeyTile * kHead;
    float s[kKeyTile / 8][4];
    DN_UNROLL
    for (int j = 0; j < kKeyTile / 8; ++j) {
      DN_UNROLL
      for (int e = 0; e < 4; ++e) s[j][e] = 0;
    }
    DN_UNROLL
    for (int kk = 0; kk < kHead / 16; ++kk) {
      DN_UNROLL
      for (int j = 0; j < kKeyTile / 16; ++j) {
        uint32_t f[4];
        load_b<kHead>(f, keys, j * 16, kk * 2, lane);
        mma_bf16(s[2 * j], q_fragment[kk], f[0], f[1]);
        mma_bf16(s[2 * j + 1], q_fragment[kk], f[2], f[3]);
      }
    }

    const int first = visits[i] * kKeyTile;
    DN_UNROLL
    for (int r = 0; r < 2; ++r) {
      if (spans[r].begin0 <= first && spans[r].end0 >= first + kKeyTile) continue;
      DN_UNROLL
      for (int j = 0; j < kKeyTile / 8; ++j) {
        const int bits = sees_pair(mask, spans[r], position[r], first + j * 8 + (lane & 3) * 2, k_len);
        if (!(bits & 1)) s[j][2 * r] = -INFINITY;
        if (!(bits & 2)) s[j][2 * r + 1] = -INFINITY;
      }
    }
    DN_UNROLL
    for (int r = 0; r < 2; ++r) {
      float largest = max[r];
      DN_UNROLL
      for (int j = 0; j < kKeyTile / 8; ++j) largest = fmaxf(largest, fmaxf(s[j][2 * r], s[j][2 * r + 1]));
      // The four lanes of a quad hold one row.
      largest = fmaxf(largest, shuffle_xor(largest, 1));
      if (!DN_PLANTED(5) || lane != 7) largest = fmaxf(largest, shuffle_xor(largest, 2));
      const float reference = largest == -INFINITY ? 0.0f : largest;
      const float rescale = exp2_fast((max[r] - reference) * scale_log2);
      max[r] = largest;
      sum[r] *= rescale;
      DN_UNROLL
      for (int d = 0; d < kHead / 8; ++d) {
        acc[d][2 * r] *= rescale;
        acc[d][2 * r + 1] *= rescale;
      }
      DN_UNROLL
      for (int j = 0; j < kKeyTile / 8; ++j) {
        DN_UNROLL
        for (int e = 2 * r; e < 2 * r + 2; ++e) {
          s[j][e] = exp2_fast((s[j][e] - reference) * scale_log2);
          sum[r] += s[j][e];
        }
      }
    }
    // The layout of two neighbouring accumulators is that of an A operand.
    DN_UNROLL
    for (int kk = 0; kk < kKeyTile / 16; ++kk) {
      const uint32_t weights[4] = {
          pack_bf16(s[2 * kk][0], s[2 * kk][1]), pack_bf16(s[2 * kk][2], s[2 * kk][3]),
          pack_bf16(s[2 * kk + 1][0], s[2 * kk + 1][1]), pack_bf16(s[2 * kk + 1][2], s[2 * kk + 1][3])};
      DN_UNROLL
      for (int d = 0; d < kHead / 16; ++d) {
        uint32_t f[4];
        load_b_trans<kHead>(f, values, kk * 16, d * 2, lane);
        mma_bf16(acc[2 * d], weights, f[0], f[1]);
        mma_bf16(acc[2 * d + 1], weights, f[2], f[3]);
      }
    }
    if (!DN_PLANTED(7)) sync_block();
  }
  wait_copies<0>();

  DN_UNROLL
  for (int r = 0; r < 2; ++r) {
    sum[r] += shuffle_xor(sum[r], 1);
    sum[r] += shuffle_xor(sum[r], 2);
    const float inverse = sum[r] > 0 ? 1 / sum[r] : 0.0f;
    if (row[r] >= item.q_end) continue;
    bf16* const out = p.out + row[r] * p.out_stride + static_cast<int64_t>(head) * HS;
    DN_UNROLL
    for (int d = 0; d < kHead / 8; ++d) {
      const int col = d * 8 + (lane & 3) * 2;
      if (col < HS)
        *reinterpret_cast<uint32_t*>(out + col) =
            pack_bf16(acc[d][2 * r] * inverse, acc[d][2 * r + 1] * inverse);
    }
    if (p.lse && (lane & 3) == 0)
      p.lse[row[r] * p.call.NH + head] = sum[r] > 0 ? max[r] * p.scale + logf(sum[r]) : 0.0f;
  }
}

// delta = sum over a head of dout * out: what the softmax's backward subtracts. A warp per row and head.
struct DeltaParams {
  float* delta;
  const void* dout;
  const void* out;
  int64_t dout_stride, out_stride, rows;
  int NH, HS;
};
template <typename T>
DN_KERNEL(kThreads)
attention_delta_kernel(DeltaParams p) {
  const int64_t index = static_cast<int64_t>(block_x()) * (kThreads / kWarp) + thread_index() / kWarp;
  if (index >= p.rows * p.NH) return;
  const int64_t row = index / p.NH, head = index % p.NH;
  const T* const dout = static_cast<const T*>(p.dout) + row * p.dout_stride + head * p.HS;
  const T* const out = static_cast<const T*>(p.out) + row * p.out_stride + head * p.HS;
  float sum = 0;
  for (int d = thread_index() % kWarp; d < p.HS; d += kWarp) sum += to_float(dout[d]) * to_float(out[d]);
  sum = warp_sum(sum);
  if (thread_index() % kWarp == 0) p.delta[index] = sum;
}

void run_tile_spans(const AttentionCall& call, Stream stream) {
  if (call.spans_known) return;
  launch(tile_spans_kernel, Grid{static_cast<unsigned>(call.query_tile_count)}, kWarp, 0, stream, call);
}

}  // namespace

bool attention_on_tensor_cores(const AttentionCall& call, Dtype dtype, int64_t q_stride, int64_t kv_stride) {
  return dtype == Dtype::kBF16 && call.HS % kChunk == 0 && call.HS <= 128 && q_stride % kChunk == 0 &&
         kv_stride % kChunk == 0;
}

void attention_forward(const AttentionCall& call, Tensor out, Tensor lse, Tensor q, bool tensor_cores,
                       Stream stream) {
  run_tile_spans(call, stream);
  if (!tensor_cores) {
    attention_forward_any(call, out, lse, q, stream);
    return;
  }
  ForwardParams p;
  p.call = call;
  p.out = static_cast<bf16*>(out.data);
  p.out_stride = out.stride;
  p.lse = static_cast<float*>(lse.data);
  p.q = static_cast<const bf16*>(q.data);
  p.q_stride = q.stride;
  p.scale = 1 / std::sqrt(static_cast<float>(call.HS));
  const Grid grid{static_cast<unsigned>(call.query_tile_count), static_cast<unsigned>(call.NH)};
  if (call.HS <= 32) {
    launch(attention_forward_kernel<32>, grid, kThreads, forward_shared_bytes<32>(), stream, p);
  } else if (call.HS <= 64) {
    launch(attention_forward_kernel<64>, grid, kThreads, forward_shared_bytes<64>(), stream, p);
  } else {
    launch(attention_forward_kernel<128>, grid, kThreads, forward_shared_bytes<128>(), stream, p);
  }
}

void attention_backward(const AttentionCall& call, Tensor dqkv, Tensor dout, Tensor qkv, Tensor out,
                        Tensor lse, float* delta, bool tensor_cores, Stream stream) {
  run_tile_spans(call, stream);
  DeltaParams d{delta, dout.data, out.data, dout.stride, out.stride, out.rows, call.NH, call.HS};
  const Grid grid{blocks_of(out.rows * call.NH, kThreads / kWarp)};
  if (out.dtype == Dtype::kBF16) {
    launch(attention_delta_kernel<bf16>, grid, kThreads, 0, stream, d);
  } else {
    launch(attention_delta_kernel<float>, grid, kThreads, 0, stream, d);
  }
  if (tensor_cores) {
    attention_backward_tensor_cores(call, dqkv, dout, qkv, lse, delta, stream);
  } else {
    attention_backward_any(call, dqkv, dout, qkv, lse, delta, stream);
  }
}

}  // namespace dn::cuda
