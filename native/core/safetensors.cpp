// The reader: header checks (parse_safetensors), the open file, and conversion to fp32.
#include "core/safetensors.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <functional>
#include <numeric>
#include <system_error>

#include "core/error.h"
#include "core/half.h"
#include "core/json.h"

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "safetensors files are little-endian; this host is not"
#endif

namespace dn {

namespace {

constexpr size_t kPrefix = 8;  // header length, little-endian
constexpr JsonLimits kHeaderLimits{kLargestHeader, 8, 1000000};

[[noreturn]] void fail(const std::string& path, const std::string& what) {
  throw Error(Code::kCheckpoint, path + ": " + what);
}

std::string system_reason(int error) { return std::generic_category().message(error); }

// Bytes of one element; 0 for a name this format does not know.
uint64_t element_bytes(const std::string& dtype) {
  static const struct {
    const char* name;
    uint64_t bytes;
  } kTypes[] = {{"F32", 4},  {"F16", 2},     {"BF16", 2},    {"F64", 8},     {"I64", 8}, {"I32", 4},
                {"I16", 2},  {"I8", 1},      {"U64", 8},     {"U32", 4},     {"U16", 2}, {"U8", 1},
                {"BOOL", 1}, {"F8_E4M3", 1}, {"F8_E5M2", 1}, {"F8_E8M0", 1}, {"C64", 8}};
  for (const auto& type : kTypes) {
    if (dtype == type.name) return type.bytes;
  }
  return 0;
}

uint64_t read_u64(const uint8_t* bytes) {
  uint64_t value;
  std::memcpy(&value, bytes, sizeof value);
  return value;
}

// Throws unless a file of `file_bytes` can hold the header that its first 8 bytes claim.
size_t checked_header_bytes(const uint8_t* prefix, uint64_t file_bytes, const std::string& path) {
  const uint64_t header = read_u64(prefix);
  if (header > kLargestHeader) {
    fail(path, "the header claims " + std::to_string(header) + " bytes, expected at most " +
                   std::to_string(kLargestHeader) + "; is this a safetensors file?");
  }
  if (header > file_bytes - kPrefix) {
    fail(path, "the header claims " + std::to_string(header) + " bytes, but only " +
                   std::to_string(file_bytes - kPrefix) +
                   " follow; the file is truncated or not safetensors");
  }
  return static_cast<size_t>(header);
}

void require_prefix(uint64_t file_bytes, const std::string& path) {
  if (file_bytes < kPrefix) {
    fail(path, "holds " + std::to_string(file_bytes) + " bytes, expected a safetensors file (at least 8)");
  }
}

TensorEntry parse_entry(const std::string& name, const JsonValue& value, uint64_t data_bytes,
                        const std::string& path) {
  using Kind = JsonValue::Kind;
  const std::string where = "tensor " + shown_name(name) + ": ";
  if (value.kind != Kind::kObject)
    fail(path, where + "expected an object with dtype, shape and data_offsets");
  for (const std::string& key : value.keys) {
    if (key != "dtype" && key != "shape" && key != "data_offsets") {
      fail(path,
           where + "unknown field " + shown_name(key) + ", expected only dtype, shape and data_offsets");
    }
  }
  TensorEntry entry;
  entry.name = name;
  const JsonValue* dtype = value.find("dtype");
  if (dtype == nullptr || dtype->kind != Kind::kString) fail(path, where + "expected a string \"dtype\"");
  const uint64_t size = element_bytes(dtype->text);
  if (size == 0)
    fail(path, where + "unknown dtype " + shown_name(dtype->text) + ", expected F32, F16, BF16 or such");
  entry.dtype = dtype->text;

  const JsonValue* shape = value.find("shape");
  if (shape == nullptr || shape->kind != Kind::kArray) fail(path, where + "expected an array \"shape\"");
  const uint64_t most = static_cast<uint64_t>(INT64_MAX) / size;  // elements whose bytes still fit
  uint64_t count = 1;
  for (const JsonValue& item : shape->items) {
    uint64_t dim = 0;
    if (!item.to_uint64(&dim) || dim > static_cast<uint64_t>(INT64_MAX)) {
      fail(path, where + "shape entries must be non-negative integers below 2^63" +
                     (item.kind == Kind::kNumber ? ", not " + shown_name(item.text) : ""));
    }
    if (dim != 0 && count > most / dim) fail(path, where + "the product of its shape is too large");
    count *= dim;
    entry.shape.push_back(static_cast<int64_t>(dim));
  }

  const JsonValue* offsets = value.find("data_offsets");
  if (offsets == nullptr || offsets->kind != Kind::kArray || offsets->items.size() != 2 ||
      !offsets->items[0].to_uint64(&entry.begin) || !offsets->items[1].to_uint64(&entry.end)) {
    fail(path, where + "expected \"data_offsets\" with two non-negative integers");
  }
  const std::string range = "[" + std::to_string(entry.begin) + ", " + std::to_string(entry.end) + "]";
  if (entry.begin > entry.end) fail(path, where + "data_offsets " + range + " are reversed");
  if (entry.end > data_bytes) {
    fail(path, where + "data_offsets " + range + " end past the " + std::to_string(data_bytes) +
                   " bytes of data in the file; it may be truncated");
  }
  if (entry.end - entry.begin != count * size) {
    fail(path, where + "data_offsets " + range + " hold " + std::to_string(entry.end - entry.begin) +
                   " bytes, expected " + std::to_string(count * size) + " for its shape and dtype " +
                   entry.dtype);
  }
  return entry;
}

// Sorts by bytes and demands that the tensors cover [0, data_bytes) without overlap, hole or rest.
void check_coverage(std::vector<TensorEntry>* tensors, uint64_t data_bytes, const std::string& path) {
  std::sort(tensors->begin(), tensors->end(), [](const TensorEntry& a, const TensorEntry& b) {
    if (a.begin != b.begin) return a.begin < b.begin;
    return a.end != b.end ? a.end < b.end : a.name < b.name;
  });
  uint64_t covered = 0;
  const TensorEntry* previous = nullptr;
  for (const TensorEntry& entry : *tensors) {
    if (entry.begin < covered) {
      fail(path,
           "tensor " + shown_name(entry.name) + ": its bytes overlap those of " + shown_name(previous->name));
    }
    if (entry.begin > covered) {
      fail(path, "tensor " + shown_name(entry.name) + ": the " + std::to_string(entry.begin - covered) +
                     " bytes before it belong to no tensor");
    }
    covered = entry.end;
    previous = &entry;
  }
  if (covered != data_bytes) {
    fail(path, std::to_string(data_bytes - covered) + " bytes after the last tensor belong to none");
  }
}

void parse_header(const char* header, size_t header_bytes, uint64_t data_bytes, const std::string& path,
                  std::vector<TensorEntry>* tensors, std::map<std::string, std::string>* metadata) {
  if (header_bytes == 0 || header[0] != '{')
    fail(path, "the header does not begin with '{'; is this a safetensors file?");
  const JsonValue root = parse_json(header, header_bytes, kHeaderLimits, path + ": header");
  for (size_t i = 0; i < root.keys.size(); ++i) {
    const JsonValue& value = root.items[i];
    if (root.keys[i] != "__metadata__") {
      tensors->push_back(parse_entry(root.keys[i], value, data_bytes, path));
      continue;
    }
    if (value.kind != JsonValue::Kind::kObject) fail(path, "__metadata__ must be an object of strings");
    for (size_t j = 0; j < value.keys.size(); ++j) {
      if (value.items[j].kind != JsonValue::Kind::kString) {
        fail(path, "__metadata__ entry " + shown_name(value.keys[j]) + " must be a string");
      }
      metadata->emplace(value.keys[j], value.items[j].text);
    }
  }
  check_coverage(tensors, data_bytes, path);
}

// Reads exactly `bytes` at `offset`; a file that shrank meanwhile is an error, not a short result. At most
// 1 GiB at a time: macOS refuses to read more than INT_MAX bytes.
void read_exactly(int fd, void* out, size_t bytes, uint64_t offset, const std::string& where) {
  char* to = static_cast<char*>(out);
  while (bytes > 0) {
    const ssize_t got = pread(fd, to, std::min(bytes, size_t{1} << 30), static_cast<off_t>(offset));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) fail(where, "cannot be read: " + system_reason(errno));
    if (got == 0)
      fail(where,
           "the file ends at byte " + std::to_string(offset) + "; it was truncated after it was opened");
    to += got;
    offset += static_cast<uint64_t>(got);
    bytes -= static_cast<size_t>(got);
  }
}

// Not 0 when one of n values has all exponent bits set, that is, when it is NaN or infinite. OR-ing a
// comparison per element keeps the loops free of branches, so that they are vectorised.
uint32_t special_f32(const float* values, int64_t n) {
  uint32_t special = 0;
  for (int64_t i = 0; i < n; ++i) special |= (float_bits(values[i]) & 0x7F800000u) == 0x7F800000u ? 1u : 0u;
  return special;
}

uint32_t special_16(const uint16_t* values, int64_t n, uint16_t exponent) {
  uint16_t special = 0;
  for (int64_t i = 0; i < n; ++i)
    special |= static_cast<uint16_t>((values[i] & exponent) == exponent ? 1 : 0);
  return special;
}

bool is_finite(float value) { return (float_bits(value) & 0x7F800000u) != 0x7F800000u; }

}  // namespace

