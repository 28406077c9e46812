// The native test harness: DN_TEST registers a test, CHECK* count and report, main.cpp runs all or those
// whose name contains an argument. No Node, no framework.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

namespace dn::test {

// Sanitizers look for memory errors and slow a test down twenty times: what only adds cases is left out.
#if defined(__SANITIZE_ADDRESS__)
constexpr bool kSanitized = true;
#else
constexpr bool kSanitized = false;
#endif

struct Test {
  const char* name;
  void (*run)();
};

inline std::vector<Test>& registry() {
  static std::vector<Test> tests;
  return tests;
}

// Failures of the running test; reported and reset by main.cpp.
inline int& failures() {
  static int count = 0;
  return count;
}

struct Register {
  Register(const char* name, void (*run)()) { registry().push_back({name, run}); }
};

inline void fail(const char* file, int line, const std::string& what) {
  if (++failures() <= 20) std::printf("  %s:%d: %s\n", file, line, what.c_str());
}

// The worst |a - b| of two arrays, and where it is.
struct Difference {
  double max = 0;
  int64_t index = -1;
};

template <typename A, typename B>
Difference max_difference(const A* a, const B* b, int64_t n) {
  Difference worst;
  for (int64_t i = 0; i < n; ++i) {
    const double x = static_cast<double>(a[i]), y = static_cast<double>(b[i]);
    const double d = std::fabs(x - y);
    if (!(d <= worst.max)) worst = {d, i};  // NaN counts as worst
    if (std::isnan(d)) return worst;
  }
  return worst;
}

}  // namespace dn::test

#define DN_TEST(name)                                                        \
  static void dn_test_##name();                                              \
  static const dn::test::Register dn_register_##name{#name, dn_test_##name}; \
  static void dn_test_##name()

#define CHECK(condition)                                                           \
  do {                                                                             \
    if (!(condition)) dn::test::fail(__FILE__, __LINE__, "not true: " #condition); \
  } while (0)

#define CHECK_MSG(condition, message)                                \
  do {                                                               \
    if (!(condition)) dn::test::fail(__FILE__, __LINE__, (message)); \
  } while (0)

// |a - b| <= tolerance for every element; says the worst one with both values.
#define CHECK_CLOSE(a, b, n, tolerance, what)                                                          \
  do {                                                                                                 \
    const auto dn_d = dn::test::max_difference((a), (b), (n));                                         \
    if (!(dn_d.max <= (tolerance))) {                                                                  \
      dn::test::fail(__FILE__, __LINE__,                                                               \
                     std::string(what) + ": worst difference " + std::to_string(dn_d.max) + " at " +   \
                         std::to_string(dn_d.index) + " (" + std::to_string((double)(a)[dn_d.index]) + \
                         " against " + std::to_string((double)(b)[dn_d.index]) + "), allowed " +       \
                         std::to_string((double)(tolerance)));                                         \
    }                                                                                                  \
  } while (0)

// The statement must throw dn::Error with this code and a message that contains `part`.
#define CHECK_THROWS(statement, error_code, part)                                                       \
  do {                                                                                                  \
    bool dn_thrown = false;                                                                             \
    try {                                                                                               \
      statement;                                                                                        \
    } catch (const dn::Error& e) {                                                                      \
      dn_thrown = true;                                                                                 \
      if (e.code() != (error_code))                                                                     \
        dn::test::fail(__FILE__, __LINE__, std::string("wrong code: ") + e.what());                     \
      if (std::string(e.what()).find(part) == std::string::npos)                                        \
        dn::test::fail(__FILE__, __LINE__, std::string("message lacks '") + (part) + "': " + e.what()); \
    }                                                                                                   \
    if (!dn_thrown) dn::test::fail(__FILE__, __LINE__, "did not throw: " #statement);                   \
  } while (0)
