// The cores of this process, see cores.h.

#include "cpu/cores.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <thread>

#if defined(__linux__)
#include <sched.h>
#endif

namespace dn::cpu {

#if defined(__linux__)
namespace {

// Cores that a cgroup's quota is worth: of version 2 ("max 100000" or "150000 100000" in cpu.max), else of
// version 1. 0 when there is none.
double quota_of(const std::string& folder) {
  double quota = 0, period = 0;
  if (FILE* f = std::fopen((folder + "/cpu.max").c_str(), "re")) {
    if (std::fscanf(f, "%lf %lf", &quota, &period) != 2) quota = 0;
    std::fclose(f);
  } else {
    const auto number = [&](const char* name) {
      double value = 0;
      if (FILE* file = std::fopen((folder + name).c_str(), "re")) {
        if (std::fscanf(file, "%lf", &value) != 1) value = 0;
        std::fclose(file);
      }
      return value;
    };
    quota = number("/cpu.cfs_quota_us");
    period = number("/cpu.cfs_period_us");
  }
  return quota > 0 && period > 0 ? quota / period : 0;
}

// The cgroups of this process as /proc/self/cgroup lists them: "0::/path" of version 2, "4:cpu,cpuacct:/path"
// of version 1. Empty where the file does not say.
std::string cgroup_folder(const std::string& proc_self_cgroup) {
  std::string found;
  if (FILE* f = std::fopen(proc_self_cgroup.c_str(), "re")) {
    char line[4096];
    while (std::fgets(line, sizeof line, f) != nullptr) {
      const std::string text(line, std::strcspn(line, "\n"));
      const size_t first = text.find(':'),
                   second = first == std::string::npos ? first : text.find(':', first + 1);
      if (second == std::string::npos || text[second + 1] != '/') continue;
      const std::string controllers = "," + text.substr(first + 1, second - first - 1) + ",";
      if (controllers == ",,") {
        if (found.empty()) found = text.substr(second + 1);
      } else if (controllers.find(",cpu,") != std::string::npos) {
        found = "/cpu" + text.substr(second + 1);
      }
    }
    std::fclose(f);
  }
  return found;
}

}  // namespace

int cgroup_cores(const std::string& root, const std::string& proc_self_cgroup) {
  // A group is bound by what stands above it, too. In a container the path may be that of the host, of which
  // only the root is seen.
  double least = 0;
  for (std::string path = cgroup_folder(proc_self_cgroup);; path.resize(path.rfind('/'))) {
    while (!path.empty() && path.back() == '/') path.pop_back();
    const double cores = quota_of(root + path);
    if (cores > 0 && (least == 0 || cores < least)) least = cores;
    if (path.empty()) break;
  }
  if (least == 0) least = quota_of(root + "/cpu");
  return least == 0 ? 0 : std::max(1, static_cast<int>(std::ceil(std::min(least, double{kMaxThreads}))));
}
#endif

int available_threads() {
  static const int count = [] {
    int cores = static_cast<int>(std::thread::hardware_concurrency());
#if defined(__linux__)
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) cores = CPU_COUNT(&set);
    const int quota = cgroup_cores("/sys/fs/cgroup", "/proc/self/cgroup");
    if (quota > 0) cores = std::min(cores, quota);
#endif
    return std::max(1, std::min(cores, kMaxThreads));
  }();
  return count;
}

}  // namespace dn::cpu
