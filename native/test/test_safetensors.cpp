// The safetensors reader and writer: values through every dtype, what is refused and how it is said, unusual
// paths, and that a failed or abandoned write leaves the directory as it was.
#include <fcntl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <limits>
#include <string>

#include "core/error.h"
#include "core/half.h"
#include "core/safetensors.h"
#include "test/check.h"
#include "test/temporary_folder.h"

namespace {

using namespace dn;
namespace fs = std::filesystem;

std::string file_bytes(const std::string& json, const std::string& data) {
  const uint64_t length = json.size();
  std::string file(8, '\0');
  std::memcpy(&file[0], &length, 8);
  return file + json + data;
}

void put(const std::string& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary) << bytes;
}

template <typename T>
std::string raw(const std::vector<T>& values) {
  return std::string(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T));
}

void parse(const std::string& file) {
  std::vector<TensorEntry> tensors;
  std::map<std::string, std::string> metadata;
  size_t data_begin = 0;
  parse_safetensors(reinterpret_cast<const uint8_t*>(file.data()), file.size(), "dir/model.safetensors",
                    &tensors, &metadata, &data_begin);
}

void parse(const std::string& json, size_t data) { parse(file_bytes(json, std::string(data, 'd'))); }

std::string entry(const std::string& shape, const std::string& offsets, const std::string& dtype = "F32") {
  return "{\"dtype\":\"" + dtype + "\",\"shape\":" + shape + ",\"data_offsets\":" + offsets + "}";
}

}  // namespace

DN_TEST(safetensors_write_then_read) {
  TemporaryFolder folder;
  const std::string path = folder / "a.safetensors";
  std::vector<float> big(150001);  // several conversion chunks, and an odd end
  for (size_t i = 0; i < big.size(); ++i) big[i] = std::sin(static_cast<float>(i)) * 100;
  const std::vector<float> small = {1.0f, -2.5f, 1e-7f};
  {
    SafetensorsWriter writer(path,
                             {{"h.0.\"odd\" n\xC3\xA4me\n", {3}, Dtype::kF16},
                              {"f32", {150001, 1}, Dtype::kF32},
                              {"f16", {150001}, Dtype::kF16},
                              {"bf16", {1, 150001}, Dtype::kBF16},
                              {"scalar", {}, Dtype::kF32},
                              {"empty", {0, 5}, Dtype::kF32}},
                             {{"format", "pt"}, {"note", "line\nbreak \"q\" \xE2\x82\xAC"}});
    CHECK(folder.files() == 1 && !fs::exists(path));
    writer.write(small.data(), 3);
    for (int i = 0; i < 3; ++i) writer.write(big.data(), static_cast<int64_t>(big.size()));
    writer.write(&small[1], 1);
    writer.write(nullptr, 0);
    writer.commit();
    CHECK_THROWS(writer.commit(), Code::kArgument, "closed");
  }
  CHECK(folder.files() == 1 && fs::exists(path));

  SafetensorsFile file(path);
  CHECK(file.path() == path && file.tensors().size() == 6);
  CHECK(file.metadata().at("format") == "pt" &&
        file.metadata().at("note") == "line\nbreak \"q\" \xE2\x82\xAC");
  CHECK(file.find("missing") == nullptr);
  const TensorEntry* odd = file.find("h.0.\"odd\" n\xC3\xA4me\n");
  CHECK(odd != nullptr && odd->dtype == "F16" && odd->begin == 0 && odd->end == 6);
  const TensorEntry* f32 = file.find("f32");  // begins 6 bytes in: not aligned
  CHECK((f32->shape == std::vector<int64_t>{150001, 1}) && f32->count() == 150001);
  std::vector<float> out(big.size());
  file.read(*f32, out.data());
  CHECK(out == big);
  std::vector<float> f16(big.size()), bf16(big.size());
  for (size_t i = 0; i < big.size(); ++i) {
    f16[i] = f16_to_f32(f32_to_f16(big[i]));
    bf16[i] = bf16_to_f32(f32_to_bf16(big[i]));
  }
  file.read(*file.find("f16"), out.data());
  CHECK(out == f16);
  file.read(*file.find("bf16"), out.data());
  CHECK(out == bf16);
  float scalar = 0;
  file.read(*file.find("scalar"), &scalar);
  CHECK(scalar == -2.5f && file.find("empty")->count() == 0);
  file.read(*file.find("empty"), nullptr);

  float part[5] = {0, 0, 0, 0, 0};
  file.read_range(*file.find("bf16"), 99999, 5, part);
  CHECK(std::memcmp(part, &bf16[99999], sizeof part) == 0);
  for (const auto& [begin, count] : std::vector<std::pair<int64_t, int64_t>>{
           {-1, 1}, {0, 150002}, {150001, 1}, {150000, 2}, {0, -1}, {INT64_MAX, 1}, {1, INT64_MAX}}) {
    CHECK_THROWS(file.read_range(*f32, begin, count, part), Code::kArgument, "\"f32\"");
  }
}

