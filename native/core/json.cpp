// Recursive descent over the text; the recursion is bounded by JsonLimits::depth.
#include "core/json.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <string_view>

#include "core/error.h"

namespace dn {

namespace {

void append_utf8(uint32_t code, std::string* out) {
  if (code < 0x80) {
    out->push_back(static_cast<char>(code));
  } else if (code < 0x800) {
    out->push_back(static_cast<char>(0xC0 | (code >> 6)));
    out->push_back(static_cast<char>(0x80 | (code & 0x3F)));
  } else if (code < 0x10000) {
    out->push_back(static_cast<char>(0xE0 | (code >> 12)));
    out->push_back(static_cast<char>(0x80 | ((code >> 6) & 0x3F)));
    out->push_back(static_cast<char>(0x80 | (code & 0x3F)));
  } else {
    out->push_back(static_cast<char>(0xF0 | (code >> 18)));
    out->push_back(static_cast<char>(0x80 | ((code >> 12) & 0x3F)));
    out->push_back(static_cast<char>(0x80 | ((code >> 6) & 0x3F)));
    out->push_back(static_cast<char>(0x80 | (code & 0x3F)));
  }
}

bool is_digit(char c) { return c >= '0' && c <= '9'; }

class Parser {
 public:
  Parser(const char* text, size_t bytes, const JsonLimits& limits, const std::string& where)
      : text_(text), bytes_(bytes), limits_(limits), where_(where) {}

  JsonValue document() {
    if (bytes_ > limits_.bytes) fail("at most " + std::to_string(limits_.bytes) + " bytes of JSON");
    JsonValue root;
    skip_space();
    value(&root, 0);
    skip_space();
    if (at_ != bytes_) fail("the end of the text");
    return root;
  }

 private:
  [[noreturn]] void fail(const std::string& expected) const {
    throw Error(Code::kCheckpoint,
                where_ + ": not valid JSON at byte " + std::to_string(at_) + ": expected " + expected);
  }

  bool more() const { return at_ < bytes_; }
  char peek() const { return at_ < bytes_ ? text_[at_] : '\0'; }

  void skip_space() {
    while (more() && (text_[at_] == ' ' || text_[at_] == '\n' || text_[at_] == '\r' || text_[at_] == '\t'))
      ++at_;
  }

  void expect(char c) {
    if (!more() || text_[at_] != c) fail(std::string("'") + c + "'");
    ++at_;
  }

  void literal(const char* word) {
    const size_t length = std::strlen(word);
    if (bytes_ - at_ < length || std::memcmp(text_ + at_, word, length) != 0) fail("a value");
    at_ += length;
  }

  void value(JsonValue* out, int depth) {
    if (++values_ > limits_.values) fail("at most " + std::to_string(limits_.values) + " values");
    switch (peek()) {
      case '{': return object(out, depth + 1);
      case '[': return array(out, depth + 1);
      case '"': out->kind = JsonValue::Kind::kString; return string(&out->text);
      case 't':
        out->kind = JsonValue::Kind::kBool;
        out->boolean = true;
        return literal("true");
      case 'f': out->kind = JsonValue::Kind::kBool; return literal("false");
      case 'n': out->kind = JsonValue::Kind::kNull; return literal("null");
      default: return number(out);
    }
  }

  void enter(int depth) {
    if (depth > limits_.depth) fail("at most " + std::to_string(limits_.depth) + " nested levels");
    ++at_;
    skip_space();
  }

  // After an element: true when another follows, false after the closing bracket.
  bool another(char close) {
    skip_space();
    if (more() && text_[at_] == close) {
      ++at_;
      return false;
    }
    if (!more() || text_[at_] != ',') fail(std::string("',' or '") + close + "'");
    ++at_;
    skip_space();
    return true;
  }

  void array(JsonValue* out, int depth) {
    out->kind = JsonValue::Kind::kArray;
    enter(depth);
    if (more() && text_[at_] == ']') {
      ++at_;
      return;
    }
    do {
      out->items.emplace_back();
      value(&out->items.back(), depth);
    } while (another(']'));
  }

  void object(JsonValue* out, int depth) {
    out->kind = JsonValue::Kind::kObject;
    enter(depth);
    if (more() && text_[at_] == '}') {
      ++at_;
      return;
    }
    do {
      if (peek() != '"') fail("a key in double quotes");
      out->keys.emplace_back();
      string(&out->keys.back());
      skip_space();
      expect(':');
      skip_space();
      out->items.emplace_back();
      value(&out->items.back(), depth);
    } while (another('}'));
    reject_duplicates(out->keys);
  }

  // By sorting, not hashing: nobody can choose names that make this slow.
  void reject_duplicates(const std::vector<std::string>& keys) const {
    std::vector<std::string_view> sorted(keys.begin(), keys.end());
    std::sort(sorted.begin(), sorted.end());
    const auto twice = std::adjacent_find(sorted.begin(), sorted.end());
    if (twice != sorted.end()) {
      throw Error(Code::kCheckpoint, where_ + ": the key " + shown_name(std::string(*twice)) +
                                         " appears twice in one JSON object, expected once");
    }
  }

  void number(JsonValue* out) {
    const size_t begin = at_;
    if (peek() == '-') ++at_;
    if (!is_digit(peek())) fail(at_ == begin ? "a value" : "a digit");
    if (text_[at_] == '0') {
      ++at_;
    } else {
      digits();
    }
    if (peek() == '.') {
      ++at_;
      digits();
    }
    if (peek() == 'e' || peek() == 'E') {
      ++at_;
      if (peek() == '+' || peek() == '-') ++at_;
      digits();
    }
    out->kind = JsonValue::Kind::kNumber;
    out->text.assign(text_ + begin, at_ - begin);
  }

