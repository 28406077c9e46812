// A tensor view: never owns, cheap to copy. Rows are contiguous unless `stride` says otherwise.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace dn {

enum class Dtype : uint8_t { kF32, kF16, kBF16, kI8, kI32 };

inline size_t dtype_bytes(Dtype dtype) {
  switch (dtype) {
    case Dtype::kF32:
    case Dtype::kI32: return 4;
    case Dtype::kF16:
    case Dtype::kBF16: return 2;
    case Dtype::kI8: return 1;
  }
  return 0;
}

// A (rows, cols) matrix: activations, gradients, saved statistics. stride: elements between rows (q inside
// qkv has stride 3C). `data` points into memory of the backend that made it; only that backend reads or
// writes elements.
struct Tensor {
  void* data = nullptr;
  Dtype dtype = Dtype::kF32;
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t stride = 0;

  Tensor() = default;
  Tensor(void* d, Dtype t, int64_t r, int64_t c) : data(d), dtype(t), rows(r), cols(c), stride(c) {}
  Tensor(void* d, Dtype t, int64_t r, int64_t c, int64_t s)
      : data(d), dtype(t), rows(r), cols(c), stride(s) {}

  explicit operator bool() const { return data != nullptr; }
  // CPU only: row r as fp32.
  float* f32(int64_t r = 0) const { return static_cast<float*>(data) + r * stride; }
  // The columns [begin, begin + count) of every row.
  Tensor columns(int64_t begin, int64_t count) const {
    return Tensor(static_cast<char*>(data) + begin * static_cast<int64_t>(dtype_bytes(dtype)), dtype, rows,
                  count, stride);
  }
  // The rows [begin, begin + count).
  Tensor slice(int64_t begin, int64_t count) const {
    return Tensor(static_cast<char*>(data) + begin * stride * static_cast<int64_t>(dtype_bytes(dtype)), dtype,
                  count, cols, stride);
  }
  std::string shape() const { return "(" + std::to_string(rows) + ", " + std::to_string(cols) + ")"; }
};

// How a matrix parameter is stored. Products always read y (M, N) = x (M, K) * W.
enum class WeightOrder : uint8_t {
  kInOut,  // (K, N) row-major: Hugging Face's Conv1D
  kOutIn,  // (N, K) row-major: the embedding used as output head
};

// A matrix parameter as products see it. Plain, it is `data` in `order`; packed for inference, `data` holds
// them, or with a narrower dtype what they were rounded to, in the backend's own layout and form
// (Backend::pack_weight, pack_int8), with as many elements or a few more.
struct Weight {
  const void* data = nullptr;
  Dtype dtype = Dtype::kF32;
  WeightOrder order = WeightOrder::kInOut;
  bool packed = false;
  int64_t K = 0;
  int64_t N = 0;
  // Columns lie in so many equal parts, of which whoever reads the result takes the same share of each: a
  // head's queries, keys and values. A hint, which changes no result.
  int64_t column_parts = 1;

  std::string shape() const { return "(" + std::to_string(K) + ", " + std::to_string(N) + ")"; }
};

}  // namespace dn
