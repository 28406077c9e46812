// The memory of a device: what buffers, their bf16 copies and the backend's scratch take and give back, and
// the ring through which small lists travel.

#include <algorithm>
#include <cstring>

#include "core/error.h"
#include "cuda/backend_cuda.h"
#include "cuda/backend_loop.h"
#include "cuda/head.h"

namespace dn::cuda {
namespace {

constexpr size_t kStagingBytes = size_t{1} << 20;  // at first; grows with what calls send

}  // namespace

DeviceState::DeviceState(int device) : device_(device) {
  select_device(device);
  stream_ = create_stream();
}

DeviceState::~DeviceState() {
  try {
    use();
    destroy_stream(stream_);
  } catch (const Error&) {
    // The device is gone, and its memory with it.
  }
}

void DeviceState::use() {
  select_device(device_);
  std::vector<void*> released;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    released.swap(released_);
  }
  if (!released.empty() && stream_) synchronize(stream_);  // kernels that read it may still run
  for (void* p : released) device_free(p);
}

void* DeviceState::alloc(size_t bytes, const std::string& what) {
  use();
  try {
    return device_alloc(bytes);
  } catch (const Error& e) {
    if (e.code() != Code::kOutOfMemory) throw;
    throw Error(Code::kOutOfMemory,
                "cuda:" + std::to_string(device_) + ": no memory for " + what + ": " + e.what() +
                    "; lower the batch size or the sequence length, or recompute activations");
  }
}

void DeviceState::release(void* p) {
  const std::lock_guard<std::mutex> lock(mutex_);
  released_.push_back(p);
}

void DeviceState::add_buffer(void* p, size_t bytes) {
  const std::lock_guard<std::mutex> lock(mutex_);
  pieces_[static_cast<const char*>(p)].bytes = bytes;
}

void DeviceState::remove_buffer(void* p) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto piece = pieces_.find(static_cast<const char*>(p));
  if (piece->second.shadow) released_.push_back(piece->second.shadow);
  pieces_.erase(piece);
  released_.push_back(p);
}

std::map<const char*, DeviceState::Piece>::iterator DeviceState::find(const void* p) {
  auto piece = pieces_.upper_bound(static_cast<const char*>(p));
  if (piece == pieces_.begin()) return pieces_.end();
  --piece;
  return static_cast<const char*>(p) < piece->first + piece->second.bytes ? piece : pieces_.end();
}

void DeviceState::touch(const void* p) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto piece = find(p);
  if (piece != pieces_.end()) piece->second.fresh = false;
}

void* DeviceState::fresh_shadow(const void* p) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto piece = find(p);
  if (piece == pieces_.end() || !piece->second.fresh) return nullptr;
  return static_cast<char*>(piece->second.shadow) + (static_cast<const char*>(p) - piece->first) / 2;
}

void* DeviceState::shadow(const void* p) {
  if (void* const fresh = fresh_shadow(p)) return fresh;
  const char* begin = nullptr;
  size_t bytes = 0;
  void* memory = nullptr;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto piece = find(p);
    if (piece == pieces_.end())
      throw Error(Code::kInternal, "a weight lies outside of the memory that this backend allocated");
    begin = piece->first;
    bytes = piece->second.bytes;
    memory = piece->second.shadow;
  }
  // Outside of the lock: alloc() takes it. The buffer is in use by the caller and cannot go away.
  if (!memory) memory = alloc(bytes / 2, "the bf16 copy of " + std::to_string(bytes / 4) + " parameters");
  round_to_bf16(memory, reinterpret_cast<const float*>(begin), static_cast<int64_t>(bytes / 4), stream_);
  const std::lock_guard<std::mutex> lock(mutex_);
  Piece& piece = pieces_[begin];
  piece.shadow = memory;
  piece.fresh = true;
  return static_cast<char*>(memory) + (static_cast<const char*>(p) - begin) / 2;
}

void* Scratch::reserve(size_t bytes) {
  if (bytes <= bytes_ && data_) return data_;
  if (data_) state_->release(data_);
  data_ = nullptr;
  bytes_ = 0;
  const size_t wanted = with_slack(bytes);
  data_ = state_->alloc(wanted, what_);
  bytes_ = wanted;
  return data_;
}

