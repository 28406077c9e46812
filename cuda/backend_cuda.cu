// CudaBackend: its beginning and end, buffers, copies and packing, and the devices that it is made for.
// Memory and lists: memory.cu. Ops that are one or two launches: backend_ops.cu. Attention and head:
// backend_attention.cu, backend_head.cu.

#include <algorithm>

#include "core/error.h"
#include "cuda/backend_cuda.h"
#include "cuda/backend_loop.h"

namespace dn::cuda {
namespace {

constexpr size_t kSmallCopy = size_t{64} << 10;  // bytes that one block copies in good time
constexpr int kLowestMajor = 8;                  // sm_80: the first with bf16 tensor cores

class CudaBuffer : public Buffer {
 public:
  CudaBuffer(std::shared_ptr<DeviceState> state, size_t bytes) : state_(std::move(state)), bytes_(bytes) {
    data_ = state_->alloc(bytes, "a buffer");
    state_->add_buffer(data_, bytes);
  }
  ~CudaBuffer() override { state_->remove_buffer(data_); }
  CudaBuffer(const CudaBuffer&) = delete;
  CudaBuffer& operator=(const CudaBuffer&) = delete;
  void* data() const override { return data_; }
  size_t bytes() const override { return bytes_; }

 private:
  std::shared_ptr<DeviceState> state_;
  void* data_ = nullptr;
  size_t bytes_;
};

[[noreturn]] void refuse(const char* op, const std::string& what) {
  throw Error(Code::kArgument, std::string(op) + ": " + what);
}

}  // namespace

CudaBackend::CudaBackend(int device, const Device& properties, Dtype activations)
    : state_(std::make_shared<DeviceState>(device)),
      dtype_(activations),
      name_("cuda:" + std::to_string(device) + "/sm_" + std::to_string(properties.major) +
            std::to_string(properties.minor) + (activations == Dtype::kF32 ? "/fp32" : "")),
      device_memory_(properties.memory),
      multiprocessors_(properties.multiprocessors),
      staging_(state_.get()),
      partial_(state_.get(), "partial sums"),
      delta_(state_.get(), "the attention's backward pass"),
      spans_(state_.get(), "the attention's tiles"),
      plan_(state_.get(), "the attention's plan"),
      logits_(state_.get(), "a chunk of logits"),
      hidden_rows_(state_.get(), "the head's rows"),
      gradient_rows_(state_.get(), "the gradients of the head's rows"),
      results_(state_.get(), "the head's results"),
      tile_mass_(state_.get(), "sums of probabilities"),
      head_parts_(state_.get(), "the head's partial sums"),
      doubles_(state_.get(), "sums of squares"),
      loop_memory_(state_.get(), "a denoising loop") {
  library_ = CublasLt::open();
  // A device that takes memory and launches but does not compute is found here, not in a user's results.
  const std::vector<float> numbers(1000, 2.0f);
  if (sum_of_squares(staging_.list(numbers.data(), 1000), 1000) != 4000)
    throw Error(Code::kDevice, name_ + ": the self-test gave a wrong result");
}

CudaBackend::~CudaBackend() {
  try {
    state_->use();
    cuda::synchronize(state_->stream());
  } catch (const Error&) {
    // A failed device has nothing left to wait for.
  }
  loop_.reset();
}

DeviceLoop* CudaBackend::device_loop() {
  if (!loop_) loop_ = std::make_unique<CudaLoop>(*this);
  return loop_.get();
}

Stream CudaBackend::begin() {
  if (capturing_) return state_->stream();
  if (!segments_.empty()) flush_adamw();
  if (!copies_.empty()) flush_copies();
  staging_.begin_op();
  state_->use();
  return state_->stream();
}

std::unique_ptr<Buffer> CudaBackend::alloc(size_t bytes) {
  const Stream stream = begin();
  auto buffer = std::make_unique<CudaBuffer>(state_, bytes);
  fill_zero(buffer->data(), bytes, stream);
  return buffer;
}

size_t CudaBackend::free_bytes() {
  begin();  // what is queued reads memory that use() may free
  size_t free = 0, total = 0;
  free_memory(&free, &total);
  return free;
}

void CudaBackend::upload(void* dst, const void* host, size_t bytes) {
  const Stream stream = begin();
  state_->touch(dst);
  copy_to_device(dst, host, bytes, stream);
  cuda::synchronize(stream);
}

void CudaBackend::download(void* host, const void* src, size_t bytes) {
  const Stream stream = begin();
  copy_to_host(host, src, bytes, stream);
  cuda::synchronize(stream);
}

void CudaBackend::zero(void* dst, size_t bytes) {
  const Stream stream = begin();
  state_->touch(dst);
  fill_zero(dst, bytes, stream);
}

// A gather of scattered rows, or a cache written at scattered positions, is many small copies: they wait for
// each other and go as one launch.
void CudaBackend::copy(Tensor dst, Tensor src) {
  if (dst.dtype != src.dtype || dst.rows != src.rows || dst.cols != src.cols)
    refuse("copy", "from " + src.shape() + " to " + dst.shape() + ", expected one shape and type");
  state_->touch(dst.data);
  const size_t element = dtype_bytes(src.dtype), rows = static_cast<size_t>(src.rows);
  const size_t width = static_cast<size_t>(src.cols) * element;
  if (src.rows == 0 || src.cols == 0) return;
  const size_t dst_pitch = static_cast<size_t>(dst.stride) * element,
               src_pitch = static_cast<size_t>(src.stride) * element;
  if (width * rows > kSmallCopy || width % 2 != 0) {
    const Stream stream = begin();
    if (src.rows == 1 || (src_pitch == width && dst_pitch == width)) {
      copy_on_device(dst.data, src.data, width * rows, stream);
    } else {
      copy_rows_on_device(dst.data, dst_pitch, src.data, src_pitch, width, rows, stream);
    }
    return;
  }
  const char* const dst_begin = static_cast<const char*>(dst.data);
  const char* const dst_end = dst_begin + dst_pitch * (rows - 1) + width;
  const char* const src_begin = static_cast<const char*>(src.data);
  const char* const src_end = src_begin + src_pitch * (rows - 1) + width;
  const auto apart = [](const char* begin, const char* end, const char* other, const char* other_end) {
    return end <= other || other_end <= begin;
  };
  if (!copies_.empty() &&
      (!apart(src_begin, src_end, copies_dst_begin_, copies_dst_end_) ||
       !apart(dst_begin, dst_end, copies_src_begin_, copies_src_end_) || dst_begin < copies_dst_end_)) {
    flush_copies();
  }
  if (copies_.empty()) {
    if (!segments_.empty()) flush_adamw();
    copies_dst_begin_ = dst_begin;
    copies_src_begin_ = src_begin;
    copies_src_end_ = src_end;
  }
  copies_dst_end_ = dst_end;  // targets come in ascending order, or the list is sent off
  copies_src_begin_ = std::min(copies_src_begin_, src_begin);
  copies_src_end_ = std::max(copies_src_end_, src_end);
  copies_.push_back({dst.data, src.data, dst_pitch, src_pitch, width, rows});
}

void CudaBackend::flush_copies() {
  std::vector<CopySegment> copies;
  copies.swap(copies_);
  staging_.begin_op();
  state_->use();
  const int64_t count = static_cast<int64_t>(copies.size());
  copy_segments(staging_.list(copies.data(), count), count, state_->stream());
}

void CudaBackend::synchronize() { cuda::synchronize(begin()); }

void CudaBackend::pack_weight(void* packed, const Weight& plain, Dtype to) {
  if (to != Dtype::kF32) refuse("pack_weight", "parameters are fp32 on a GPU");
  const Stream stream = begin();
  state_->touch(packed);
  copy_on_device(packed, plain.data, static_cast<size_t>(plain.K * plain.N) * sizeof(float), stream);
}

void CudaBackend::unpack_weight(void* plain, const Weight& packed) {
  const Stream stream = begin();
  state_->touch(plain);
  copy_on_device(plain, packed.data, static_cast<size_t>(packed.K * packed.N) * sizeof(float), stream);
}

void CudaBackend::check(const char* op, const char* name, const Tensor& t, int64_t rows, int64_t cols,
                        Dtype dtype) const {
  if (t && t.rows == rows && t.cols == cols && t.dtype == dtype) return;
  refuse(op, std::string(name) + " is " + (t ? t.shape() : "missing") +
                 (t && t.dtype != dtype ? " of another type" : "") + ", expected (" + std::to_string(rows) +
                 ", " + std::to_string(cols) + ")");
}

}  // namespace dn::cuda

