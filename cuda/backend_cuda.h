// CudaBackend: one device, one stream. Activations are bf16 (or fp32, for checking), parameters fp32 with a
// bf16 copy beside them that products read ("shadow"): made when a matrix is first multiplied by, rewritten
// by the optimiser, and marked stale by everything else that writes to the buffer. Packed weights are laid
// out like plain ones.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "core/backend.h"
#include "cuda/attention.h"
#include "cuda/cublaslt.h"
#include "cuda/head.h"
#include "cuda/live.h"
#include "cuda/rows.h"
#include "cuda/runtime.h"

namespace dn::cuda {

// What lives as long as any memory of the device: buffers may outlive the backend. A buffer's owner may be a
// garbage collector's thread, so memory is only listed as released there, and freed by the next call that
// uses the device.
class DeviceState {
 public:
  explicit DeviceState(int device);
  ~DeviceState();
  DeviceState(const DeviceState&) = delete;
  DeviceState& operator=(const DeviceState&) = delete;

  // Makes the device current and frees what was released.
  void use();
  void* alloc(size_t bytes, const std::string& what);
  void release(void* p);

  // A buffer of the interface, and the bf16 copy of its numbers when it has one.
  void add_buffer(void* p, size_t bytes);
  void remove_buffer(void* p);
  // The buffer that holds `p` was written to.
  void touch(const void* p);
  // The bf16 copy of the numbers at p, fresh; p must lie in a buffer.
  void* shadow(const void* p);
  // The same if there is a fresh one, else null.
  void* fresh_shadow(const void* p);

  Stream stream() const { return stream_; }
  int device() const { return device_; }

 private:
  struct Piece {
    size_t bytes = 0;
    void* shadow = nullptr;
    bool fresh = false;
  };
  std::map<const char*, Piece>::iterator find(const void* p);

