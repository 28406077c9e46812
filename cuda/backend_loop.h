// The denoising loop on the device: its state, the graphs of its steps and the way to the kernels in loop.cu.
// A step is captured once per shape (tokens, sequences and rows rounded up) and replayed; what changes from
// step to step and from call to call lies in device memory.
#pragma once

#include <cstdint>
#include <functional>
#include <list>
#include <vector>

#include "core/denoise_loop.h"
#include "cuda/backend_cuda.h"
#include "cuda/loop.h"

namespace dn::cuda {

class CudaLoop : public DeviceLoop {
 public:
  explicit CudaLoop(CudaBackend& backend) : backend_(backend) {}
  ~CudaLoop() override { forget_graphs(); }
  CudaLoop(const CudaLoop&) = delete;
  CudaLoop& operator=(const CudaLoop&) = delete;

  StepShape rounded(const StepShape& shape) const override;
  void begin(const LoopRequest& request, const StepShape& rounded, const void* activations) override;
  void run(int32_t steps, const std::function<void()>& issue) override;
  void finish(LoopLog* log) override;
  void embed(Tensor out, const Weight& wte, Tensor wpe) override;
  void gather(Tensor dst, Tensor src) override;
  void attention(Tensor out, Tensor q, Tensor kv, bool listed, int64_t NH) override;
  void decide(Tensor hidden, const Weight& wte) override;
  void use_graphs(bool on) override { graphs_on_ = on; }

  // Bytes of the loop's own memory for a rounded shape.
  static size_t memory_bytes(const StepShape& rounded);

 private:
  // Where the pieces of that memory begin. What is sent with a call is one range, what comes back another.
  struct Layout {
    explicit Layout(const StepShape& rounded);
    size_t chosen, keys, rows, query_positions, draws, results, scores, order, spans, listed_spans;
    size_t sent, counters, items, windows, all_items, listed_items, tiles, positions, ids, open;
    size_t failures, events, log, bytes;  // failures are sent, and come back with the rest
  };
  // What a captured step depends on.
  struct Key {
    int64_t N = 0, S = 0, R = 0;
    const void *activations = nullptr, *memory = nullptr;
    // Scratch of the head; null: the step does not use it.
    const void *logits = nullptr, *tile_mass = nullptr, *parts = nullptr;
    bool operator==(const Key& o) const {
      return N == o.N && S == o.S && R == o.R && activations == o.activations && memory == o.memory &&
             logits == o.logits && tile_mass == o.tile_mass && parts == o.parts;
    }
  };
  struct Captured {
    Key key;
    Graph graph = nullptr;
    Weight wte;  // lies in the buffer whose bf16 copy the step reads
  };

  template <typename T>
  T* at(size_t offset) const {
    return reinterpret_cast<T*>(memory_ + offset);
  }
  std::vector<char> message(const LoopRequest& request, const Layout& layout) const;
  Captured* find(const Key& key);
  Captured* capture(const Key& key, const std::function<void()>& issue);
  void forget_graphs();
  // decide() for rows whose logits are stored, chunk by chunk.
  void denoise_stored(Tensor hidden, const Weight& wte, bool filtered_only);

  CudaBackend& backend_;
  bool graphs_on_ = true;
  std::list<Captured> graphs_;  // the one used last comes first
  // Of the call in progress.
  char* memory_ = nullptr;
  StepShape shape_;
  Key key_;
  LoopCall call_;
  AttentionCall all_queries_, listed_queries_;
  int64_t tiles_ = 0, head_rows_ = 0;  // head_rows_: of a chunk of logits
  size_t failures_at_ = 0, result_bytes_ = 0;
  int32_t steps_ = 0, sequences_ = 0;
  std::vector<int64_t> begins_;  // of the sequences
  Weight wte_;
};

}  // namespace dn::cuda
