// A strict JSON reader (RFC 8259) for the headers of checkpoint files, which come from strangers: size, depth
// and number of values are bounded, text must be valid UTF-8, and an object that repeats a key is an error.
// Also the two helpers that go the other way: a string as a JSON literal, and a name made safe to show in a
// message.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace dn {

struct JsonValue {
  enum class Kind : uint8_t { kNull, kBool, kNumber, kString, kArray, kObject };
  Kind kind = Kind::kNull;
  bool boolean = false;
  std::string text;               // kString: the content in UTF-8; kNumber: the literal as written
  std::vector<std::string> keys;  // kObject: in the order of the file, all different
  std::vector<JsonValue> items;   // kArray: the elements; kObject: the values of `keys`

  // The value of a key; null when there is none, or when this is not an object.
  const JsonValue* find(const std::string& key) const;
  // True for a number written as a non-negative integer (no sign, fraction or exponent) that fits 64 bits.
  bool to_uint64(uint64_t* out) const;
};

struct JsonLimits {
  size_t bytes = size_t{100} << 20;
  int depth = 32;           // of nested arrays and objects
  size_t values = 1000000;  // in all; bounds the memory of the result to about 120 bytes each plus the text
};

// Parses one value that fills the whole text, apart from white space. Throws Error(kCheckpoint) that begins
// with `where` and names the byte and what was expected there.
JsonValue parse_json(const char* text, size_t bytes, const JsonLimits& limits, const std::string& where);

// Length of the valid UTF-8 sequence at text[0 .. bytes); 0 when it is none (overlong, surrogate, truncated,
// > U+10FFFF).
size_t utf8_length(const char* text, size_t bytes);
bool is_utf8(const std::string& text);

// `text`, which must be valid UTF-8, as a JSON string literal with its quotes.
std::string json_quote(const std::string& text);

// A name from a file for use in a message: quoted, escaped, cut to about 100 bytes.
std::string shown_name(const std::string& name);

}  // namespace dn
