// Runs the registered tests, or those whose name contains one of the arguments. Ends with "N passed, N
// failed".

#include <cstring>
#include <exception>

#include "test/check.h"

int main(int argc, char** argv) {
  int passed = 0, failed = 0;
  for (const auto& test : dn::test::registry()) {
    bool wanted = argc == 1;
    for (int i = 1; i < argc; ++i) wanted = wanted || std::strstr(test.name, argv[i]) != nullptr;
    if (!wanted) continue;
    dn::test::failures() = 0;
    try {
      test.run();
    } catch (const std::exception& e) {
      dn::test::fail(test.name, 0, std::string("threw: ") + e.what());
    }
    const int count = dn::test::failures();
    std::printf("%s %s\n", count == 0 ? "ok  " : "FAIL", test.name);
    std::fflush(stdout);
    count == 0 ? ++passed : ++failed;
  }
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 ? 0 : 1;
}
