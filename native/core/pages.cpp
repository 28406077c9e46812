// Anonymous mappings, see pages.h.

#include "core/pages.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <string>

#include "core/error.h"

namespace dn {
namespace {

// The size of a huge page on x86-64 and, with 4 KiB pages, on arm64.
constexpr size_t kHugePage = size_t{2} << 20;
// A smaller piece is taken as it comes: a huge page that is used in part would cost memory.
constexpr size_t kLarge = 2 * kHugePage;

size_t mapped(size_t bytes) { return bytes > 0 ? bytes : 1; }

}  // namespace

Pages::Pages(size_t bytes) : bytes_(bytes) {
  const size_t spare = bytes >= kLarge ? kHugePage : 0;
  void* map = bytes > SIZE_MAX - spare ? MAP_FAILED
                                       : mmap(nullptr, mapped(bytes) + spare, PROT_READ | PROT_WRITE,
                                              MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (map == MAP_FAILED) {
    throw Error(Code::kOutOfMemory, "cannot allocate " + std::to_string(bytes) + " bytes of host memory");
  }
  data_ = map;
  if (spare == 0) return;
  // Only aligned stretches get huge pages: what was taken before the first one, and the rest behind, goes
  // back.
  char* const begin = static_cast<char*>(map);
  const size_t before = (kHugePage - reinterpret_cast<uintptr_t>(map) % kHugePage) % kHugePage;
  data_ = begin + before;
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  const size_t kept = (bytes + page - 1) / page * page;
  if (before > 0) munmap(begin, before);
  munmap(begin + before + kept, spare - before);
#if defined(MADV_HUGEPAGE)
  madvise(data_, kept, MADV_HUGEPAGE);  // refused where there are none: small pages do
#endif
}

Pages::~Pages() { munmap(data_, mapped(bytes_)); }

}  // namespace dn