DN_TEST(safetensors_refuses_bad_headers) {
  const struct {
    std::string json;
    size_t data;
    const char* part;
  } cases[] = {
      {"", 0, "does not begin with '{'"},
      {"[]", 0, "does not begin with '{'"},
      {" {}", 0, "does not begin with '{'"},
      {"{\"a\":1", 0, "header: not valid JSON at byte 6"},
      {"{\"\xFF\":1}", 0, "valid UTF-8"},
      {"{} x", 0, "expected the end"},
      {"{\"a\":5}", 0, "tensor \"a\": expected an object"},
      {"{\"a\":{}}", 0, "expected a string \"dtype\""},
      {"{\"a\":{\"dtype\":3,\"shape\":[],\"data_offsets\":[0,4]}}", 4, "expected a string \"dtype\""},
      {"{\"a\":{\"dtype\":\"F32\",\"data_offsets\":[0,4]}}", 4, "expected an array \"shape\""},
      {"{\"a\":{\"dtype\":\"F32\",\"shape\":4,\"data_offsets\":[0,4]}}", 4, "expected an array \"shape\""},
      {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1]}}", 4, "expected \"data_offsets\""},
      {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4],\"extra\":1}}", 4,
       "unknown field \"extra\""},
      {"{\"a\":" + entry("[1]", "[0,4]", "F33") + "}", 4, "unknown dtype \"F33\""},
      {"{\"a\":" + entry("[1]", "[0,4]", "f32") + "}", 4, "unknown dtype"},
      {"{\"a\":" + entry("[-1]", "[0,4]") + "}", 4, "non-negative integers below 2^63, not \"-1\""},
      {"{\"a\":" + entry("[1.0]", "[0,4]") + "}", 4, "not \"1.0\""},
      {"{\"a\":" + entry("[1e0]", "[0,4]") + "}", 4, "not \"1e0\""},
      {"{\"a\":" + entry("[\"1\"]", "[0,4]") + "}", 4, "shape entries"},
      {"{\"a\":" + entry("[9223372036854775808]", "[0,4]") + "}", 4, "shape entries"},
      {"{\"a\":" + entry("[9223372036854775807]", "[0,4]") + "}", 4, "product of its shape is too large"},
      {"{\"a\":" + entry("[4294967296,4294967296]", "[0,0]") + "}", 0, "product of its shape is too large"},
      {"{\"a\":" + entry("[2147483648,2147483648,4]", "[0,0]") + "}", 0, "product of its shape is too large"},
      {"{\"a\":" + entry("[1]", "[0]") + "}", 4, "with two non-negative integers"},
      {"{\"a\":" + entry("[1]", "[0,4,8]") + "}", 4, "with two non-negative integers"},
      {"{\"a\":" + entry("[1]", "[-4,0]") + "}", 4, "with two non-negative integers"},
      {"{\"a\":" + entry("[1]", "[0,4.0]") + "}", 4, "with two non-negative integers"},
      {"{\"a\":" + entry("[1]", "[0,18446744073709551616]") + "}", 4, "with two non-negative integers"},
      {"{\"a\":" + entry("[1]", "[4,0]") + "}", 4, "are reversed"},
      {"{\"a\":" + entry("[2]", "[0,8]") + "}", 4, "end past the 4 bytes of data"},
      {"{\"a\":" + entry("[1]", "[18446744073709551612,18446744073709551615]") + "}", 4, "end past"},
      {"{\"a\":" + entry("[1]", "[0,8]") + "}", 8, "hold 8 bytes, expected 4"},
      {"{\"a\":" + entry("[2]", "[0,8]", "F16") + "}", 8, "expected 4 for its shape and dtype F16"},
      {"{\"a\":" + entry("[1]", "[4,8]") + "}", 8, "the 4 bytes before it belong to no tensor"},
      {"{\"a\":" + entry("[1]", "[0,4]") + ",\"b\":" + entry("[1]", "[8,12]") + "}", 12,
       "tensor \"b\": the 4 bytes before"},
      {"{\"a\":" + entry("[1]", "[0,4]") + "}", 8, "4 bytes after the last tensor"},
      {"{}", 3, "3 bytes after the last tensor"},
      {"{\"a\":" + entry("[2]", "[0,8]") + ",\"b\":" + entry("[2]", "[4,12]") + "}", 12,
       "overlap those of \"a\""},
      {"{\"a\":" + entry("[1]", "[0,4]") + ",\"b\":" + entry("[1]", "[0,4]") + "}", 4, "overlap"},
      {"{\"a\":" + entry("[1]", "[0,4]") + ",\"a\":" + entry("[1]", "[4,8]") + "}", 8, "\"a\" appears twice"},
      {"{\"__metadata__\":[]}", 0, "__metadata__ must be an object"},
      {"{\"__metadata__\":{\"k\":1}}", 0, "__metadata__ entry \"k\" must be a string"},
      {"{\"a\":{\"dtype\":\"F32\",\"shape\":[[[[[[[[[1]]]]]]]]],\"data_offsets\":[0,4]}}", 4,
       "nested levels"},
  };
  for (const auto& c : cases) {
    CHECK_THROWS(parse(c.json, c.data), Code::kCheckpoint, c.part);
    CHECK_THROWS(parse(c.json, c.data), Code::kCheckpoint, "dir/model.safetensors");
  }
}

