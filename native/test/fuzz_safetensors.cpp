// Mutated safetensors files and JSON texts: whatever the bytes, the reader either throws dn::Error or returns
// entries that all lie inside the file. Seeded, so a failure repeats; meant to run under AddressSanitizer and
// UBSan as well.
#include <algorithm>
#include <cstring>
#include <string>

#include "core/error.h"
#include "core/json.h"
#include "core/rng.h"
#include "core/safetensors.h"
#include "test/check.h"

namespace {

using namespace dn;

// A stream of numbers: one Philox counter per request.
class Random {
 public:
  explicit Random(uint64_t seed) : seed_(seed) {}
  uint64_t below(uint64_t n) {
    const Philox4 r = philox(seed_, Stream::kData, 0, index_++);
    return ((static_cast<uint64_t>(r.v[0]) << 32) | r.v[1]) % n;
  }

 private:
  uint64_t seed_;
  uint64_t index_ = 0;
};

std::string with_length(const std::string& json, size_t data_bytes) {
  const uint64_t length = json.size();
  std::string file(8, '\0');
  std::memcpy(&file[0], &length, 8);
  return file + json + std::string(data_bytes, '\x01');
}

std::vector<std::string> file_seeds() {
  return {
      with_length("{}", 0),
      with_length("{\"w\":{\"dtype\":\"F32\",\"shape\":[2,3],\"data_offsets\":[0,24]}}", 24),
      with_length("{\"__metadata__\":{\"format\":\"pt\",\"note\":\"\\u00e9\\uD83D\\uDE00\"},"
                  "\"a\":{\"dtype\":\"F16\",\"shape\":[5],\"data_offsets\":[0,10]},"
                  "\"b\":{\"shape\":[],\"data_offsets\":[10,14],\"dtype\":\"F32\"},"
                  "\"c\":{\"dtype\":\"BF16\",\"shape\":[0,7],\"data_offsets\":[14,14]},"
                  "\"d\":{\"dtype\":\"I64\",\"shape\":[1,2],\"data_offsets\":[14,30]}}   ",
                  30),
      with_length(
          "{\"h.0.attn.c_attn.weight\":{\"dtype\":\"F32\",\"shape\":[4,12],\"data_offsets\":[16,208]},"
          "\"h.0.ln_1.weight\":{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[0,16]}}",
          208),
  };
}

const char* const kPieces[] = {"0",
                               "-1",
                               "1e9",
                               "0.5",
                               "18446744073709551615",
                               "9223372036854775807",
                               "4294967296",
                               "[",
                               "]",
                               "{",
                               "}",
                               ",",
                               ":",
                               "\"",
                               "\\",
                               "null",
                               "\"F32\"",
                               "\"dtype\":",
                               "\"shape\":[",
                               "\"data_offsets\":[0,0]",
                               "\\uD800",
                               "\\uDC00",
                               "\\u0000",
                               "\xFF",
                               "\xC3\xA9",
                               "[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[",
                               "\"__metadata__\":{}"};

// One random edit. `header_at`: where the text begins (after a file's length field).
void mutate(Random& random, const std::vector<std::string>& seeds, size_t header_at, std::string* text) {
  const size_t size = text->size();
  const size_t at = size == 0 ? 0 : random.below(size);
  switch (random.below(9)) {
    case 0:  // flip a bit
      if (size > 0) (*text)[at] = static_cast<char>((*text)[at] ^ (1 << random.below(8)));
      break;
    case 1: text->resize(at); break;  // truncate
    case 2: text->insert(at, 1, static_cast<char>(random.below(256))); break;
    case 3: text->insert(at, kPieces[random.below(sizeof kPieces / sizeof *kPieces)]); break;
    case 4: text->erase(at, 1 + random.below(8)); break;
    case 5: {  // splice a piece of another seed
      const std::string& other = seeds[random.below(seeds.size())];
      const size_t from = random.below(other.size());
      text->replace(at, random.below(16), other, from, random.below(64));
      break;
    }
    case 6: {  // edit or repeat a digit
      size_t digit = at;
      while (digit < size && ((*text)[digit] < '0' || (*text)[digit] > '9')) ++digit;
      if (digit == size) break;
      if (random.below(2) == 0) {
        (*text)[digit] = static_cast<char>('0' + random.below(10));
      } else {
        text->insert(digit, random.below(25), (*text)[digit]);
      }
      break;
    }
    case 7: {  // edit the header length
      if (header_at == 0 || size < 8) break;
      uint64_t length;
      std::memcpy(&length, text->data(), 8);
      const uint64_t choices[] = {0,          1,          size - 8,         size, size - 7, length + 1,
                                  length - 1, UINT64_MAX, uint64_t{1} << 30};
      length = choices[random.below(sizeof choices / sizeof *choices)];
      std::memcpy(&(*text)[0], &length, 8);
      break;
    }
    default: {  // repeat a stretch, and make the length fit again
      const std::string stretch = text->substr(at, random.below(80));
      text->insert(at, stretch);
      if (header_at == 0 || text->size() < 8) break;
      uint64_t length;
      std::memcpy(&length, text->data(), 8);
      length += stretch.size();
      std::memcpy(&(*text)[0], &length, 8);
      break;
    }
  }
}

void check_entries(const std::vector<TensorEntry>& tensors, size_t data_begin, size_t bytes) {
  uint64_t covered = 0;
  CHECK(data_begin <= bytes);
  for (const TensorEntry& entry : tensors) {
    CHECK(entry.begin == covered && entry.begin <= entry.end && entry.end <= bytes - data_begin);
    CHECK(entry.count() >= 0 && static_cast<uint64_t>(entry.count()) <= entry.end - entry.begin);
    for (const int64_t dim : entry.shape) CHECK(dim >= 0);
    covered = entry.end;
  }
  CHECK(covered == bytes - data_begin);
}

}  // namespace

