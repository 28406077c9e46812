// Everything on the device that works row by row or element by element. Tensors are checked by the backend.
#pragma once

#include <cstdint>

#include "core/backend.h"
#include "cuda/live.h"
#include "cuda/runtime.h"

namespace dn::cuda {

// layernorm.cu
void layernorm_forward(Tensor out, float* mean, float* rstd, Tensor inp, const float* weight,
                       const float* bias, Stream stream, LiveRows live = {});
// partial: scratch, layernorm_partial_rows(N) rows of 2 C floats.
int64_t layernorm_partial_rows(int64_t N);
void layernorm_backward(Tensor dinp, float* dweight, float* dbias, Tensor dout, Tensor inp,
                        const float* weight, const float* mean, const float* rstd, float* partial,
                        Stream stream);

// rows.cu
void gelu_backward(Tensor dinp, Tensor dout, Tensor inp, Stream stream);
// dst (rows listed) = src[rows[r]], any strides, same dtype; and back: dst[rows[r]] = src.
void gather_rows(Tensor dst, Tensor src, const int64_t* rows, Stream stream, LiveRows live = {});
void scatter_rows(Tensor dst, Tensor src, const int64_t* rows, Stream stream);
// Many small copies in one launch. Widths and pitches are bytes; no copy may read or write what another one
// writes.
struct CopySegment {
  void* dst = nullptr;
  const void* src = nullptr;
  size_t dst_pitch = 0, src_pitch = 0;
  size_t width = 0, rows = 0;
};
void copy_segments(const CopySegment* segments, int64_t count, Stream stream);
// out (n) bf16 = inp (n) fp32.
void round_to_bf16(void* out, const float* inp, int64_t n, Stream stream);
// sums (cols) += column sums of x. partial: scratch, column_partial_rows(rows) rows of cols floats.
int64_t column_partial_rows(int64_t rows);
void add_column_sums(float* sums, Tensor x, float* partial, Stream stream);
// sums (cols) += the rows of partial, in order.
void add_partial_rows(float* sums, const float* partial, int64_t rows, int64_t cols, int64_t stride,
                      Stream stream);

// embedding.cu
void embedding_forward(Tensor out, const int32_t* ids, const int32_t* positions, const float* wte, Tensor wpe,
                       Stream stream, LiveRows live = {});
constexpr int32_t kRunPiece = 256;  // entries of a piece, added one after the other by one thread
// A run of `order` entries that add into one row of the table. Long runs are cut into pieces, each with a row
// of scratch.
struct EmbeddingRun {
  int32_t row = 0;    // of the table
  int32_t begin = 0;  // first entry of `order`
  int32_t end = 0;
  int32_t partial = -1;  // row of scratch that receives the sum; -1: added to the table directly
};
// Rows of scratch that add up, in order, to a row of the table.
struct EmbeddingSum {
  int32_t row = 0;
  int32_t begin = 0;
  int32_t end = 0;
};
void embedding_backward(Tensor dtable, Tensor dout, const int32_t* order, const EmbeddingRun* runs,
                        int64_t run_count, const EmbeddingSum* sums, int64_t sum_count, float* partial,
                        Stream stream);

// adamw.cu
struct AdamWSegment {
  float* params = nullptr;
  const float* gradients = nullptr;
  float* m = nullptr;
  float* v = nullptr;
  void* shadow = nullptr;  // bf16 copy of the parameters, may be null
  int64_t n = 0;
  int64_t first_block = 0;  // of the launch
  float decay = 1;          // 1 - learning_rate * weight_decay
};
struct AdamWConstants {
  float step_size = 0;  // learning_rate / (1 - beta1^step)
  float v_scale = 0;    // 1 / (1 - beta2^step)
  float beta1 = 0, beta2 = 0, eps = 0, gradient_scale = 1;
};
// Blocks of a segment of n elements.
int64_t adamw_blocks(int64_t n);
void adamw(const AdamWSegment* segments, int64_t count, int64_t blocks, const AdamWConstants& constants,
           Stream stream);
// sum (one double on the device) = sum of squares of n floats. partial: scratch, square_partials(n) doubles.
int64_t square_partials(int64_t n);
void sum_of_squares(double* sum, const float* x, int64_t n, double* partial, Stream stream);

}  // namespace dn::cuda