DN_TEST(safetensors_accepts_the_unusual_but_valid) {
  parse("{}", 0);
  parse("{}        \n", 0);
  // Out of order, a scalar, empty tensors at both ends, and a product that a zero makes small.
  parse("{\"b\":" + entry("[]", "[4,8]") + ",\"a\":" + entry("[1]", "[0,4]") +
            ",\"z\":" + entry("[0]", "[8,8]") + ",\"y\":" + entry("[0,9223372036854775807]", "[0,0]") +
            ",\"x\":" + entry("[3]", "[8,11]", "BOOL") + "}",
        11);
}

DN_TEST(safetensors_refuses_false_lengths) {
  parse(file_bytes("{}", ""));
  for (size_t bytes = 0; bytes < 8; ++bytes) {
    CHECK_THROWS(parse(std::string(bytes, '\0')), Code::kCheckpoint,
                 "holds " + std::to_string(bytes) + " bytes");
  }
  for (const uint64_t claim : {UINT64_MAX, UINT64_MAX - 7, uint64_t{1} << 63, (uint64_t{100} << 20) + 1}) {
    std::string file = file_bytes("{}", "");
    std::memcpy(&file[0], &claim, 8);
    CHECK_THROWS(parse(file), Code::kCheckpoint,
                 "claims " + std::to_string(claim) + " bytes, expected at most");
  }
  std::string file = file_bytes("{}", "");
  file[0] = 3;
  CHECK_THROWS(parse(file), Code::kCheckpoint, "but only 2 follow");
  const std::string whole = file_bytes("{\"a\":" + entry("[4]", "[0,16]") + "}", std::string(16, 'd'));
  for (size_t bytes = 0; bytes < whole.size(); ++bytes) {
    CHECK_THROWS(parse(whole.substr(0, bytes)), Code::kCheckpoint, "dir/model.safetensors");
  }
}

DN_TEST(safetensors_refuses_values_that_are_not_finite) {
  TemporaryFolder folder;
  const std::string path = folder / "nan.safetensors";
  std::vector<float> values(10000, 1.5f);
  values[9998] = std::numeric_limits<float>::quiet_NaN();
  values[9999] = INFINITY;
  std::vector<uint16_t> f16(5000, 0x3C00), bf16(5000, 0x3F80);
  f16[4500] = 0xFC00;
  bf16[4999] = 0x7FC1;
  put(path, file_bytes("{\"w\":" + entry("[100,100]", "[0,40000]") +
                           ",\"h\":" + entry("[5000]", "[40000,50000]", "F16") +
                           ",\"b\":" + entry("[5000]", "[50000,60000]", "BF16") +
                           ",\"i\":" + entry("[1]", "[60000,60004]", "I32") + "}",
                       raw(values) + raw(f16) + raw(bf16) + "1234"));
  SafetensorsFile file(path);
  std::vector<float> out(10000);
  CHECK_THROWS(file.read(*file.find("w"), out.data()), Code::kCheckpoint,
               "tensor \"w\": holds NaN at index 9998");
  CHECK_THROWS(file.read_range(*file.find("w"), 9999, 1, out.data()), Code::kCheckpoint,
               "an infinite value at index 9999");
  CHECK_THROWS(file.read(*file.find("h"), out.data()), Code::kCheckpoint, "an infinite value at index 4500");
  CHECK_THROWS(file.read(*file.find("b"), out.data()), Code::kCheckpoint, "NaN at index 4999");
  CHECK_THROWS(file.read(*file.find("i"), out.data()), Code::kCheckpoint,
               "has dtype I32, expected F32, F16 or BF16");
  file.read_range(*file.find("w"), 0, 9998, out.data());
  CHECK(out[9997] == 1.5f);
  TensorEntry stranger;
  stranger.dtype = "F32";
  stranger.end = 1 << 20;
  CHECK_THROWS(file.read(stranger, out.data()), Code::kArgument, "not one of this file");
  stranger.dtype = "I8";
  CHECK_THROWS(file.read_int8(stranger, reinterpret_cast<int8_t*>(out.data())), Code::kArgument,
               "not one of this file");
}

