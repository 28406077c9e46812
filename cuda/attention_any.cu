// Attention without tensor cores: fp32 for checking, and bf16 head sizes that are not whole 16-byte chunks. A
// warp owns a query (forward, dq) or a key (dk, dv) and walks the other side 32 at a time: lanes are first
// keys (or queries), one dot product each, then dimensions. fp32 sums in a fixed order.

#include "cuda/attention.h"
#include "cuda/attention_mask.cuh"

namespace dn::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
constexpr int kParts = kLargestAnyHead / kWarp;  // dimensions a lane owns: d = lane + 32 i

struct AnyParams {
  AttentionCall call;
  void* out;  // forward: out; backward: dqkv
  int64_t out_stride;
  float* lse;  // written by forward (may be null), read by backward
  const void* q;
  int64_t q_stride;
  const void* dout;
  int64_t dout_stride;
  const float* delta;
  int64_t C;
  float scale;
};

template <typename T>
DN_DEVICE float dot(const T* a, const T* b, int n) {
  float sum = 0;
  for (int d = 0; d < n; ++d) sum += to_float(a[d]) * to_float(b[d]);
  return sum;
}

// acc[i] += sum over the 32 lanes of their weight times row (begin + lane) of a matrix; rows from `end` on
// are skipped.
template <typename T>
DN_DEVICE void add_rows(float (&acc)[kParts], float weight, const T* matrix, int64_t stride, int begin,
                        int end, int HS) {
  for (int j = 0; j < kWarp; ++j) {
    const float w = shuffle(weight, j);
    if (begin + j >= end) continue;
    const T* const row = matrix + (begin + j) * stride;
    DN_UNROLL
    for (int i = 0; i < kParts; ++i) {
      const int d = thread_index() % kWarp + i * kWarp;
      if (d < HS) acc[i] += w * to_float(row[d]);
    }
  }
}

template <typename T>
DN_DEVICE void store_row(T* row, const float (&acc)[kParts], float scale, int HS) {
  DN_UNROLL
  for (int i = 0; i < kParts; ++i) {
    const int d = thread_index() % kWarp + i * kWarp;
    if (d < HS) row[d] = from_float<T>(acc[i] * scale);
  }
}

template <typename T>
DN_KERNEL(kThreads)
attention_forward_any_kernel(AnyParams p) {
  const AttentionTile tile = p.call.query_tiles[block_x()];
  const AttentionItem& item = p.call.items[tile.item];
  if (is_idle(p.call, item, tile)) return;
  const int lane = thread_index() % kWarp, head = block_y(), HS = p.call.HS;
  const int64_t head_offset = static_cast<int64_t>(head) * HS;
  const KeysValues<T> kv(p.call, item, head_offset);
  for (int r = thread_index() / kWarp; r < kQueryTile; r += kWarps) {
    const int64_t row = item.q_begin + tile.first + r;
    if (row >= item.q_end) break;
    const T* const q = static_cast<const T*>(p.q) + row * p.q_stride + head_offset;
    const int position = p.call.positions[row];
    const Spans spans = spans_of(item.mask, position, item.k_len);
    float acc[kParts] = {}, max = -INFINITY, sum = 0;
    for (int begin = 0; begin < item.k_len; begin += kWarp) {
      const int key = begin + lane;
      float s = -INFINITY;
      if (key < item.k_len && sees(item.mask, spans, position, key, item.k_len))
        s = dot(q, kv.k + key * kv.stride, HS) * p.scale;
      const float largest = fmaxf(max, warp_max(s));
      if (largest == -INFINITY) continue;  // the same in all lanes
      const float rescale = expf(max - largest), weight = expf(s - largest);
      max = largest;
      sum = sum * rescale + warp_sum(weight);
      DN_UNROLL
      for (int i = 0; i < kParts; ++i) acc[i] *= rescale;
      add_rows(acc, weight, kv.v, kv.stride, begin, item.k_len, HS);
    }
    store_row(static_cast<T*>(p.out) + row * p.out_stride + head_offset, acc, sum > 0 ? 1 / sum : 0.0f, HS);
    if (p.lse && lane == 0) p.lse[row * p.call.NH + head] = sum > 0 ? max + logf(sum) : 0.0f;
  }
}

template <typename T>
DN_KERNEL(kThreads)
attention_backward_queries_any_kernel(AnyParams p) {
  const AttentionTile tile = p.call.query_tiles[block_x()];
  const AttentionItem& item = p.call.items[tile.item];
  const int lane = thread_index() % kWarp, head = block_y(), HS = p.call.HS;
  const int64_t head_offset = static_cast<int64_t>(head) * HS;
  const KeysValues<T> kv(p.call, item, head_offset);
  for (int r = thread_index() / kWarp; r < kQueryTile; r += kWarps) {
    const int64_t row = item.q_begin + tile.first + r;
    if (row >= item.q_end) break;
    const T* const q = static_cast<const T*>(p.q) + row * p.q_stride + head_offset;
    const T* const dout = static_cast<const T*>(p.dout) + row * p.dout_stride + head_offset;
    const int position = p.call.positions[row];
    const Spans spans = spans_of(item.mask, position, item.k_len);
    const float lse = p.lse[row * p.call.NH + head], delta = p.delta[row * p.call.NH + head];
    float dq[kParts] = {};
    for (int begin = 0; begin < item.k_len; begin += kWarp) {
      const int key = begin + lane;
      float ds = 0;
      if (key < item.k_len && sees(item.mask, spans, position, key, item.k_len)) {
        const float weight = expf(dot(q, kv.k + key * kv.stride, HS) * p.scale - lse);
        ds = weight * (dot(dout, kv.v + key * kv.stride, HS) - delta);
      }
      add_rows(dq, ds, kv.k, kv.stride, begin, item.k_len, HS);
    }
    store_row(static_cast<T*>(p.out) + row * p.out_stride + head_offset, dq, p.scale, HS);
  }
}