// The sizes that the ops ask their scratch for. Left out: matrices of masks, watched ids and the lists' ring,
// which are small or rare; running out there is still an error that leaves the model usable.
size_t CudaBackend::step_bytes(const StepShape& s) const {
  size_t total = 0;
  const auto add = [&](const Scratch& scratch, int64_t count, size_t bytes) {
    total += scratch.growth(static_cast<size_t>(count) * bytes);
  };
  const size_t element = dtype_bytes(dtype_);
  // The fused head keeps parts of its rows instead of logits; all that fit it are those that need none.
  const bool fits = !s.training && dtype_ == Dtype::kBF16 && s.C % kFusedMultiple == 0;
  if (s.loop_steps > 0) {
    const int64_t rows = fits && s.logit_rows == 0 ? 0 : std::min(s.R, head_chunk_rows(s.V, false));
    if (fits) add(head_parts_, std::min(s.R, kFusedRows) * head_tiles(s.V), sizeof(TilePart));
    add(logits_, rows * logits_stride(s.V), sizeof(float));
    add(tile_mass_, rows * head_tiles(s.V), sizeof(double));
    return total + loop_memory_.growth(CudaLoop::memory_bytes(s));
  }
  if (s.N > 0) {
    const int64_t tiles = s.N / kQueryTile + s.S;
    add(spans_, tiles, sizeof(Spans));
    total += plan_.growth(static_cast<size_t>(s.S) * sizeof(AttentionItem) + 64 +
                          static_cast<size_t>(tiles) * (s.training ? 2 : 1) * sizeof(AttentionTile) +
                          static_cast<size_t>(s.N) * sizeof(int32_t));
  }
  if (s.N > 0 && s.training) {
    add(delta_, s.N * s.NH, sizeof(float));
    const int64_t column_sums = std::max(2 * layernorm_partial_rows(s.N), 4 * column_partial_rows(s.N)) * s.C;
    // An embedding row with more than kRunPiece tokens has pieces, the last of which may be short.
    add(partial_, std::max(column_sums, 2 * (s.N / kRunPiece) * s.C), sizeof(float));
  }
  if (s.R > 0) {
    const int64_t fused = fits ? s.R - s.logit_rows : 0;
    const int64_t rows = std::min(s.R - fused, head_chunk_rows(s.V, s.training));
    add(head_parts_, std::min(fused, kFusedRows) * head_tiles(s.V), sizeof(TilePart));
    add(logits_, rows * logits_stride(s.V), sizeof(float));
    add(hidden_rows_, rows * s.C, element);
    add(results_, s.R, s.training ? sizeof(float) : sizeof(DenoiseResult));
    if (s.training) {
      add(gradient_rows_, rows * s.C, element);
    } else {
      add(tile_mass_, rows * head_tiles(s.V), sizeof(double));
      add(partial_, s.R, sizeof(float));
    }
  }
  return total;
}

Staging::~Staging() {
  begin_op();
  if (twin_) state_->release(twin_);
  if (host_) pinned_free(host_);
}

void Staging::begin_op() {
  op_begin_ = used_;
  wrapped_ = false;
  for (void* twin : retired_) state_->release(twin);
  retired_.clear();
}

void* Staging::send(const void* host, size_t bytes, void* device) {
  const size_t padded = (std::max<size_t>(bytes, 1) + 255) / 256 * 256;
  if (used_ + padded > (wrapped_ ? op_begin_ : bytes_)) {
    if (host_) synchronize(state_->stream());  // what the ring holds of earlier ops has been read
    used_ = 0;
    if (!wrapped_ && padded <= op_begin_) {
      wrapped_ = true;
    } else {
      const size_t wanted = std::max(kStagingBytes, 2 * (bytes_ + padded));
      char* const twin = static_cast<char*>(state_->alloc(wanted, "lists of a call"));
      if (twin_) retired_.push_back(twin_);
      if (host_) pinned_free(host_);
      twin_ = twin;
      host_ = nullptr;
      bytes_ = op_begin_ = 0;
      wrapped_ = false;
      host_ = static_cast<char*>(pinned_alloc(wanted));
      bytes_ = wanted;
    }
  }
  void* const target = device ? device : twin_ + used_;
  if (bytes > 0) {
    std::memcpy(host_ + used_, host, bytes);
    copy_to_device(target, host_ + used_, bytes, state_->stream());
  }
  used_ += padded;
  return target;
}

}  // namespace dn::cuda
