// The host's part of attention: cutting a call into tiles, and sending the lists when they differ from those
// that are already there (all layers of a batch share one plan).

#include <algorithm>
#include <cstring>

#include "core/error.h"
#include "cuda/backend_cuda.h"

namespace dn::cuda {
namespace {

// Pieces of the plan, one after the other, each aligned to 16 bytes.
class Layout {
 public:
  size_t add(size_t bytes) {
    const size_t at = bytes_;
    bytes_ += (bytes + 15) / 16 * 16;
    return at;
  }
  size_t bytes() const { return bytes_; }

 private:
  size_t bytes_ = 0;
};

template <typename T>
size_t bytes_of(const std::vector<T>& list) {
  return list.size() * sizeof(T);
}

}  // namespace

AttentionCall CudaBackend::plan_attention(const char* op, const AttentionSequence* sequences, int64_t S,
                                          int64_t rows, const int32_t* query_positions, int64_t NH, int64_t C,
                                          bool backward) {
  if (NH < 1 || C % NH != 0)
    throw Error(Code::kArgument, std::string(op) + ": " + std::to_string(C) +
                                     " channels cannot be cut into " + std::to_string(NH) + " heads");
  if (C / NH > kLargestAnyHead)
    throw Error(Code::kArgument, std::string(op) + ": head size " + std::to_string(C / NH) +
                                     ", on CUDA at most " + std::to_string(kLargestAnyHead));
  std::vector<AttentionItem> items;
  std::vector<AttentionTile> query_tiles, key_tiles;
  std::vector<size_t> matrix_places;  // in the plan, per sequence with a matrix
  Layout layout;
  for (int64_t s = 0; s < S; ++s) {
    const AttentionSequence& sequence = sequences[s];
    if (sequence.q_begin < 0 || sequence.q_end < sequence.q_begin || sequence.q_end > rows ||
        sequence.k_len < 0 ||
        (backward && (sequence.cache || sequence.k_len != sequence.q_end - sequence.q_begin ||
                      sequence.kv_begin != sequence.q_begin))) {
      throw Error(Code::kArgument, std::string(op) + ": sequence " + std::to_string(s) + " has query rows [" +
                                       std::to_string(sequence.q_begin) + ", " +
                                       std::to_string(sequence.q_end) + ") of " + std::to_string(rows) +
                                       " and " + std::to_string(sequence.k_len) + " keys from row " +
                                       std::to_string(sequence.kv_begin));
    }
    AttentionItem item;
    std::memset(static_cast<void*>(&item), 0,
                sizeof item);  // the padding is compared with that of the plan before
    item.q_begin = sequence.q_begin;
    item.q_end = sequence.q_end;
    item.kv_begin = sequence.kv_begin;
    // Rows of a cache are [k | v], as in the packed qkv.
    if (sequence.cache) {
      const Tensor cache(const_cast<void*>(sequence.cache), dtype_, sequence.k_len, 2 * C);
      item.k = cache.data;
      item.v = cache.columns(C, C).data;
    }
    item.k_len = static_cast<int32_t>(sequence.k_len);
    item.first_tile = static_cast<int32_t>(query_tiles.size());
    item.mask.kind = sequence.mask.kind;
    item.mask.block = sequence.mask.block;
    item.mask.half = sequence.mask.half;
    item.mask.threshold = sequence.mask.threshold;
    item.mask.step = sequence.mask.step;
    item.mask.seed = sequence.mask.seed;
    item.mask.matrix_width = sequence.mask.matrix_width;
    const int32_t index = static_cast<int32_t>(s);
    for (int64_t first = 0; first < sequence.q_end - sequence.q_begin; first += kQueryTile)
      query_tiles.push_back({index, static_cast<int32_t>(first)});
    for (int64_t first = 0; backward && first < sequence.k_len; first += kKeyTile)
      key_tiles.push_back({index, static_cast<int32_t>(first)});
    if (sequence.mask.kind == MaskKind::kMatrix) {
      const size_t width = static_cast<size_t>(sequence.mask.matrix_width);
      matrix_places.push_back(layout.add(width * width));
    }
    items.push_back(item);
  }
  const size_t items_at = layout.add(bytes_of(items)), query_at = layout.add(bytes_of(query_tiles));
  const size_t key_at = layout.add(bytes_of(key_tiles));
  const size_t positions_at = layout.add(static_cast<size_t>(rows) * sizeof(int32_t));
  char* const plan = static_cast<char*>(plan_.reserve(layout.bytes()));

  std::vector<char> bytes(layout.bytes(), 0);
  size_t matrix = 0;
  for (int64_t s = 0; s < S; ++s) {
    const AttentionMask& mask = sequences[s].mask;
    if (mask.kind != MaskKind::kMatrix) continue;
    const size_t at = matrix_places[matrix++], width = static_cast<size_t>(mask.matrix_width);
    items[static_cast<size_t>(s)].mask.matrix = reinterpret_cast<const uint8_t*>(plan + at);
    std::memcpy(bytes.data() + at, mask.matrix, width * width);
  }
  const auto put = [&](size_t at, const void* list, size_t size) {
    if (size > 0) std::memcpy(bytes.data() + at, list, size);
  };
  put(items_at, items.data(), bytes_of(items));
  put(query_at, query_tiles.data(), bytes_of(query_tiles));
  put(key_at, key_tiles.data(), bytes_of(key_tiles));
  put(positions_at, query_positions, static_cast<size_t>(rows) * sizeof(int32_t));
  // The device's memory may have moved since: its address is part of what is compared.
  const char* const address = plan;
  bytes.insert(bytes.end(), reinterpret_cast<const char*>(&address),
               reinterpret_cast<const char*>(&address + 1));
  const bool known = bytes == plan_bytes_;
  if (!known) {
    plan_bytes_.clear();
    tile_spans_ = nullptr;
    staging_.send(bytes.data(), layout.bytes(), plan);
    plan_bytes_ = std::move(bytes);
  }

  AttentionCall call;
  call.items = reinterpret_cast<const AttentionItem*>(plan + items_at);
  call.query_tiles = reinterpret_cast<const AttentionTile*>(plan + query_at);
  call.key_tiles = reinterpret_cast<const AttentionTile*>(plan + key_at);
  call.positions = reinterpret_cast<const int32_t*>(plan + positions_at);
  call.query_tile_count = static_cast<int64_t>(query_tiles.size());
  call.key_tile_count = static_cast<int64_t>(key_tiles.size());
  Spans* const spans_before = tile_spans_;
  call.tile_spans = tile_spans_ = spans_.take<Spans>(call.query_tile_count);
  call.spans_known = known && tile_spans_ == spans_before;
  call.query_rows = rows;
  call.cache_stride = 2 * C;
  call.NH = static_cast<int32_t>(NH);
  call.HS = static_cast<int32_t>(C / NH);
  return call;
}

void CudaBackend::kv_cache_write(void* cache, int64_t position, Tensor kv, int64_t) {
  copy(Tensor(cache, dtype_, position + kv.rows, kv.cols).slice(position, kv.rows), kv);
}

void CudaBackend::attention_forward(Tensor out, Tensor lse, Tensor q, Tensor kv,
                                    const AttentionSequence* sequences, int64_t S,
                                    const int32_t* query_positions, int64_t NH) {
  const Stream stream = begin();
  const char* const op = "attention_forward";
  const int64_t C = q.cols;
  check(op, "q", q, q.rows, C, dtype_);
  check(op, "out", out, q.rows, C, dtype_);
  if (lse) check(op, "lse", lse, q.rows, NH, Dtype::kF32);
  AttentionCall call = plan_attention(op, sequences, S, q.rows, query_positions, NH, C, false);
  call.k = kv.data;
  call.v = kv.data ? kv.columns(C, C).data : nullptr;
  call.kv_stride = kv.data ? kv.stride : C;
  cuda::attention_forward(call, out, lse, q,
                          attention_on_tensor_cores(call, dtype_, q.stride, call.kv_stride), stream);
}

void CudaBackend::attention_backward(Tensor dqkv, Tensor dout, Tensor qkv, Tensor out, Tensor lse,
                                     const AttentionSequence* sequences, int64_t S,
                                     const int32_t* query_positions, int64_t NH) {
  const Stream stream = begin();
  const char* const op = "attention_backward";
  const int64_t N = out.rows, C = out.cols;
  check(op, "qkv", qkv, N, 3 * C, dtype_);
  check(op, "dqkv", dqkv, N, 3 * C, dtype_);
  check(op, "dout", dout, N, C, dtype_);
  check(op, "out", out, N, C, dtype_);
  check(op, "lse", lse, N, NH, Dtype::kF32);
  AttentionCall call = plan_attention(op, sequences, S, N, query_positions, NH, C, true);
  call.k = qkv.columns(C, C).data;
  call.v = qkv.columns(2 * C, C).data;
  call.kv_stride = qkv.stride;
  const bool tensor_cores =
      attention_on_tensor_cores(call, dtype_, qkv.stride, dout.stride) && dqkv.stride % 8 == 0;
  cuda::attention_backward(call, dqkv, dout, qkv, out, lse, delta_.take<float>(N * NH), tensor_cores, stream);
}

}  // namespace dn::cuda