int64_t TensorEntry::count() const {
  return std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<int64_t>());
}

void parse_safetensors(const uint8_t* file, size_t bytes, const std::string& path,
                       std::vector<TensorEntry>* tensors, std::map<std::string, std::string>* metadata,
                       size_t* data_begin) {
  require_prefix(bytes, path);
  const size_t header = checked_header_bytes(file, bytes, path);
  *data_begin = kPrefix + header;
  parse_header(reinterpret_cast<const char*>(file) + kPrefix, header, bytes - *data_begin, path, tensors,
               metadata);
}

SafetensorsFile::SafetensorsFile(const std::string& path) : path_(path) {
  // O_NONBLOCK: opening a FIFO returns at once, and the check below refuses it.
  struct Descriptor {
    int fd;
    ~Descriptor() {
      if (fd >= 0) close(fd);
    }
  } file{open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)};
  if (file.fd < 0) fail(path, "cannot be opened: " + system_reason(errno));
  struct stat status;
  if (fstat(file.fd, &status) != 0) fail(path, "cannot be examined: " + system_reason(errno));
  if (!S_ISREG(status.st_mode)) {
    fail(path, std::string(S_ISDIR(status.st_mode) ? "is a directory" : "is not a regular file") +
                   ", expected a safetensors file");
  }
  const uint64_t bytes = static_cast<uint64_t>(status.st_size);
  require_prefix(bytes, path);
  uint8_t prefix[kPrefix];
  read_exactly(file.fd, prefix, kPrefix, 0, path);
  const size_t header = checked_header_bytes(prefix, bytes, path);
  data_begin_ = kPrefix + header;
  data_bytes_ = bytes - data_begin_;
  std::vector<char> text(header);
  read_exactly(file.fd, text.data(), header, kPrefix, path);
  parse_header(text.data(), header, data_bytes_, path, &tensors_, &metadata_);
  fd_ = file.fd;
  file.fd = -1;
}

