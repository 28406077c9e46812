// The CPU ops, one family a source file; backend_cpu.cpp only forwards to them. Shapes and meaning:
// core/backend.h. `Cpu` says how many threads and which instruction set an op may use; every op exists for
// every instruction set.
#pragma once

#include <cstdint>
#include <memory>

#include "core/backend.h"
#include "cpu/isa.h"

namespace dn::cpu {

struct Cpu {
  int threads = 1;
  Isa isa = Isa::kPortable;
};

// packed_weight.cpp
// Throws Error(kArgument), beginning with `op`, unless w is fp32 or, where it may be packed, a packed
// narrower weight.
void check_weight(const char* op, const Weight& w, bool may_be_packed);
int64_t packed_elements(int64_t K, int64_t N, Dtype to = Dtype::kF32);
void pack_weight(const Cpu& cpu, void* packed, const Weight& plain, Dtype to = Dtype::kF32);
void pack_rows(const Cpu& cpu, void* packed, const Weight& whole, const float* rows, int64_t begin,
               int64_t count, Dtype to = Dtype::kF32);
void unpack_weight(const Cpu& cpu, float* plain, const Weight& packed);
// Copies row n of an (N, K) = kOutIn weight (an embedding), plain or packed, to out (K) as fp32.
void weight_row(const Weight& w, int64_t n, float* out);

// matmul.cpp
void matmul_forward(const Cpu& cpu, Tensor out, Tensor inp, const Weight& w, Tensor bias, Epilogue epilogue,
                    Tensor extra, MatmulPrecision precision);
void matmul_backward(const Cpu& cpu, Tensor dinp, Tensor dweight, Tensor dbias, Tensor dout, Tensor inp,
                     const Weight& w, MatmulPrecision precision, Store store = Store::kAdd);

// rows.cpp: everything that works row by row or element by element
void embedding_forward(const Cpu& cpu, Tensor out, const int32_t* ids, const int32_t* positions,
                       const Weight& wte, Tensor wpe);
void embedding_backward(const Cpu& cpu, Tensor dwte, Tensor dwpe, Tensor dout, const int32_t* ids,
                        const int32_t* positions);
void layernorm_forward(const Cpu& cpu, Tensor out, Tensor mean, Tensor rstd, Tensor inp, Tensor weight,
                       Tensor bias);
void layernorm_backward(const Cpu& cpu, Tensor dinp, Tensor dweight, Tensor dbias, Tensor dout, Tensor inp,
                        Tensor weight, Tensor mean, Tensor rstd);
void gelu_backward(const Cpu& cpu, Tensor dinp, Tensor dout, Tensor inp);
void adamw(const Cpu& cpu, float* params, const float* gradients, float* m, float* v, int64_t n,
           const AdamWStep& step);
void zero(const Cpu& cpu, void* dst, size_t bytes);
double sum_of_squares(const Cpu& cpu, const float* gradients, int64_t n);

// attention.cpp
void attention_forward(const Cpu& cpu, Tensor out, Tensor lse, Tensor q, Tensor kv,
                       const AttentionSequence* sequences, int64_t S, const int32_t* query_positions,
                       int64_t NH);
void attention_backward(const Cpu& cpu, Tensor dqkv, Tensor dout, Tensor qkv, Tensor out, Tensor lse,
                        const AttentionSequence* sequences, int64_t S, const int32_t* query_positions,
                        int64_t NH);

// kv_cache.cpp: rows [position, position + kv.rows) of a layer's cache = kv
void kv_cache_write(const Cpu& cpu, float* cache, int64_t position, Tensor kv, int64_t NH);

// head.cpp
void head_logits(const Cpu& cpu, Tensor logits, Tensor hidden, const int64_t* rows, int64_t R,
                 const Weight& wte);
void head_denoise(const Cpu& cpu, DenoiseStats* stats, float* watched, Tensor hidden, const DenoiseRow* rows,
                  int64_t R, const int32_t* watch, int64_t watch_count, const Weight& wte);
void head_cross_entropy(const Cpu& cpu, float* losses, Tensor dhidden, Tensor dwte, Tensor hidden,
                        const int64_t* rows, const int32_t* targets, const float* weights, int64_t R,
                        const Weight& wte, MatmulPrecision precision, Store store = Store::kAdd);

}  // namespace dn::cpu
