// The matmul ops: checks of shapes, and the translation of weights and epilogues into products of the engine
// (gemm.h).

#include <algorithm>

#include "core/error.h"
#include "cpu/gemm.h"
#include "cpu/gemm_int8.h"
#include "cpu/ops.h"
#include "cpu/thread_pool.h"

namespace dn::cpu {
namespace {

constexpr int64_t kSumRows = 64;  // rows whose columns a task of dbias sums

[[noreturn]] void refuse(const char* op, const std::string& what) {
  throw Error(Code::kArgument, std::string(op) + ": " + what);
}

void check_tensor(const char* op, const char* name, const Tensor& t, int64_t rows, int64_t cols) {
  if (t.dtype != Dtype::kF32) refuse(op, std::string(name) + " must be fp32 on the CPU");
  if (t.rows != rows || t.cols != cols) {
    refuse(op, std::string(name) + " is " + t.shape() + ", expected (" + std::to_string(rows) + ", " +
                   std::to_string(cols) + ")");
  }
}

// B = w, as the engine reads it.
void set_weight(GemmProduct& p, const Weight& w) {
  p.b = static_cast<const float*>(w.data);
  p.b_layout = w.dtype == Dtype::kBF16          ? GemmLayout::kBf16Panels
               : w.packed                       ? GemmLayout::kPanels
               : w.order == WeightOrder::kInOut ? GemmLayout::kPlain
                                                : GemmLayout::kTransposed;
  p.b_stride = w.order == WeightOrder::kInOut ? w.N : w.K;
  p.N = w.N;
  p.K = w.K;
}

// The product with an fp32 or a packed narrower weight, its columns from n_begin on; n_begin is a multiple
// of kGemmPanel.
void multiply(const Cpu& cpu, GemmProduct p, const Weight& w, int64_t n_begin, MatmulPrecision precision) {
  const int64_t columns = p.N;
  set_weight(p, w);
  p.N = columns;
  if (w.dtype == Dtype::kI8) {
    gemm_int8(cpu, p, static_cast<const char*>(w.data) + int8_bytes(w.K, n_begin));
  } else {
    p.b += w.dtype == Dtype::kBF16 ? n_begin / kGemmPanel * bf16_panel_words(w.K)
                                   : n_begin * w.K;  // panels and rows alike
    if (w.dtype == Dtype::kF32 && w.packed && w.data)
      p.b_pairs = pair_panels(static_cast<const float*>(w.data), w.K, w.N, n_begin);
    gemm(cpu, p, precision);
  }
}

}  // namespace

void matmul_forward(const Cpu& cpu, Tensor out, Tensor inp, const Weight& w, Tensor bias, Epilogue epilogue,
                    Tensor extra, MatmulPrecision precision) {
  const char* const op = "matmul_forward";
  check_weight(op, w, true);
  check_tensor(op, "inp", inp, inp.rows, w.K);
  check_tensor(op, "out", out, inp.rows, w.N);
  if (bias) check_tensor(op, "bias", bias, 1, w.N);
  if (extra && epilogue != Epilogue::kNone) check_tensor(op, "extra", extra, inp.rows, w.N);
  if (epilogue == Epilogue::kResidual && !extra) refuse(op, "the residual is missing");

  GemmProduct p;
  p.c = out.f32();
  p.c_stride = out.stride;
  p.a = inp.f32();
  p.a_stride = inp.stride;
  p.M = inp.rows;
  p.N = w.N;
  if (bias) p.bias = bias.f32();
  p.gelu = epilogue == Epilogue::kGelu;
  if (epilogue == Epilogue::kGelu && extra) p.pre = extra.f32();
  if (epilogue == Epilogue::kResidual) p.residual = extra.f32();
  p.extra_stride = extra.stride;
  p.column_parts = w.column_parts;
  multiply(cpu, p, w, 0, precision);
}

void matmul_backward(const Cpu& cpu, Tensor dinp, Tensor dweight, Tensor dbias, Tensor dout, Tensor inp,
                     const Weight& w, MatmulPrecision precision, Store store) {
  const char* const op = "matmul_backward";
  const int64_t M = dout.rows;
  check_weight(op, w, false);
  check_tensor(op, "dout", dout, M, w.N);
  if (dinp) check_tensor(op, "dinp", dinp, M, w.K);
  if (dinp) {
    GemmProduct p;  // dinp (M, K) = dout (M, N) W^T
    p.c = dinp.f32();
    p.c_stride = dinp.stride;
    p.a = dout.f32();
    p.a_stride = dout.stride;
    set_weight(p, w);
    p.b_layout = w.order == WeightOrder::kInOut ? GemmLayout::kTransposed : GemmLayout::kPlain;
    p.M = M;
    p.N = w.K;
    p.K = w.N;
    gemm(cpu, p, precision);
  }
  if (dweight) {
    check_tensor(op, "inp", inp, M, w.K);
    const bool in_out = w.order == WeightOrder::kInOut;
    check_tensor(op, "dweight", dweight, in_out ? w.K : w.N, in_out ? w.N : w.K);
    const Tensor& rows = in_out ? inp : dout;  // its columns are the rows of dweight
    const Tensor& cols = in_out ? dout : inp;
    gemm_tn(cpu, dweight.f32(), dweight.stride, rows.f32(), rows.stride, cols.f32(), cols.stride, rows.cols,
            cols.cols, M, store == Store::kAdd, precision);
  }
  if (dbias) {
    check_tensor(op, "dbias", dbias, 1, w.N);
    const GemmKernels& kernels = gemm_kernels(cpu.isa);
    const int64_t chunks = (M + kSumRows - 1) / kSumRows;
    float* const sums = gemm_scratch(chunks * w.N);  // of every chunk, added in order afterwards
    std::fill(sums, sums + chunks * w.N, 0.0f);
    parallel(cpu.threads, chunks, [&](int64_t chunk, int) {
      const int64_t m = chunk * kSumRows;
      kernels.column_sums(sums + chunk * w.N, dout.f32(m), dout.stride, std::min(kSumRows, M - m), w.N);
    });
    kernels.column_sums(dbias.f32(), sums, w.N, chunks, w.N);
  }
}

void head_gemm(const Cpu& cpu, float* out, int64_t out_stride, const float* const* inp_rows, int64_t R,
               const Weight& wte, int64_t n_begin, int64_t n_end, MatmulPrecision precision) {
  GemmProduct p;
  p.c = out;
  p.c_stride = out_stride;
  p.a_rows = inp_rows;
  p.M = R;
  p.N = n_end - n_begin;
  multiply(cpu, p, wte, n_begin, precision);  // n_begin is a multiple of kHeadTile
}

}  // namespace dn::cpu