  int device_;
  Stream stream_ = nullptr;
  std::mutex mutex_;
  std::vector<void*> released_;
  std::map<const char*, Piece> pieces_;
};

// Device memory of the backend itself: grows, never shrinks.
class Scratch {
 public:
  explicit Scratch(DeviceState* state, const char* what) : state_(state), what_(what) {}
  ~Scratch() {
    if (data_) state_->release(data_);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void* reserve(size_t bytes);
  template <typename T>
  T* take(int64_t n) {
    return static_cast<T*>(reserve(static_cast<size_t>(n) * sizeof(T)));
  }
  // Bytes that reserve(bytes) would take beyond what is held.
  size_t growth(size_t bytes) const { return bytes <= bytes_ ? 0 : with_slack(bytes) - bytes_; }

 private:
  static size_t with_slack(size_t bytes) { return bytes + bytes / 8; }

  DeviceState* state_;
  const char* what_;
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

// Small arrays on their way to the device: a ring of page-locked memory with a twin on the device.
class Staging {
 public:
  explicit Staging(DeviceState* state) : state_(state) {}
  ~Staging();
  Staging(const Staging&) = delete;
  Staging& operator=(const Staging&) = delete;
  // An op begins: what the ops before it sent may be overwritten once they have run.
  void begin_op();
  // Starts copying to `device` (null: to the twin), and returns where it will be: valid for the rest of the
  // op.
  void* send(const void* host, size_t bytes, void* device = nullptr);
  template <typename T>
  const T* list(const T* host, int64_t n) {
    return static_cast<const T*>(send(host, static_cast<size_t>(n) * sizeof(T)));
  }

 private:
  DeviceState* state_;
  char* host_ = nullptr;
  char* twin_ = nullptr;
  size_t bytes_ = 0;
  size_t used_ = 0;
  size_t op_begin_ = 0;         // where the lists of this op begin
  bool wrapped_ = false;        // and whether they have gone round the ring
  std::vector<void*> retired_;  // twins of smaller rings that this op may still use
};

class CudaLoop;

class CudaBackend : public Backend {
 public:
  CudaBackend(int device, const Device& properties, Dtype activations);
  ~CudaBackend() override;

  std::string name() const override { return name_; }
  Dtype activation_dtype() const override { return dtype_; }
  std::unique_ptr<Buffer> alloc(size_t bytes) override;
  size_t free_bytes() override;
  size_t step_bytes(const StepShape& shape) const override;  // memory.cu
  size_t parameter_bytes(size_t bytes) const override { return dtype_ == Dtype::kBF16 ? bytes / 2 : 0; }
  void upload(void* dst, const void* host, size_t bytes) override;
  void download(void* host, const void* src, size_t bytes) override;
  void zero(void* dst, size_t bytes) override;
  void copy(Tensor dst, Tensor src) override;
  void synchronize() override;

  int64_t packed_elements(int64_t K, int64_t N, Dtype) const override { return K * N; }
  void pack_weight(void* packed, const Weight& plain, Dtype to) override;
  void unpack_weight(void* plain, const Weight& packed) override;

  void embedding_forward(Tensor out, const int32_t* ids, const int32_t* positions, const Weight& wte,
                         Tensor wpe) override;
  void embedding_backward(Tensor dwte, Tensor dwpe, Tensor dout, const int32_t* ids,
                          const int32_t* positions) override;
  void layernorm_forward(Tensor out, Tensor mean, Tensor rstd, Tensor inp, Tensor weight,
                         Tensor bias) override;
  void layernorm_backward(Tensor dinp, Tensor dweight, Tensor dbias, Tensor dout, Tensor inp, Tensor weight,
                          Tensor mean, Tensor rstd) override;
  void matmul_forward(Tensor out, Tensor inp, const Weight& w, Tensor bias, Epilogue epilogue, Tensor extra,
                      MatmulPrecision precision) override;
  void matmul_backward(Tensor dinp, Tensor dweight, Tensor dbias, Tensor dout, Tensor inp, const Weight& w,
                       MatmulPrecision precision, Store store) override;
  void gelu_backward(Tensor dinp, Tensor dout, Tensor inp) override;

  // backend_attention.cu
  size_t kv_cache_bytes(int64_t capacity, int64_t C) const override {
    return 2 * static_cast<size_t>(capacity * C) * dtype_bytes(dtype_);
  }
  void kv_cache_write(void* cache, int64_t position, Tensor kv, int64_t NH) override;
  void attention_forward(Tensor out, Tensor lse, Tensor q, Tensor kv, const AttentionSequence* sequences,
                         int64_t S, const int32_t* query_positions, int64_t NH) override;
  void attention_backward(Tensor dqkv, Tensor dout, Tensor qkv, Tensor out, Tensor lse,
                          const AttentionSequence* sequences, int64_t S, const int32_t* query_positions,
                          int64_t NH) override;

  // backend_head.cu
  void head_logits(Tensor logits, Tensor hidden, const int64_t* rows, int64_t R, const Weight& wte) override;
  void head_denoise(DenoiseStats* stats, float* watched, Tensor hidden, const DenoiseRow* rows, int64_t R,
                    const int32_t* watch, int64_t watch_count, const Weight& wte) override;
  // head_denoise for loops that stay on the device. Rows, results and, when given, how many of the R rows
  // there are lie in device memory; nothing is checked and nothing waits. No row may have a guide or a
  // filter; hidden must be what the fused head takes: bf16, C a multiple of 8. Memory: step_bytes with this
  // R.
  void head_denoise_listed(DenoiseResult* results, Tensor hidden, const DenoiseRow* rows, int64_t R,
                           const int32_t* count, const Weight& wte);
  void head_cross_entropy(float* losses, Tensor dhidden, Tensor dwte, Tensor hidden, const int64_t* rows,
                          const int32_t* targets, const float* weights, int64_t R, const Weight& wte,
                          MatmulPrecision precision, Store store) override;

  void adamw(void* params, const void* gradients, void* m, void* v, int64_t n,
             const AdamWStep& step) override;
  double sum_of_squares(const void* gradients, int64_t n) override;

  DeviceLoop* device_loop() override;

 private:
  friend class CudaLoop;
  // Every op begins here: the device is made current, and what waits (the optimiser's segments, small copies)
  // is sent off.
  Stream begin();
  void flush_adamw();
  void flush_copies();
  void check(const char* op, const char* name, const Tensor& t, int64_t rows, int64_t cols,
             Dtype dtype) const;
  // The weight's numbers in the activations' type.
  Operand operand(const Weight& w);
  void multiply(const struct Product& product);
  AttentionCall plan_attention(const char* op, const AttentionSequence* sequences, int64_t S, int64_t rows,
                               const int32_t* query_positions, int64_t NH, int64_t C, bool backward);
  // Rows of logits that are held at once: bounded, and at most a thirty-second of the device's memory.
  int64_t head_chunk_rows(int64_t V, bool training) const;
  // The fused head on these matrices, without rows; without wte where it cannot run.
  FusedDenoiseCall fused_call(Tensor hidden, const Weight& wte);
  void run_fused(FusedDenoiseCall call);
  // Results and watched probabilities, on the device, of rows whose logits are needed.
  void denoise_chunks(DenoiseResult* results, float* watched, Tensor hidden, const DenoiseRow* rows,
                      int64_t R, const int32_t* device_watch, int64_t watch_count, const Weight& wte);
  // Rows of the head's input, gathered: (R, C).
  Tensor gather_hidden(const char* op, Tensor hidden, const int64_t* rows, int64_t R);
  void add_embedding_gradient(Tensor dtable, Tensor dout, const int32_t* rows, const char* what);

  std::shared_ptr<DeviceState> state_;
  Dtype dtype_;
  std::string name_;
  size_t device_memory_;
  int multiprocessors_;
  std::unique_ptr<CublasLt> library_;
  Staging staging_;
  // One piece of scratch per purpose: an op's intermediate results never share memory with what it reads.
  Scratch partial_, delta_, spans_, plan_, logits_, hidden_rows_, gradient_rows_, results_, tile_mass_,
      head_parts_, doubles_;
  std::vector<char> plan_bytes_;  // what plan_ holds
  Spans* tile_spans_ = nullptr;   // of that plan
  // Small copies that wait for the next op, and what they touch, as one range of bytes each.
  std::vector<CopySegment> copies_;
  const char *copies_dst_begin_ = nullptr, *copies_dst_end_ = nullptr;
  const char *copies_src_begin_ = nullptr, *copies_src_end_ = nullptr;
  std::vector<AdamWSegment> segments_;
  AdamWConstants adamw_constants_;
  // The denoising loop (backend_loop.cu) and what it changes for the ops of its steps: how many of their rows
  // count, and that they are recorded.
  Scratch loop_memory_;
  LiveRows live_;
  bool capturing_ = false;
  std::unique_ptr<CudaLoop> loop_;
};

}  // namespace dn::cuda
