// GELU, copies of listed rows, rounding to bf16, column sums, and the end of a product that a library
// computed.

#include "cuda/epilogue.cuh"
#include "cuda/rows.h"

namespace dn::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kRowsPerChunk = 256;  // rows summed before they join the total

struct ElementParams {
  void* out;
  const void* inp;
  const void* dout;
  int64_t out_stride, inp_stride, dout_stride, rows, cols;
};

// Element (row, col) of thread and block; false beyond the end. A thread takes kVector neighbours.
template <int kVector>
DN_DEVICE bool element_of(int64_t rows, int64_t cols, int64_t* row, int64_t* col) {
  const int64_t index = (static_cast<int64_t>(block_x()) * kThreads + thread_index()) * kVector;
  if (index >= rows * cols) return false;
  *row = index / cols;
  *col = index % cols;
  return true;
}

template <typename T, int kVector>
DN_KERNEL(kThreads)
gelu_backward_kernel(ElementParams p) {
  int64_t row, col;
  if (!element_of<kVector>(p.rows, p.cols, &row, &col)) return;
  float x[kVector], dy[kVector];
  load_vector(x, static_cast<const T*>(p.inp) + row * p.inp_stride + col);
  load_vector(dy, static_cast<const T*>(p.dout) + row * p.dout_stride + col);
  DN_UNROLL
  for (int i = 0; i < kVector; ++i) dy[i] *= gelu_derivative(x[i]);
  store_vector(static_cast<T*>(p.out) + row * p.out_stride + col, dy);
}

struct RowListParams {
  void* dst;
  const void* src;
  const int64_t* rows;
  int64_t dst_stride, src_stride, count, cols;
  bool scatter;
  LiveRows live;
};

template <typename T>
DN_KERNEL(kThreads)
copy_rows_kernel(RowListParams p) {
  const int64_t r = block_x();
  if (beyond(p.live, r)) return;
  // The mistake: one row late, as a list that begins at 1 would be.
  const int64_t listed = p.rows[DN_PLANTED(6) && r + 1 < p.count ? r + 1 : r];
  const T* const src = static_cast<const T*>(p.src) + (p.scatter ? r : listed) * p.src_stride;
  T* const dst = static_cast<T*>(p.dst) + (p.scatter ? listed : r) * p.dst_stride;
  for (int64_t c = thread_index(); c < p.cols; c += kThreads) dst[c] = src[c];
}

void copy_rows(Tensor dst, Tensor src, const int64_t* rows, bool scatter, Stream stream, LiveRows live) {
  RowListParams p{dst.data, src.data, rows, dst.stride, src.stride, scatter ? src.rows : dst.rows,
                  dst.cols, scatter,  live};
  const Grid grid{static_cast<unsigned>(p.count)};
  const size_t bytes = dtype_bytes(dst.dtype);
  const auto in_units_of = [&](size_t unit) {
    const auto whole = [&](int64_t elements) { return static_cast<size_t>(elements) * bytes % unit == 0; };
    if (!whole(p.cols) || !whole(p.dst_stride) || !whole(p.src_stride) ||
        reinterpret_cast<uintptr_t>(p.dst) % unit || reinterpret_cast<uintptr_t>(p.src) % unit)
      return false;
    for (int64_t* n : {&p.cols, &p.dst_stride, &p.src_stride})
      *n = static_cast<int64_t>(static_cast<size_t>(*n) * bytes / unit);
    return true;
  };
  if (in_units_of(16)) {
    launch(copy_rows_kernel<Bytes16>, grid, kThreads, 0, stream, p);
  } else if (bytes == 4) {
    launch(copy_rows_kernel<uint32_t>, grid, kThreads, 0, stream, p);
  } else {
    launch(copy_rows_kernel<uint16_t>, grid, kThreads, 0, stream, p);
  }
}

struct SegmentParams {
  const CopySegment* segments;
};
template <typename T>
DN_DEVICE void copy_in_units(const CopySegment& s) {
  const int64_t per_row = static_cast<int64_t>(s.width / sizeof(T)),
                all = per_row * static_cast<int64_t>(s.rows);
  for (int64_t i = thread_index(); i < all; i += kThreads) {
    const int64_t row = i / per_row, col = i % per_row;
    reinterpret_cast<T*>(static_cast<char*>(s.dst) + row * s.dst_pitch)[col] =
        reinterpret_cast<const T*>(static_cast<const char*>(s.src) + row * s.src_pitch)[col];
  }
}
DN_KERNEL(kThreads) copy_segments_kernel(SegmentParams p) {
  const CopySegment s = p.segments[block_x()];
  const size_t all = reinterpret_cast<uintptr_t>(s.dst) | reinterpret_cast<uintptr_t>(s.src) | s.dst_pitch |
                     s.src_pitch | s.width;
  if (all % 16 == 0) {
    copy_in_units<Bytes16>(s);
  } else {
    copy_in_units<uint16_t>(s);
  }
}

struct RoundParams {
  bf16* out;
  const float* inp;
  int64_t n;
};
DN_KERNEL(kThreads) round_to_bf16_kernel(RoundParams p) {
  const int64_t i = (static_cast<int64_t>(block_x()) * kThreads + thread_index()) * 4;
  if (i + 4 <= p.n) {
    float x[4];
    load_vector(x, p.inp + i);
    store_vector(p.out + i, x);
    return;
  }
  for (int64_t j = i; j < p.n; ++j) p.out[j] = to_bf16(p.inp[j]);
}

