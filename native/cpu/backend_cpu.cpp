// CpuBackend: memory from Pages; every op forwards to the family that implements
// it (ops.h).

#include <algorithm>
#include <cstring>

#include "core/backend.h"
#include "core/error.h"
#include "core/pages.h"
#include "cpu/gemm_int8.h"
#include "cpu/isa.h"
#include "cpu/kv_cache.h"
#include "cpu/ops.h"
#include "cpu/thread_pool.h"

namespace dn {
namespace {

class CpuBuffer : public Buffer {
 public:
  explicit CpuBuffer(size_t bytes) : pages_(bytes) {}
  void* data() const override { return pages_.data(); }
  size_t bytes() const override { return pages_.bytes(); }

 private:
  Pages pages_;
};

class CpuBackend : public Backend {
 public:
  explicit CpuBackend(int threads) {
    const int available = cpu::available_threads();
    cpu_.threads = std::min(threads > 0 ? threads : available, cpu::kMaxThreads);
    cpu_.isa = cpu::active_isa();
  }

  std::string name() const override { return std::string("cpu/") + cpu::isa_name(cpu_.isa); }
  Dtype activation_dtype() const override { return Dtype::kF32; }
  bool host_memory() const override { return true; }
  std::unique_ptr<Buffer> alloc(size_t bytes) override { return std::make_unique<CpuBuffer>(bytes); }
  void upload(void* dst, const void* host, size_t bytes) override { std::memcpy(dst, host, bytes); }
  void download(void* host, const void* src, size_t bytes) override { std::memcpy(host, src, bytes); }
  void zero(void* dst, size_t bytes) override { cpu::zero(cpu_, dst, bytes); }
  void copy(Tensor dst, Tensor src) override {
    for (int64_t r = 0; r < src.rows; ++r)
      std::memcpy(dst.f32(r), src.f32(r), static_cast<size_t>(src.cols) * sizeof(float));
  }
  void synchronize() override {}

  int64_t packed_elements(int64_t K, int64_t N, Dtype to) const override {
    return cpu::packed_elements(K, N, to);
  }
  void pack_weight(void* packed, const Weight& plain, Dtype to) override {
    cpu::pack_weight(cpu_, packed, plain, to);
  }
  void pack_rows(void* packed, const Weight& whole, const float* rows, int64_t begin, int64_t count,
                 Dtype to) override {
    cpu::pack_rows(cpu_, packed, whole, rows, begin, count, to);
  }
  void unpack_weight(void* plain, const Weight& packed) override {
    cpu::unpack_weight(cpu_, static_cast<float*>(plain), packed);
  }
  size_t int8_bytes(int64_t K, int64_t N) const override {
    return static_cast<size_t>(cpu::int8_bytes(K, N));
  }
  void pack_int8(void* packed, const Int8Matrix& plain, int64_t n_begin) override {
    cpu::pack_int8(cpu_, packed, plain, n_begin);
  }
  void unpack_int8(const Int8Matrix& plain, const void* packed) override {
    cpu::unpack_int8(cpu_, plain, packed);
  }

  void embedding_forward(Tensor out, const int32_t* ids, const int32_t* positions, const Weight& wte,
                         Tensor wpe) override {
    cpu::embedding_forward(cpu_, out, ids, positions, wte, wpe);
  }
  void embedding_backward(Tensor dwte, Tensor dwpe, Tensor dout, const int32_t* ids,
                          const int32_t* positions) override {
    cpu::embedding_backward(cpu_, dwte, dwpe, dout, ids, positions);
  }
  void layernorm_forward(Tensor out, Tensor mean, Tensor rstd, Tensor inp, Tensor weight,
                         Tensor bias) override {
    cpu::layernorm_forward(cpu_, out, mean, rstd, inp, weight, bias);
  }
  void layernorm_backward(Tensor dinp, Tensor dweight, Tensor dbias, Tensor dout, Tensor inp, Tensor weight,
                          Tensor mean, Tensor rstd) override {
    cpu::layernorm_backward(cpu_, dinp, dweight, dbias, dout, inp, weight, mean, rstd);
  }
  void matmul_forward(Tensor out, Tensor inp, const Weight& w, Tensor bias, Epilogue epilogue, Tensor extra,
                      MatmulPrecision precision) override {
    cpu::matmul_forward(cpu_, out, inp, w, bias, epilogue, extra, precision);
  }
  void matmul_backward(Tensor dinp, Tensor dweight, Tensor dbias, Tensor dout, Tensor inp, const Weight& w,
                       MatmulPrecision precision, Store store) override {
    cpu::matmul_backward(cpu_, dinp, dweight, dbias, dout, inp, w, precision, store);
  }
  void gelu_backward(Tensor dinp, Tensor dout, Tensor inp) override {
    cpu::gelu_backward(cpu_, dinp, dout, inp);
  }
  size_t kv_cache_bytes(int64_t capacity, int64_t C) const override {
    return static_cast<size_t>(cpu::kv_cache_floats(capacity, C)) * sizeof(float);
  }
  void kv_cache_write(void* cache, int64_t position, Tensor kv, int64_t NH) override {
    cpu::kv_cache_write(cpu_, static_cast<float*>(cache), position, kv, NH);
  }
  void attention_forward(Tensor out, Tensor lse, Tensor q, Tensor kv, const AttentionSequence* sequences,
                         int64_t S, const int32_t* query_positions, int64_t NH) override {
    cpu::attention_forward(cpu_, out, lse, q, kv, sequences, S, query_positions, NH);
  }
  void attention_backward(Tensor dqkv, Tensor dout, Tensor qkv, Tensor out, Tensor lse,
                          const AttentionSequence* sequences, int64_t S, const int32_t* query_positions,
                          int64_t NH) override {
    cpu::attention_backward(cpu_, dqkv, dout, qkv, out, lse, sequences, S, query_positions, NH);
  }
  void head_logits(Tensor logits, Tensor hidden, const int64_t* rows, int64_t R, const Weight& wte) override {
    cpu::head_logits(cpu_, logits, hidden, rows, R, wte);
  }
  void head_denoise(DenoiseStats* stats, float* watched, Tensor hidden, const DenoiseRow* rows, int64_t R,
                    const int32_t* watch, int64_t watch_count, const Weight& wte) override {
    cpu::head_denoise(cpu_, stats, watched, hidden, rows, R, watch, watch_count, wte);
  }
  void head_cross_entropy(float* losses, Tensor dhidden, Tensor dwte, Tensor hidden, const int64_t* rows,
                          const int32_t* targets, const float* weights, int64_t R, const Weight& wte,
                          MatmulPrecision precision, Store store) override {
    cpu::head_cross_entropy(cpu_, losses, dhidden, dwte, hidden, rows, targets, weights, R, wte, precision,
                            store);
  }
  void adamw(void* params, const void* gradients, void* m, void* v, int64_t n,
             const AdamWStep& step) override {
    cpu::adamw(cpu_, static_cast<float*>(params), static_cast<const float*>(gradients),
               static_cast<float*>(m), static_cast<float*>(v), n, step);
  }
  double sum_of_squares(const void* gradients, int64_t n) override {
    return cpu::sum_of_squares(cpu_, static_cast<const float*>(gradients), n);
  }

 private:
  cpu::Cpu cpu_;
};

}  // namespace

std::unique_ptr<Backend> make_cpu_backend(int threads) { return std::make_unique<CpuBackend>(threads); }

}  // namespace dn
