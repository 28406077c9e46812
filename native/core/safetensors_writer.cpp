// The writer. Nothing appears under the final name before every byte is on the disk, so a crash, a kill or a
// full disk leaves either the old file or the new one.
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <set>
#include <system_error>

#include "core/error.h"
#include "core/half.h"
#include "core/json.h"
#include "core/safetensors.h"

namespace dn {

namespace {

[[noreturn]] void misuse(const std::string& path, const std::string& what) {
  throw Error(Code::kArgument, path + ": " + what);
}

const char* dtype_name(Dtype dtype) {
  switch (dtype) {
    case Dtype::kF32: return "F32";
    case Dtype::kF16: return "F16";
    case Dtype::kBF16: return "BF16";
    case Dtype::kI8: return "I8";
    default: return nullptr;
  }
}

// Elements of a declaration; throws when the shape or dtype cannot be written.
int64_t checked_count(const SafetensorsWriter::Declaration& tensor, const std::string& path) {
  const std::string where = "tensor " + shown_name(tensor.name) + ": ";
  if (dtype_name(tensor.dtype) == nullptr)
    misuse(path, where + "can be written as F32, F16, BF16 or I8 only");
  int64_t count = 1;
  for (const int64_t dim : tensor.shape) {
    if (dim < 0) misuse(path, where + "shape entry " + std::to_string(dim) + " is negative");
    if (dim != 0 && count > INT64_MAX / 4 / dim)
      misuse(path, where + "the product of its shape is too large");
    count *= dim;
  }
  return count;
}

// The file up to its data: 8 bytes of length and the JSON header, padded with spaces so that the data starts
// aligned.
std::string make_header(const std::string& path, const std::vector<SafetensorsWriter::Declaration>& tensors,
                        const std::map<std::string, std::string>& metadata) {
  std::string json = "{";
  if (!metadata.empty()) {
    json += "\"__metadata__\":{";
    const char* separator = "";
    for (const auto& [key, value] : metadata) {
      if (!is_utf8(key) || !is_utf8(value))
        misuse(path, "metadata " + shown_name(key) + " is not valid UTF-8");
      json += separator + json_quote(key) + ":" + json_quote(value);
      separator = ",";
    }
    json += "}";
  }
  std::set<std::string> names;
  uint64_t offset = 0;
  for (const auto& tensor : tensors) {
    if (!is_utf8(tensor.name)) misuse(path, "tensor name " + shown_name(tensor.name) + " is not valid UTF-8");
    if (tensor.name == "__metadata__") misuse(path, "\"__metadata__\" cannot name a tensor");
    if (!names.insert(tensor.name).second)
      misuse(path, "tensor " + shown_name(tensor.name) + " is declared twice");
    const uint64_t bytes = static_cast<uint64_t>(checked_count(tensor, path)) * dtype_bytes(tensor.dtype);
    if (bytes > static_cast<uint64_t>(INT64_MAX) - offset)
      misuse(path, "the declared tensors are too large for a file");
    if (json.size() > 1) json += ",";
    json += json_quote(tensor.name) + ":{\"dtype\":\"" + dtype_name(tensor.dtype) + "\",\"shape\":[";
    for (size_t i = 0; i < tensor.shape.size(); ++i)
      json += (i == 0 ? "" : ",") + std::to_string(tensor.shape[i]);
    json += "],\"data_offsets\":[" + std::to_string(offset) + "," + std::to_string(offset + bytes) + "]}";
    offset += bytes;
  }
  json += "}";
  json.resize((json.size() + 7) / 8 * 8, ' ');
  if (json.size() > kLargestHeader) {
    misuse(path, "the header would take " + std::to_string(json.size()) + " bytes, the format allows " +
                     std::to_string(kLargestHeader));
  }
  const uint64_t length = json.size();
  char prefix[8];
  std::memcpy(prefix, &length, sizeof prefix);
  return std::string(prefix, sizeof prefix) + json;
}

std::string directory_of(const std::string& path) {
  const size_t slash = path.find_last_of('/');
  if (slash == std::string::npos) return ".";
  return slash == 0 ? "/" : path.substr(0, slash);
}

// Opens a new file next to `path`. Names left over from a killed process with the same id are stepped over.
int open_temporary(const std::string& path, std::string* temporary) {
  static std::atomic<uint64_t> counter{0};
  for (int attempt = 0; attempt < 1000; ++attempt) {
    *temporary = path + ".tmp-" + std::to_string(getpid()) + "-" + std::to_string(counter.fetch_add(1));
    const int fd = open(temporary->c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    if (fd >= 0) return fd;
    if (errno != EEXIST) break;
  }
  temporary->clear();  // not ours to remove
  return -1;
}

}  // namespace

SafetensorsWriter::SafetensorsWriter(const std::string& path, std::vector<Declaration> tensors,
                                     std::map<std::string, std::string> metadata)
    : path_(path), tensors_(std::move(tensors)) {
  const std::string header = make_header(path_, tensors_, metadata);
  fd_ = open_temporary(path_, &temporary_);
  if (fd_ < 0) fail("cannot create a file beside it", errno);
  write_bytes(header.data(), header.size());  // on failure discard() has run; no destructor will
}

SafetensorsWriter::~SafetensorsWriter() { discard(); }

// The next declared tensor, which must hold `count` values and be I8 or not.
const SafetensorsWriter::Declaration& SafetensorsWriter::next(int64_t count, bool is_int8) {
  if (fd_ < 0) misuse(path_, "the writer is closed, by commit() or by an earlier error");
  if (next_ == tensors_.size()) {
    misuse(path_, "all " + std::to_string(tensors_.size()) + " declared tensors are written already");
  }
  const Declaration& tensor = tensors_[next_];
  const std::string where = "tensor " + shown_name(tensor.name) + ": ";
  const int64_t declared = checked_count(tensor, path_);
  if (count != declared) {
    misuse(path_, where + std::to_string(count) + " values were given, expected " + std::to_string(declared));
  }
  if (is_int8 != (tensor.dtype == Dtype::kI8)) {
    misuse(path_, where + (is_int8 ? "int8 values were given for " : "fp32 values were given for ") +
                      dtype_name(tensor.dtype));
  }
  return tensor;
}

void SafetensorsWriter::write_int8(const int8_t* values, int64_t count) {
  next(count, true);
  write_bytes(values, static_cast<size_t>(count));
  ++next_;
}

void SafetensorsWriter::write(const float* values, int64_t count) {
  const Declaration& tensor = next(count, false);
  const std::string where = "tensor " + shown_name(tensor.name) + ": ";
  constexpr int64_t kChunk =
      1 << 16;  // values: bounds the buffer of a conversion, whatever the tensor's size
  std::vector<uint16_t> narrow(tensor.dtype == Dtype::kF32 ? 0
                                                           : static_cast<size_t>(std::min(kChunk, count)));
  for (int64_t begin = 0; begin < count; begin += kChunk) {
    const int64_t n = std::min(kChunk, count - begin);
    const float* const from = values + begin;
    // The exponent of an infinite or NaN result, in the bits that are written.
    uint32_t special = 0;
    if (tensor.dtype == Dtype::kF32) {
      for (int64_t i = 0; i < n; ++i) special |= (float_bits(from[i]) & 0x7F800000u) == 0x7F800000u ? 1u : 0u;
    } else if (tensor.dtype == Dtype::kF16) {
      for (int64_t i = 0; i < n; ++i) {
        narrow[i] = f32_to_f16(from[i]);
        special |= (narrow[i] & 0x7C00u) == 0x7C00u ? 1u : 0u;
      }
    } else {
      for (int64_t i = 0; i < n; ++i) {
        narrow[i] = f32_to_bf16(from[i]);
        special |= (narrow[i] & 0x7F80u) == 0x7F80u ? 1u : 0u;
      }
    }
    if (special != 0) {
      int64_t i = 0;
      const auto fits = [&tensor](float value) {
        const float kept = tensor.dtype == Dtype::kF32   ? value
                           : tensor.dtype == Dtype::kF16 ? f16_to_f32(f32_to_f16(value))
                                                         : bf16_to_f32(f32_to_bf16(value));
        return (float_bits(kept) & 0x7F800000u) != 0x7F800000u;
      };
      while (fits(from[i])) ++i;
      char value[32];
      std::snprintf(value, sizeof value, "%g", static_cast<double>(from[i]));
      discard();
      throw Error(Code::kCheckpoint, path_ + ": " + where + "the value " + value + " at index " +
                                         std::to_string(begin + i) + " is not a finite number in " +
                                         dtype_name(tensor.dtype) + "; nothing was written");
    }
    if (tensor.dtype == Dtype::kF32) {
      write_bytes(from, static_cast<size_t>(n) * 4);
    } else {
      write_bytes(narrow.data(), static_cast<size_t>(n) * 2);
    }
  }
  ++next_;
}

void SafetensorsWriter::commit() {
  if (fd_ < 0) misuse(path_, "the writer is closed, by commit() or by an earlier error");
  if (next_ != tensors_.size()) {
    misuse(path_, "only " + std::to_string(next_) + " of " + std::to_string(tensors_.size()) +
                      " declared tensors were written; next is " + shown_name(tensors_[next_].name));
  }
  if (fsync(fd_) != 0) fail("cannot be flushed to disk", errno);
  const int fd = fd_;
  fd_ = -1;
  if (close(fd) != 0 && errno != EINTR)
    fail("cannot be closed", errno);  // network file systems report a full disk here
  if (rename(temporary_.c_str(), path_.c_str()) != 0) fail("cannot be replaced", errno);
  temporary_.clear();
  // The new name itself must survive a power cut. Some file systems cannot sync a directory and say EINVAL.
  const int directory = open(directory_of(path_).c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (directory < 0) return;  // a directory that may be written but not read
  const int error = fsync(directory) == 0 ? 0 : errno;
  close(directory);
  if (error != 0 && error != EINVAL && error != ENOTSUP && error != EROFS)
    fail("its directory cannot be flushed", error);
}

void SafetensorsWriter::write_bytes(const void* bytes, size_t count) {
  const char* from = static_cast<const char*>(bytes);
  while (count > 0) {
    const ssize_t written = ::write(fd_, from, std::min(count, size_t{1} << 30));
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) fail("cannot be written", errno);
    if (written == 0) fail("cannot be written", ENOSPC);
    from += written;
    count -= static_cast<size_t>(written);
  }
}

void SafetensorsWriter::discard() {
  if (fd_ >= 0) close(fd_);
  fd_ = -1;
  if (!temporary_.empty()) unlink(temporary_.c_str());
  temporary_.clear();
}

void SafetensorsWriter::fail(const std::string& doing, int error) {
  discard();
  throw Error(Code::kCheckpoint, path_ + ": " + doing + ": " + std::generic_category().message(error));
}

}  // namespace dn
