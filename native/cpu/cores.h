// How many cores this process may use.
#pragma once

#include <string>

namespace dn::cpu {

// Threads of a region at most, the caller included.
constexpr int kMaxThreads = 1024;

// Cores by affinity mask and cgroup quota, at least 1. Asked once: later changes are not seen.
int available_threads();

#if defined(__linux__)
// The CPU quota of the process's cgroup and of those above it in whole cores, rounded up; 0 when there is
// none. `root` is where cgroups are mounted; `proc_self_cgroup` names the file that lists those of the
// process.
int cgroup_cores(const std::string& root, const std::string& proc_self_cgroup);
#endif

}  // namespace dn::cpu
