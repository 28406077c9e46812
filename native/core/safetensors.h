// Reading and writing safetensors files (an 8-byte little-endian header length, a JSON header, then raw
// tensors). The reader trusts nothing in the file: every length, offset, shape and name is checked first.
// Values are read with pread and not mapped: a file that another process truncates meanwhile is an error
// then, where a mapping raises SIGBUS.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "core/tensor.h"

namespace dn {

constexpr size_t kLargestHeader = size_t{100} << 20;  // bytes; the format's own limit is 100 MB

struct TensorEntry {
  std::string name;
  std::string dtype;  // as in the file: "F32", "F16", "BF16", "I64", ...
  std::vector<int64_t> shape;
  uint64_t begin = 0;  // bytes from the start of the data section
  uint64_t end = 0;
  int64_t count() const;
};

class SafetensorsFile {
 public:
  // Throws Error(kCheckpoint) naming the file and what is wrong. The header may claim at most 100 MB and
  // never more than the file holds.
  explicit SafetensorsFile(const std::string& path);
  ~SafetensorsFile();
  SafetensorsFile(const SafetensorsFile&) = delete;
  SafetensorsFile& operator=(const SafetensorsFile&) = delete;

  const std::string& path() const { return path_; }
  const std::vector<TensorEntry>& tensors() const { return tensors_; }  // in the order of their bytes
  const std::map<std::string, std::string>& metadata() const { return metadata_; }
  // Null when there is none. A scan: for the hundreds of tensors of a model, not for inner loops.
  const TensorEntry* find(const std::string& name) const;
  // Converts F32, F16 or BF16 to fp32. out holds count() values. Throws Error(kCheckpoint) for another dtype,
  // and for NaN or infinite values, naming tensor and index.
  void read(const TensorEntry& entry, float* out) const;
  // The same conversion for elements [begin, begin + count).
  void read_range(const TensorEntry& entry, int64_t begin, int64_t count, float* out) const;
  // The same for I8, as it is stored.
  void read_int8(const TensorEntry& entry, int8_t* out) const;

 private:
  // Offset of the tensor's first byte in the file. Throws Error(kArgument) for an entry of another file.
  uint64_t offset(const TensorEntry& entry) const;

  std::string path_;
  std::vector<TensorEntry> tensors_;
  std::map<std::string, std::string> metadata_;
  uint64_t data_begin_ = 0;
  uint64_t data_bytes_ = 0;
  int fd_ = -1;
};

// Parses a whole file held in memory; used by SafetensorsFile and by the fuzz test.
void parse_safetensors(const uint8_t* file, size_t bytes, const std::string& path,
                       std::vector<TensorEntry>* tensors, std::map<std::string, std::string>* metadata,
                       size_t* data_begin);

// Writes one file tensor by tensor: names and shapes are declared first, then the values of each in order.
// The file appears under its name only when commit() has flushed and fsynced it (temporary name in the same
// directory, then rename, then fsync of the directory). A writer destroyed before commit() leaves nothing
// behind. Errors (a full disk, say) throw Error(kCheckpoint) with the path and the system's reason; wrong use
// (names, shapes, counts, order) throws kArgument.
class SafetensorsWriter {
 public:
  struct Declaration {
    std::string name;
    std::vector<int64_t> shape;
    Dtype dtype = Dtype::kF32;  // kF32, kF16, kBF16 or kI8
  };
  SafetensorsWriter(const std::string& path, std::vector<Declaration> tensors,
                    std::map<std::string, std::string> metadata);
  ~SafetensorsWriter();
  SafetensorsWriter(const SafetensorsWriter&) = delete;
  SafetensorsWriter& operator=(const SafetensorsWriter&) = delete;
  // The next declared tensor's values, in full, converted to its dtype (round to nearest even). A value that
  // is NaN or infinite, or becomes infinite in a 16-bit dtype, is an error naming the tensor: the reader
  // would refuse the file. After an error nothing is left behind, and further calls fail.
  void write(const float* values, int64_t count);
  void write_int8(const int8_t* values, int64_t count);  // of a kI8 tensor
  void commit();

 private:
  const Declaration& next(int64_t count, bool is_int8);
  void write_bytes(const void* bytes, size_t count);
  void discard();
  [[noreturn]] void fail(const std::string& doing, int error);

  std::string path_, temporary_;
  std::vector<Declaration> tensors_;
  size_t next_ = 0;
  int fd_ = -1;  // -1 after commit() or an error
};

}  // namespace dn