  void digits() {
    if (!is_digit(peek())) fail("a digit");
    while (is_digit(peek())) ++at_;
  }

  void string(std::string* out) {
    ++at_;
    for (;;) {
      if (!more()) fail("'\"' at the end of a string");
      const unsigned char c = static_cast<unsigned char>(text_[at_]);
      if (c == '"') {
        ++at_;
        return;
      }
      if (c == '\\') {
        ++at_;
        escape(out);
      } else if (c < 0x20) {
        fail("no control characters in a string");
      } else {
        const size_t length = utf8_length(text_ + at_, bytes_ - at_);
        if (length == 0) fail("valid UTF-8");
        out->append(text_ + at_, length);
        at_ += length;
      }
    }
  }

  void escape(std::string* out) {
    const char c = peek();
    const char* const plain = "\"\\/bfnrt";
    const char* const found = c == '\0' ? nullptr : std::strchr(plain, c);
    if (found != nullptr) {
      ++at_;
      out->push_back("\"\\/\b\f\n\r\t"[found - plain]);
      return;
    }
    if (c != 'u') fail("one of \"\\/bfnrtu after a backslash");
    ++at_;
    uint32_t code = hex4();
    if (code >= 0xDC00 && code < 0xE000) fail("no second half of a surrogate pair without the first");
    if (code >= 0xD800 && code < 0xDC00) {
      if (bytes_ - at_ < 2 || text_[at_] != '\\' || text_[at_ + 1] != 'u')
        fail("the second half of a surrogate pair");
      at_ += 2;
      const uint32_t low = hex4();
      if (low < 0xDC00 || low >= 0xE000) fail("the second half of a surrogate pair");
      code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
    }
    append_utf8(code, out);
  }

  uint32_t hex4() {
    uint32_t code = 0;
    for (int i = 0; i < 4; ++i, ++at_) {
      const char c = peek();
      if (is_digit(c)) {
        code = code * 16 + static_cast<uint32_t>(c - '0');
      } else if ((c >= 'a' && c <= 'f') || (c >= 'A' && c <= 'F')) {
        code = code * 16 + static_cast<uint32_t>((c | 0x20) - 'a' + 10);
      } else {
        fail("four hexadecimal digits after \\u");
      }
    }
    return code;
  }

  const char* text_;
  size_t bytes_;
  const JsonLimits& limits_;
  const std::string& where_;
  size_t at_ = 0;
  size_t values_ = 0;
};

}  // namespace

const JsonValue* JsonValue::find(const std::string& key) const {
  for (size_t i = 0; i < keys.size(); ++i) {
    if (keys[i] == key) return &items[i];
  }
  return nullptr;
}

bool JsonValue::to_uint64(uint64_t* out) const {
  if (kind != Kind::kNumber) return false;
  uint64_t result = 0;
  for (const char c : text) {
    if (!is_digit(c)) return false;
    const uint64_t digit = static_cast<uint64_t>(c - '0');
    if (result > (UINT64_MAX - digit) / 10) return false;
    result = result * 10 + digit;
  }
  *out = result;
  return true;
}

JsonValue parse_json(const char* text, size_t bytes, const JsonLimits& limits, const std::string& where) {
  return Parser(text, bytes, limits, where).document();
}

size_t utf8_length(const char* text, size_t bytes) {
  if (bytes == 0) return 0;
  const auto at = [text](size_t i) { return static_cast<unsigned char>(text[i]); };
  const unsigned char first = at(0);
  if (first < 0x80) return 1;
  if (first < 0xC2 || first > 0xF4) return 0;
  const size_t length = first < 0xE0 ? 2 : first < 0xF0 ? 3 : 4;
  if (bytes < length) return 0;
  for (size_t i = 1; i < length; ++i) {
    if ((at(i) & 0xC0) != 0x80) return 0;
  }
  if (first == 0xE0 && at(1) < 0xA0) return 0;  // overlong
  if (first == 0xED && at(1) > 0x9F) return 0;  // surrogate
  if (first == 0xF0 && at(1) < 0x90) return 0;  // overlong
  if (first == 0xF4 && at(1) > 0x8F) return 0;  // above U+10FFFF
  return length;
}

bool is_utf8(const std::string& text) {
  for (size_t i = 0; i < text.size();) {
    const size_t length = utf8_length(text.data() + i, text.size() - i);
    if (length == 0) return false;
    i += length;
  }
  return true;
}

std::string json_quote(const std::string& text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      out.push_back('\\');
      out.push_back(c);
    } else if (static_cast<unsigned char>(c) < 0x20) {
      char escaped[8];
      std::snprintf(escaped, sizeof escaped, "\\u%04x", static_cast<unsigned>(c));
      out += escaped;
    } else {
      out.push_back(c);
    }
  }
  out.push_back('"');
  return out;
}

std::string shown_name(const std::string& name) {
  constexpr size_t kShown = 100;
  std::string kept;
  for (size_t i = 0; i < name.size();) {
    const size_t length = utf8_length(name.data() + i, name.size() - i);
    if (i + std::max<size_t>(length, 1) > kShown) {
      kept += "...";
      break;
    }
    if (length == 0) {
      kept.push_back('?');
    } else {
      kept.append(name, i, length);
    }
    i += std::max<size_t>(length, 1);
  }
  return json_quote(kept);
}

}  // namespace dn