namespace dn {

std::vector<CudaDevice> cuda_devices(std::string* reason) {
  std::vector<CudaDevice> result;
  for (const cuda::Device& d : cuda::list_devices(reason))
    result.push_back({d.name, d.memory, std::to_string(d.major) + "." + std::to_string(d.minor)});
  return result;
}

std::string cuda_products() { return cuda::CublasLt::describe(); }

std::unique_ptr<Backend> make_cuda_backend(int device, Dtype activations) {
  std::string reason;
  const std::vector<cuda::Device> devices = cuda::list_devices(&reason);
  const std::string asked = "device cuda:" + std::to_string(device) + " cannot be used: ";
  if (devices.empty()) throw Error(Code::kDevice, asked + reason);
  if (device < 0 || device >= static_cast<int>(devices.size()))
    throw Error(Code::kDevice, asked + "there are " + std::to_string(devices.size()) + " CUDA devices");
  const cuda::Device& properties = devices[static_cast<size_t>(device)];
  if (properties.major < cuda::kLowestMajor) {
    throw Error(Code::kDevice, asked + properties.name + " has compute capability " +
                                   std::to_string(properties.major) + "." + std::to_string(properties.minor) +
                                   ", expected 8.0 or newer");
  }
  return std::make_unique<cuda::CudaBackend>(device, properties, activations);
}

}  // namespace dn