struct SumParams {
  float* sums;
  const void* x;
  int64_t stride, rows, cols;
};

// partial[chunk] = column sums of kRowsPerChunk rows.
template <typename T>
DN_KERNEL(kThreads)
column_sums_kernel(SumParams p) {
  const int64_t c = static_cast<int64_t>(block_x()) * kThreads + thread_index();
  if (c >= p.cols) return;
  const int64_t first = static_cast<int64_t>(block_y()) * kRowsPerChunk;
  const int64_t end = first + kRowsPerChunk < p.rows ? first + kRowsPerChunk : p.rows;
  float sum = 0;
  for (int64_t row = first; row < end; ++row) sum += to_float(static_cast<const T*>(p.x)[row * p.stride + c]);
  p.sums[static_cast<int64_t>(block_y()) * p.cols + c] = sum;
}

DN_KERNEL(kThreads) add_partial_rows_kernel(SumParams p) {
  const int64_t c = static_cast<int64_t>(block_x()) * kThreads + thread_index();
  if (c >= p.cols) return;
  float sum = p.sums[c];
  for (int64_t row = 0; row < p.rows; ++row) sum += static_cast<const float*>(p.x)[row * p.stride + c];
  p.sums[c] = sum;
}

template <typename T>
struct FinishParams {
  EpilogueParams<T> epilogue;
  int64_t M, N;
};
template <typename T>
DN_KERNEL(kThreads)
finish_product_kernel(FinishParams<T> p) {
  int64_t row, col;
  if (!element_of<1>(p.M, p.N, &row, &col)) return;
  store_element(p.epilogue, to_float(p.epilogue.c[row * p.epilogue.c_stride + col]), row, col);
}

template <typename T>
void run_finish(const Product& product, bool add_bias, Stream stream) {
  FinishParams<T> p{epilogue_of<T>(product), product.M, product.N};
  p.epilogue.accumulate = false;
  if (!add_bias) p.epilogue.bias = nullptr;
  if (p.epilogue.kind == Epilogue::kResidual) p.epilogue.kind = Epilogue::kNone;  // already added
  launch(finish_product_kernel<T>, Grid{blocks_of(p.M * p.N, kThreads)}, kThreads, 0, stream, p);
}

bool in_fours(const Tensor& t) { return t.cols % 4 == 0 && t.stride % 4 == 0; }

}  // namespace

void gelu_backward(Tensor dinp, Tensor dout, Tensor inp, Stream stream) {
  const ElementParams p{dinp.data,  inp.data,    dout.data, dinp.stride,
                        inp.stride, dout.stride, inp.rows,  inp.cols};
  const bool fours = in_fours(dinp) && in_fours(inp) && in_fours(dout);
  const Grid grid{blocks_of(p.rows * p.cols, kThreads * (fours ? 4 : 1))};
  if (inp.dtype == Dtype::kBF16) {
    launch(fours ? gelu_backward_kernel<bf16, 4> : gelu_backward_kernel<bf16, 1>, grid, kThreads, 0, stream,
           p);
  } else {
    launch(fours ? gelu_backward_kernel<float, 4> : gelu_backward_kernel<float, 1>, grid, kThreads, 0, stream,
           p);
  }
}

void gather_rows(Tensor dst, Tensor src, const int64_t* rows, Stream stream, LiveRows live) {
  copy_rows(dst, src, rows, false, stream, live);
}
void scatter_rows(Tensor dst, Tensor src, const int64_t* rows, Stream stream) {
  copy_rows(dst, src, rows, true, stream, {});
}

void copy_segments(const CopySegment* segments, int64_t count, Stream stream) {
  launch(copy_segments_kernel, Grid{static_cast<unsigned>(count)}, kThreads, 0, stream,
         SegmentParams{segments});
}

void round_to_bf16(void* out, const float* inp, int64_t n, Stream stream) {
  launch(round_to_bf16_kernel, Grid{blocks_of(n, kThreads * 4)}, kThreads, 0, stream,
         RoundParams{static_cast<bf16*>(out), inp, n});
}

int64_t column_partial_rows(int64_t rows) { return blocks_of(rows, kRowsPerChunk); }

void add_column_sums(float* sums, Tensor x, float* partial, Stream stream) {
  const SumParams p{partial, x.data, x.stride, x.rows, x.cols};
  const Grid grid{blocks_of(x.cols, kThreads), blocks_of(x.rows, kRowsPerChunk)};
  if (x.dtype == Dtype::kBF16) {
    launch(column_sums_kernel<bf16>, grid, kThreads, 0, stream, p);
  } else {
    launch(column_sums_kernel<float>, grid, kThreads, 0, stream, p);
  }
  add_partial_rows(sums, partial, column_partial_rows(x.rows), x.cols, x.cols, stream);
}

void add_partial_rows(float* sums, const float* partial, int64_t rows, int64_t cols, int64_t stride,
                      Stream stream) {
  launch(add_partial_rows_kernel, Grid{blocks_of(cols, kThreads)}, kThreads, 0, stream,
         SumParams{sums, partial, stride, rows, cols});
}

void finish_product(const Product& product, bool add_bias, Stream stream) {
  product.output == Dtype::kBF16 ? run_finish<bf16>(product, add_bias, stream)
                                 : run_finish<float>(product, add_bias, stream);
}

}  // namespace dn::cuda