// A file, sparse here, may be larger than the address space that the process may use.
#if !defined(__SANITIZE_ADDRESS__)
DN_TEST(safetensors_reads_without_address_space) {
  TemporaryFolder folder;
  const std::string path = folder / "large.safetensors";
  constexpr int64_t kCount = int64_t{1} << 34;
  const std::string bytes = std::to_string(4 * kCount);
  const std::string header =
      file_bytes("{\"w\":" + entry("[" + std::to_string(kCount) + "]", "[0," + bytes + "]") + "}", "");
  put(path, header);
  fs::resize_file(path, header.size() + 4 * static_cast<uint64_t>(kCount));
  rlimit limit;
  const bool known = getrlimit(RLIMIT_AS, &limit) == 0;
  rlimit lower = limit;
  lower.rlim_cur = std::min(limit.rlim_max, rlim_t{1} << 35);
  if (known) setrlimit(RLIMIT_AS, &lower);  // not every system has this limit
  float last = 1;
  try {
    const SafetensorsFile file(path);
    file.read_range(*file.find("w"), kCount - 1, 1, &last);
  } catch (const Error& e) {
    CHECK_MSG(false, e.what());
  }
  if (known) setrlimit(RLIMIT_AS, &limit);
  CHECK(last == 0);
}
#endif

DN_TEST(safetensors_refuses_unusual_paths) {
  TemporaryFolder folder;
  CHECK_THROWS(SafetensorsFile(folder / "missing"), Code::kCheckpoint,
               "missing: cannot be opened: No such file");
  CHECK_THROWS(SafetensorsFile(folder / ""), Code::kCheckpoint,
               "is a directory, expected a safetensors file");
  put(folder / "empty", "");
  CHECK_THROWS(SafetensorsFile(folder / "empty"), Code::kCheckpoint, "holds 0 bytes");
  CHECK(mkfifo((folder / "fifo").c_str(), 0600) == 0);
  CHECK_THROWS(SafetensorsFile(folder / "fifo"), Code::kCheckpoint, "is not a regular file");
  CHECK_THROWS(SafetensorsFile("/dev/zero"), Code::kCheckpoint, "is not a regular file");
  CHECK_THROWS(SafetensorsWriter(folder / "no/such/folder/file", {}, {}), Code::kCheckpoint,
               "cannot create a file beside it: No such file");
  if (geteuid() == 0) return;  // root may read and write everything
  put(folder / "secret", "secret");
  CHECK(chmod((folder / "secret").c_str(), 0) == 0);
  CHECK_THROWS(SafetensorsFile(folder / "secret"), Code::kCheckpoint, "Permission denied");
  CHECK(mkdir((folder / "locked").c_str(), 0500) == 0);
  CHECK_THROWS(SafetensorsWriter(folder / "locked/file", {}, {}), Code::kCheckpoint, "Permission denied");
}

DN_TEST(safetensors_notices_truncation_after_opening) {
  TemporaryFolder folder;
  const std::string path = folder / "a.safetensors";
  put(path, file_bytes("{\"a\":" + entry("[40000]", "[0,160000]") + "}", std::string(160000, '\0')));
  SafetensorsFile file(path);
  std::vector<float> out(40000, 1.0f);
  file.read(*file.find("a"), out.data());
  CHECK(out[39999] == 0.0f);
  CHECK(truncate(path.c_str(), 1000) == 0);
  CHECK_THROWS(file.read(*file.find("a"), out.data()), Code::kCheckpoint,
               "tensor \"a\": the file ends at byte 1000; it was truncated");
}