SafetensorsFile::~SafetensorsFile() { close(fd_); }

const TensorEntry* SafetensorsFile::find(const std::string& name) const {
  for (const TensorEntry& entry : tensors_) {
    if (entry.name == name) return &entry;
  }
  return nullptr;
}

uint64_t SafetensorsFile::offset(const TensorEntry& entry) const {
  if (entry.begin > entry.end || entry.end > data_bytes_) {
    throw Error(Code::kArgument, path_ + ": tensor " + shown_name(entry.name) + " is not one of this file");
  }
  return data_begin_ + entry.begin;
}

void SafetensorsFile::read(const TensorEntry& entry, float* out) const {
  read_range(entry, 0, entry.count(), out);
}

void SafetensorsFile::read_range(const TensorEntry& entry, int64_t begin, int64_t count, float* out) const {
  const std::string where = "tensor " + shown_name(entry.name) + ": ";
  const bool is_f32 = entry.dtype == "F32", is_f16 = entry.dtype == "F16";
  if (!is_f32 && !is_f16 && entry.dtype != "BF16") {
    fail(path_, where + "has dtype " + entry.dtype + ", expected F32, F16 or BF16");
  }
  const int64_t size = is_f32 ? 4 : 2;
  const int64_t total = static_cast<int64_t>(entry.end - entry.begin) / size;
  if (begin < 0 || count < 0 || count > total || begin > total - count) {
    throw Error(Code::kArgument, path_ + ": " + where + "elements [" + std::to_string(begin) + ", " +
                                     std::to_string(begin) + " + " + std::to_string(count) + ") of " +
                                     std::to_string(total) + " were asked for");
  }
  const uint64_t first = offset(entry) + static_cast<uint64_t>(begin * size);
  // The chunk stays in the second-level cache between the copy and the conversion.
  constexpr int64_t kChunk = 1 << 15;
  std::vector<uint16_t> narrow(is_f32 ? 0 : static_cast<size_t>(std::min(kChunk, count)));
  for (int64_t done = 0; done < count; done += kChunk) {
    const int64_t n = std::min(kChunk, count - done);
    float* const to = out + done;
    void* const raw = is_f32 ? static_cast<void*>(to) : narrow.data();
    read_exactly(fd_, raw, static_cast<size_t>(n * size), first + static_cast<uint64_t>(done * size),
                 path_ + ": tensor " + shown_name(entry.name));
    uint32_t special = 0;
    if (is_f32) {
      special = special_f32(to, n);
    } else if (is_f16) {
      special = special_16(narrow.data(), n, 0x7C00);
      for (int64_t i = 0; i < n; ++i) to[i] = f16_to_f32(narrow[i]);
    } else {
      special = special_16(narrow.data(), n, 0x7F80);
      for (int64_t i = 0; i < n; ++i) to[i] = bf16_to_f32(narrow[i]);
    }
    if (special == 0) continue;
    const float* const bad = std::find_if_not(to, to + n, is_finite);
    const char* const what = (float_bits(*bad) & 0x7FFFFFu) != 0 ? "NaN" : "an infinite value";
    fail(path_, where + "holds " + what + " at index " + std::to_string(begin + done + (bad - to)) +
                    ", expected finite numbers");
  }
}

void SafetensorsFile::read_int8(const TensorEntry& entry, int8_t* out) const {
  const std::string where = "tensor " + shown_name(entry.name);
  if (entry.dtype != "I8") fail(path_, where + ": has dtype " + entry.dtype + ", expected I8");
  const uint64_t first = offset(entry);
  read_exactly(fd_, out, static_cast<size_t>(entry.end - entry.begin), first, path_ + ": " + where);
}

}  // namespace dn
