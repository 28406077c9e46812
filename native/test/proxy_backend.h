// A backend that passes everything on to another one, counts allocations, can be told to fail one, and can
// deny that its memory is the host's: the model then takes the ways it takes on a GPU.
#pragma once

#include <memory>
#include <string>

#include "core/backend.h"
#include "core/error.h"

namespace dn::test {

struct ProxyControl {
  int allocations = 0;
  int fail_at = -1;  // number of the allocation to fail, counted from now on; -1: none
  bool host_memory = true;
};

class ProxyBackend : public Backend {
 public:
  ProxyBackend(std::unique_ptr<Backend> inner, ProxyControl* control)
      : inner_(std::move(inner)), control_(control) {}

  std::string name() const override { return inner_->name(); }
  Dtype activation_dtype() const override { return inner_->activation_dtype(); }
  bool host_memory() const override { return control_->host_memory; }
  std::unique_ptr<Buffer> alloc(size_t bytes) override {
    ++control_->allocations;
    if (control_->fail_at >= 0 && control_->fail_at-- == 0) throw Error(Code::kOutOfMemory, "told to fail");
    return inner_->alloc(bytes);
  }
  void upload(void* dst, const void* host, size_t bytes) override { inner_->upload(dst, host, bytes); }
  void download(void* host, const void* src, size_t bytes) override { inner_->download(host, src, bytes); }
  void zero(void* dst, size_t bytes) override { inner_->zero(dst, bytes); }
  void copy(Tensor dst, Tensor src) override { inner_->copy(dst, src); }
  void synchronize() override { inner_->synchronize(); }
  int64_t packed_elements(int64_t K, int64_t N, Dtype to) const override {
    return inner_->packed_elements(K, N, to);
  }
  void pack_weight(void* packed, const Weight& plain, Dtype to) override {
    inner_->pack_weight(packed, plain, to);
  }
  void pack_rows(void* packed, const Weight& whole, const float* rows, int64_t begin, int64_t count,
                 Dtype to) override {
    inner_->pack_rows(packed, whole, rows, begin, count, to);
  }
  void unpack_weight(void* plain, const Weight& packed) override { inner_->unpack_weight(plain, packed); }
  void embedding_forward(Tensor out, const int32_t* ids, const int32_t* positions, const Weight& wte,
                         Tensor wpe) override {
    inner_->embedding_forward(out, ids, positions, wte, wpe);
  }
  void embedding_backward(Tensor dwte, Tensor dwpe, Tensor dout, const int32_t* ids,
                          const int32_t* positions) override {
    inner_->embedding_backward(dwte, dwpe, dout, ids, positions);
  }
  void layernorm_forward(Tensor out, Tensor mean, Tensor rstd, Tensor inp, Tensor weight,
                         Tensor bias) override {
    inner_->layernorm_forward(out, mean, rstd, inp, weight, bias);
  }
  void layernorm_backward(Tensor dinp, Tensor dweight, Tensor dbias, Tensor dout, Tensor inp, Tensor weight,
                          Tensor mean, Tensor rstd) override {
    inner_->layernorm_backward(dinp, dweight, dbias, dout, inp, weight, mean, rstd);
  }
  void matmul_forward(Tensor out, Tensor inp, const Weight& w, Tensor bias, Epilogue epilogue, Tensor extra,
                      MatmulPrecision precision) override {
    inner_->matmul_forward(out, inp, w, bias, epilogue, extra, precision);
  }
  void matmul_backward(Tensor dinp, Tensor dweight, Tensor dbias, Tensor dout, Tensor inp, const Weight& w,
                       MatmulPrecision precision, Store store) override {
    inner_->matmul_backward(dinp, dweight, dbias, dout, inp, w, precision, store);
  }
  void gelu_backward(Tensor dinp, Tensor dout, Tensor inp) override {
    inner_->gelu_backward(dinp, dout, inp);
  }
  size_t kv_cache_bytes(int64_t capacity, int64_t C) const override {
    return inner_->kv_cache_bytes(capacity, C);
  }
  void kv_cache_write(void* cache, int64_t position, Tensor kv, int64_t NH) override {
    inner_->kv_cache_write(cache, position, kv, NH);
  }
  void attention_forward(Tensor out, Tensor lse, Tensor q, Tensor kv, const AttentionSequence* sequences,
                         int64_t S, const int32_t* query_positions, int64_t NH) override {
    inner_->attention_forward(out, lse, q, kv, sequences, S, query_positions, NH);
  }
  void attention_backward(Tensor dqkv, Tensor dout, Tensor qkv, Tensor out, Tensor lse,
                          const AttentionSequence* sequences, int64_t S, const int32_t* query_positions,
                          int64_t NH) override {
    inner_->attention_backward(dqkv, dout, qkv, out, lse, sequences, S, query_positions, NH);
  }
  void head_logits(Tensor logits, Tensor hidden, const int64_t* rows, int64_t R, const Weight& wte) override {
    inner_->head_logits(logits, hidden, rows, R, wte);
  }
  void head_denoise(DenoiseStats* stats, float* watched, Tensor hidden, const DenoiseRow* rows, int64_t R,
                    const int32_t* watch, int64_t watch_count, const Weight& wte) override {
    inner_->head_denoise(stats, watched, hidden, rows, R, watch, watch_count, wte);
  }
  void head_cross_entropy(float* losses, Tensor dhidden, Tensor dwte, Tensor hidden, const int64_t* rows,
                          const int32_t* targets, const float* weights, int64_t R, const Weight& wte,
                          MatmulPrecision precision, Store store) override {
    inner_->head_cross_entropy(losses, dhidden, dwte, hidden, rows, targets, weights, R, wte, precision,
                               store);
  }
  void adamw(void* params, const void* gradients, void* m, void* v, int64_t n,
             const AdamWStep& step) override {
    inner_->adamw(params, gradients, m, v, n, step);
  }
  double sum_of_squares(const void* gradients, int64_t n) override {
    return inner_->sum_of_squares(gradients, n);
  }

 private:
  std::unique_ptr<Backend> inner_;
  ProxyControl* control_;
};

}  // namespace dn::test