DN_TEST(safetensors_writer_refuses_misuse) {
  TemporaryFolder folder;
  const std::string path = folder / "a";
  const float values[4] = {1, 2, 3, 4};
  CHECK_THROWS(SafetensorsWriter(path, {{"a", {1}}, {"a", {2}}}, {}), Code::kArgument,
               "\"a\" is declared twice");
  CHECK_THROWS(SafetensorsWriter(path, {{"a", {2, -1}}}, {}), Code::kArgument, "shape entry -1 is negative");
  CHECK_THROWS(SafetensorsWriter(path, {{"a", {INT64_MAX, 2}}}, {}), Code::kArgument, "too large");
  CHECK_THROWS(SafetensorsWriter(path, {{"a", {1}, Dtype::kI32}}, {}), Code::kArgument,
               "F32, F16, BF16 or I8 only");
  CHECK_THROWS(SafetensorsWriter(path, {{"__metadata__", {1}}}, {}), Code::kArgument, "cannot name a tensor");
  CHECK_THROWS(SafetensorsWriter(path, {{"\xFF", {1}}}, {}), Code::kArgument, "not valid UTF-8");
  CHECK_THROWS(SafetensorsWriter(path, {}, {{"k", "\xFF"}}), Code::kArgument, "metadata \"k\"");
  SafetensorsWriter writer(path, {{"a", {2, 2}}, {"b", {1}}}, {});
  CHECK_THROWS(writer.write(values, 3), Code::kArgument, "\"a\": 3 values were given, expected 4");
  writer.write(values, 4);
  CHECK_THROWS(writer.commit(), Code::kArgument, "only 1 of 2 declared tensors were written; next is \"b\"");
  writer.write(values, 1);
  CHECK_THROWS(writer.write(values, 1), Code::kArgument, "all 2 declared tensors");
  writer.commit();
  CHECK(SafetensorsFile(path).tensors().size() == 2);
}

DN_TEST(safetensors_writer_leaves_nothing_half_written) {
  TemporaryFolder folder;
  const std::string path = folder / "a";
  put(path, "precious");
  const auto untouched = [&] { return folder.files() == 1 && fs::file_size(path) == 8; };
  std::vector<float> values(100000, 1.0f);
  {
    SafetensorsWriter writer(path, {{"a", {100000}}}, {});
    writer.write(values.data(), 100000);
    CHECK(folder.files() == 2);
  }
  CHECK(untouched());
  const struct {
    float value;
    Dtype dtype;
    const char* part;
  } bad[] = {{65520.0f, Dtype::kF16, "the value 65520 at index 99998 is not a finite number in F16"},
             {3.4e38f, Dtype::kBF16, "in BF16"},
             {NAN, Dtype::kBF16, "the value nan at index 99998"},
             {-INFINITY, Dtype::kF32, "the value -inf at index 99998 is not a finite number in F32"}};
  for (const auto& b : bad) {
    values[99998] = b.value;
    SafetensorsWriter writer(path, {{"a", {100000}, b.dtype}}, {});
    CHECK_THROWS(writer.write(values.data(), 100000), Code::kCheckpoint, b.part);
    CHECK(untouched());
    CHECK_THROWS(writer.write(values.data(), 100000), Code::kArgument, "closed");
    CHECK_THROWS(writer.commit(), Code::kArgument, "closed");
  }
  // The name is taken by a folder: the rename fails after everything else went well.
  CHECK(mkdir((folder / "taken").c_str(), 0700) == 0);
  SafetensorsWriter writer(folder / "taken", {}, {});
  CHECK_THROWS(writer.commit(), Code::kCheckpoint, "taken: cannot be replaced");
  CHECK(folder.files() == 2);
}

// A limit on the size of files stands in for a full disk: write(2) fails half-way in the same manner (EFBIG
// for ENOSPC).
DN_TEST(safetensors_writer_reports_a_full_disk) {
  TemporaryFolder folder;
  const std::string path = folder / "a";
  put(path, "precious");
  std::vector<float> values(100000, 1.0f);
  struct rlimit before;
  CHECK(getrlimit(RLIMIT_FSIZE, &before) == 0);
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  std::string message;
  Code code = Code::kInternal;
  {
    SafetensorsWriter writer(path, {{"a", {100000}}}, {});
    const struct rlimit small = {200001, before.rlim_max};
    const bool limited = setrlimit(RLIMIT_FSIZE, &small) == 0;
    try {
      writer.write(values.data(), 100000);
    } catch (const Error& e) {
      message = e.what();
      code = e.code();
    }
    setrlimit(RLIMIT_FSIZE, &before);
    CHECK(limited);
    CHECK(folder.files() == 1);  // gone at once, not only with the writer
  }
  std::signal(SIGXFSZ, handler);
  CHECK_MSG(code == Code::kCheckpoint && message == path + ": cannot be written: File too large", message);
  CHECK(fs::file_size(path) == 8);
}