template <typename T>
DN_KERNEL(kThreads)
attention_backward_keys_any_kernel(AnyParams p) {
  const AttentionTile tile = p.call.key_tiles[block_x()];
  const AttentionItem& item = p.call.items[tile.item];
  const int lane = thread_index() % kWarp, head = block_y(), HS = p.call.HS;
  const int64_t head_offset = static_cast<int64_t>(head) * HS;
  const KeysValues<T> kv(p.call, item, head_offset);
  const T* const q = static_cast<const T*>(p.q) + item.q_begin * p.q_stride + head_offset;
  const T* const dout = static_cast<const T*>(p.dout) + item.q_begin * p.dout_stride + head_offset;
  const int queries = static_cast<int>(item.q_end - item.q_begin);
  for (int r = thread_index() / kWarp; r < kKeyTile; r += kWarps) {
    const int key = tile.first + r;
    if (key >= item.k_len) break;
    const T* const k = kv.k + key * kv.stride;
    const T* const v = kv.v + key * kv.stride;
    float dk[kParts] = {}, dv[kParts] = {};
    for (int begin = 0; begin < queries; begin += kWarp) {
      const int query = begin + lane;
      float weight = 0, ds = 0;
      if (query < queries) {
        const int64_t row = item.q_begin + query;
        const int position = p.call.positions[row];
        if (sees(item.mask, spans_of(item.mask, position, item.k_len), position, key, item.k_len)) {
          const int64_t at = row * p.call.NH + head;
          weight = expf(dot(q + query * p.q_stride, k, HS) * p.scale - p.lse[at]);
          ds = weight * (dot(dout + query * p.dout_stride, v, HS) - p.delta[at]);
        }
      }
      add_rows(dv, weight, dout, p.dout_stride, begin, queries, HS);
      add_rows(dk, ds, q, p.q_stride, begin, queries, HS);
    }
    T* const row = static_cast<T*>(p.out) + (item.q_begin + key) * p.out_stride + head_offset;
    store_row(row + p.C, dk, p.scale, HS);
    store_row(row + 2 * p.C, dv, 1.0f, HS);
  }
}

template <typename T>
void run_backward(const AnyParams& p, Stream stream) {
  const unsigned heads = static_cast<unsigned>(p.call.NH);
  launch(attention_backward_keys_any_kernel<T>, Grid{static_cast<unsigned>(p.call.key_tile_count), heads},
         kThreads, 0, stream, p);
  launch(attention_backward_queries_any_kernel<T>,
         Grid{static_cast<unsigned>(p.call.query_tile_count), heads}, kThreads, 0, stream, p);
}

}  // namespace

void attention_forward_any(const AttentionCall& call, Tensor out, Tensor lse, Tensor q, Stream stream) {
  AnyParams p{};
  p.call = call;
  p.out = out.data;
  p.out_stride = out.stride;
  p.lse = static_cast<float*>(lse.data);
  p.q = q.data;
  p.q_stride = q.stride;
  p.scale = 1 / std::sqrt(static_cast<float>(call.HS));
  const Grid grid{static_cast<unsigned>(call.query_tile_count), static_cast<unsigned>(call.NH)};
  if (q.dtype == Dtype::kBF16) {
    launch(attention_forward_any_kernel<bf16>, grid, kThreads, 0, stream, p);
  } else {
    launch(attention_forward_any_kernel<float>, grid, kThreads, 0, stream, p);
  }
}

void attention_backward_any(const AttentionCall& call, Tensor dqkv, Tensor dout, Tensor qkv, Tensor lse,
                            const float* delta, Stream stream) {
  AnyParams p{};
  p.call = call;
  p.out = dqkv.data;
  p.out_stride = dqkv.stride;
  p.lse = static_cast<float*>(lse.data);
  p.q = qkv.data;
  p.q_stride = qkv.stride;
  p.dout = dout.data;
  p.dout_stride = dout.stride;
  p.delta = delta;
  p.C = qkv.cols / 3;
  p.scale = 1 / std::sqrt(static_cast<float>(call.HS));
  if (qkv.dtype == Dtype::kBF16) {
    run_backward<bf16>(p, stream);
  } else {
    run_backward<float>(p, stream);
  }
}

}  // namespace dn::cuda
