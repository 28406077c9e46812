// The JSON reader: what it accepts, what it refuses and where, and its bounds.
#include <string>

#include "core/error.h"
#include "core/json.h"
#include "test/check.h"

namespace {

using namespace dn;
using Kind = JsonValue::Kind;

JsonValue parse(const std::string& text, const JsonLimits& limits = {}) {
  return parse_json(text.data(), text.size(), limits, "header of x");
}

std::string nested(size_t depth) { return std::string(depth, '[') + std::string(depth, ']'); }

}  // namespace

DN_TEST(json_reads_every_kind_of_value) {
  const JsonValue root = parse(" {\"a\" : [1, -2.5e+3, true, false, null], \"b\":{\"\":\"\"}, \"c\":[]}\n");
  CHECK(root.kind == Kind::kObject && root.keys.size() == 3);
  const JsonValue* a = root.find("a");
  CHECK(a != nullptr && a->kind == Kind::kArray && a->items.size() == 5);
  CHECK(a->items[0].text == "1" && a->items[1].text == "-2.5e+3");
  CHECK(a->items[2].kind == Kind::kBool && a->items[2].boolean);
  CHECK(a->items[3].kind == Kind::kBool && !a->items[3].boolean);
  CHECK(a->items[4].kind == Kind::kNull);
  CHECK(root.find("b")->find("")->kind == Kind::kString);
  CHECK(root.find("c")->items.empty());
  CHECK(root.find("d") == nullptr && a->find("a") == nullptr);
}

DN_TEST(json_decodes_escapes_and_unicode) {
  CHECK(parse("\"\\\"\\\\\\/\\b\\f\\n\\r\\t\"").text == "\"\\/\b\f\n\r\t");
  CHECK(parse("\"\\u0041\\u00e9\\u20AC\\uD83D\\ude00\"").text == "A\xC3\xA9\xE2\x82\xAC\xF0\x9F\x98\x80");
  CHECK(parse("\"\xC3\xA9\xE2\x82\xAC\xF0\x9F\x98\x80\x7F\"").text ==
        "\xC3\xA9\xE2\x82\xAC\xF0\x9F\x98\x80\x7F");
  CHECK(parse("\"a\\u0000b\"").text == std::string("a\0b", 3));
  // U+D7FF, U+E000 and U+10FFFF are the neighbours of what is not allowed.
  CHECK(parse("\"\xED\x9F\xBF\xEE\x80\x80\xF4\x8F\xBF\xBF\"").text.size() == 10);
}

DN_TEST(json_refuses_malformed_text) {
  const char* const bad[] = {"", " ", "{", "}", "[", "]", "[1", "[1,", "[1,]", "[,1]", "[1 2]", "{\"a\"}",
                             "{\"a\":}", "{\"a\":1,}", "{a:1}", "{'a':1}", "{\"a\":1 \"b\":2}", "{1:2}",
                             "tru", "True", "nul", "NaN", "Infinity", "-", "+1", "01", "-01", ".5", "1.",
                             "1.e5", "1e", "1e+", "0x10", "1 2", "[] []", "//c\n1", "/**/1", "\"", "\"a",
                             "\"\\", "\"\\x41\"", "\"\\u12\"", "\"\\u123g\"", "\"\\uD800\"", "\"\\uD800x\"",
                             "\"\\uD800\\n\"", "\"\\uD800\\u0041\"", "\"\\uDC00\"", "\"\\uD800\\uD800\"",
                             "\"\n\"", "\"\t\"", "\"\x01\"", "\xEF\xBB\xBF{}",
                             // Not UTF-8: stray continuation, overlong, surrogate, above U+10FFFF, cut short.
                             "\"\x80\"", "\"\xC0\x80\"", "\"\xC1\xBF\"", "\"\xE0\x9F\xBF\"",
                             "\"\xED\xA0\x80\"", "\"\xF0\x8F\xBF\xBF\"", "\"\xF4\x90\x80\x80\"",
                             "\"\xF5\x80\x80\x80\"", "\"\xFF\"", "\"\xE2\x82\"", "\"\xE2\x82"};
  for (const char* text : bad) {
    CHECK_THROWS(parse(text), Code::kCheckpoint, "header of x: not valid JSON at byte ");
  }
  CHECK_THROWS(parse(std::string("1\0", 2)), Code::kCheckpoint, "at byte 1: expected the end");
  CHECK_THROWS(parse(std::string("\"\\\0\"", 4)), Code::kCheckpoint, "after a backslash");
}

DN_TEST(json_refuses_duplicate_keys_however_they_are_written) {
  CHECK_THROWS(parse("{\"a\":1,\"b\":2,\"a\":3}"), Code::kCheckpoint, "the key \"a\" appears twice");
  CHECK_THROWS(parse("[{\"x\":{\"a\":1,\"\\u0061\":1}}]"), Code::kCheckpoint, "appears twice");
  CHECK(parse("[{\"a\":1},{\"a\":1}]").items.size() == 2);
}

DN_TEST(json_keeps_its_bounds) {
  JsonLimits limits;
  limits.depth = 5;
  CHECK(parse(nested(5), limits).kind == Kind::kArray);
  CHECK_THROWS(parse(nested(6), limits), Code::kCheckpoint, "at most 5 nested levels");
  CHECK_THROWS(parse(std::string(1000000, '[')), Code::kCheckpoint, "at most 32 nested levels");
  limits = {};
  limits.values = 4;
  CHECK(parse("[1,2,3]", limits).items.size() == 3);
  CHECK_THROWS(parse("[1,2,3,4]", limits), Code::kCheckpoint, "at most 4 values");
  limits = {};
  limits.bytes = 4;
  CHECK_THROWS(parse("[1,2]", limits), Code::kCheckpoint, "at most 4 bytes");
}

DN_TEST(json_integers_are_exact_or_refused) {
  uint64_t value = 7;
  CHECK(parse("0").to_uint64(&value) && value == 0);
  CHECK(parse("18446744073709551615").to_uint64(&value) && value == UINT64_MAX);
  for (const char* text : {"18446744073709551616", "18446744073709551620", "99999999999999999999999", "-1",
                           "-0", "1.0", "1e3", "\"1\"", "null", "[1]"}) {
    CHECK_MSG(!parse(text).to_uint64(&value), std::string("accepted ") + text);
  }
}

DN_TEST(json_quoting_reads_back) {
  const std::string text =
      std::string("plain \"quoted\" back\\slash \n\t\x01\x1F") + '\0' + "\x7F\xC3\xA9\xF0\x9F\x98\x80";
  CHECK(parse(json_quote(text)).text == text);
  CHECK(is_utf8(text) && !is_utf8("a\xFF") && !is_utf8("\xE2\x82"));
  CHECK(shown_name("a\nb\xFF") == "\"a\\u000ab?\"");
  const std::string shown = shown_name(std::string(99, 'x') + "\xC3\xA9" + std::string(1000000, 'y'));
  CHECK(shown == "\"" + std::string(99, 'x') + "...\"");
}
