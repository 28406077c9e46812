// Runs the registered tests, or those whose name contains one of the arguments. --shard K/N, first: only
// every N-th of them, from the K-th on (1 .. N), so that N processes share the work. --count, first:
// prints how many there are and runs none. A test that takes long says how long. Ends with "N passed, N
// failed", or at once with 2 where the machine lacks the instruction set that DN_ISA names.

#include <chrono>
#include <cstdio>
#include <cstring>
#include <exception>

#include "cpu/isa.h"
#include "test/check.h"

int main(int argc, char** argv) {
  int shard = 1, shards = 1, first = 1;
  if (argc > 2 && std::strcmp(argv[1], "--shard") == 0) {
    if (std::sscanf(argv[2], "%d/%d", &shard, &shards) != 2 || shard < 1 || shard > shards) {
      std::fprintf(stderr, "--shard is %s, expected K/N with 1 <= K <= N\n", argv[2]);
      return 2;
    }
    first = 3;
  }
  try {
    dn::cpu::active_isa();
  } catch (const std::exception& e) {
    std::fprintf(stderr, "%s\n", e.what());
    return 2;
  }
  const bool count_only = argc > 1 && std::strcmp(argv[1], "--count") == 0;
  if (count_only) first = 2;
  int passed = 0, failed = 0, index = 0, found = 0;
  for (const auto& test : dn::test::registry()) {
    bool wanted = argc == first;
    for (int i = first; i < argc; ++i) wanted = wanted || std::strstr(test.name, argv[i]) != nullptr;
    found += wanted;
    if (!wanted || count_only || index++ % shards != shard - 1) continue;
    dn::test::failures() = 0;
    const auto start = std::chrono::steady_clock::now();
    try {
      test.run();
    } catch (const std::exception& e) {
      dn::test::fail(test.name, 0, std::string("threw: ") + e.what());
    }
    const int count = dn::test::failures();
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    std::printf("%s %s", count == 0 ? "ok  " : "FAIL", test.name);
    if (seconds.count() >= 1) std::printf(" (%.1f s)", seconds.count());
    std::printf("\n");
    std::fflush(stdout);
    count == 0 ? ++passed : ++failed;
  }
  if (count_only) {
    std::printf("%d\n", found);
    return 0;
  }
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 ? 0 : 1;
}