DN_TEST(fuzz_safetensors_header) {
  const std::vector<std::string> seeds = file_seeds();
  Random random(20);
  int accepted = 0, refused = 0;
  for (int round = 0; round < 100000; ++round) {
    std::string file = seeds[random.below(seeds.size())];
    const uint64_t edits = 1 + random.below(4);
    for (uint64_t i = 0; i < edits; ++i) mutate(random, seeds, 8, &file);
    // An exact allocation, so that a read one byte past the end is seen.
    const std::vector<uint8_t> exact(file.begin(), file.end());
    std::vector<TensorEntry> tensors;
    std::map<std::string, std::string> metadata;
    size_t data_begin = 0;
    try {
      parse_safetensors(exact.data(), exact.size(), "fuzz", &tensors, &metadata, &data_begin);
      check_entries(tensors, data_begin, exact.size());
      ++accepted;
    } catch (const Error& e) {
      CHECK(e.code() == Code::kCheckpoint);
      CHECK_MSG(std::strlen(e.what()) < 1000, "a message longer than a screen");
      ++refused;
    }
  }
  // Both outcomes must be common, or the mutations test nothing.
  CHECK_MSG(accepted > 1000 && refused > 10000,
            std::to_string(accepted) + " accepted, " + std::to_string(refused) + " refused");
}

DN_TEST(fuzz_json) {
  const std::vector<std::string> seeds = {
      "{\"a\":[1,-2.5e3,true,false,null],\"b\":{\"c\":\"d\"}}",
      "\"\\u0041\\uD83D\\uDE00\\n\xC3\xA9\xE2\x82\xAC\xF0\x9F\x98\x80\"",
      std::string(30, '[') + "0" + std::string(30, ']'),
      "[\"" + std::string(300, 'x') + "\", 1234567890123456789012345678901234567890, 0.000001E-300]",
  };
  Random random(21);
  int accepted = 0, refused = 0;
  for (int round = 0; round < 100000; ++round) {
    std::string text = seeds[random.below(seeds.size())];
    const uint64_t edits = 1 + random.below(3);
    for (uint64_t i = 0; i < edits; ++i) mutate(random, seeds, 0, &text);
    const std::vector<char> exact(text.begin(), text.end());
    try {
      const JsonValue value = parse_json(exact.data(), exact.size(), JsonLimits(), "fuzz");
      uint64_t number = 0;
      value.to_uint64(&number);
      CHECK(value.kind != JsonValue::Kind::kString || is_utf8(value.text));
      ++accepted;
    } catch (const Error& e) {
      CHECK(e.code() == Code::kCheckpoint);
      ++refused;
    }
  }
  CHECK_MSG(accepted > 1000 && refused > 10000,
            std::to_string(accepted) + " accepted, " + std::to_string(refused) + " refused");
}
