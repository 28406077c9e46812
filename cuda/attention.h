// Attention on the device. A call's sequences are cut into tiles of kQueryTile query rows, and for the
// backward pass into tiles of as many keys; the lists are made on the host and travel with the call
// (backend_attention.cu). Kernels for bf16 and head sizes that tensor cores take are in attention.cu and
// attention_backward.cu, for everything else in attention_any.cu.
#pragma once

#include <cstdint>

#include "core/attention_mask.h"
#include "core/tensor.h"
#include "cuda/live.h"
#include "cuda/runtime.h"

namespace dn::cuda {

constexpr int kQueryTile = 64;
constexpr int kKeyTile = 64;
constexpr int kLargestAnyHead = 256;

// A sequence as kernels see it; all pointers are device memory.
struct AttentionItem {
  int64_t q_begin = 0;
  int64_t q_end = 0;
  int64_t kv_begin = 0;     // first row of its keys in the call's k and v
  const void* k = nullptr;  // or in a cache of its own: row 0, rows of cache_stride elements
  const void* v = nullptr;
  int32_t k_len = 0;
  int32_t first_tile = 0;  // its first entry in the list of query tiles
  AttentionMask mask;
};

// Rows [first, first + kQueryTile) of a sequence, counted from its beginning.
struct AttentionTile {
  int32_t item = 0;
  int32_t first = 0;
};

// The keys that some query may see: two ranges, the first one before the second, either may be empty.
struct Spans {
  int32_t begin0, end0, begin1, end1;
};

struct AttentionCall {
  const AttentionItem* items = nullptr;
  const AttentionTile* query_tiles = nullptr;
  const AttentionTile* key_tiles = nullptr;  // backward only
  const int32_t* positions = nullptr;        // per query row
  Spans* tile_spans = nullptr;               // per query tile, scratch
  const void* k = nullptr;                   // packed keys and values, rows of kv_stride elements
  const void* v = nullptr;
  int64_t kv_stride = 0;
  int64_t cache_stride = 0;  // of sequences with a cache
  bool spans_known = false;  // they are still there from a call with the same plan
  int64_t query_tile_count = 0;
  int64_t key_tile_count = 0;
  int64_t query_rows = 0;
  int32_t NH = 0;
  int32_t HS = 0;
  LiveRows live;  // of the query rows; forward only
};

// True when the tensor-core kernels can do it: bf16, whole 16-byte chunks per head, aligned rows.
bool attention_on_tensor_cores(const AttentionCall& call, Dtype dtype, int64_t q_stride, int64_t kv_stride);

// Tensors as in Backend::attention_forward; `lse` may be null.
void attention_forward(const AttentionCall& call, Tensor out, Tensor lse, Tensor q, bool tensor_cores,
                       Stream stream);
// delta: scratch, (rows, NH) fp32.
void attention_backward(const AttentionCall& call, Tensor dqkv, Tensor dout, Tensor qkv, Tensor out,
                        Tensor lse, float* delta, bool tensor_cores, Stream stream);

// attention_any.cu: any head size up to kLargestAnyHead, fp32 or bf16.
void attention_forward_any(const AttentionCall& call, Tensor out, Tensor lse, Tensor q, Stream stream);
void attention_backward_any(const AttentionCall& call, Tensor dqkv, Tensor dout, Tensor qkv, Tensor lse,
                            const float* delta, Stream stream);
// attention_backward.cu
void attention_backward_tensor_cores(const AttentionCall& call, Tensor dqkv, Tensor dout, Tensor qkv,
                                     Tensor lse, const float* delta, Stream stream);

}  // namespace dn::cuda
