// The thread pool and the choice of instruction set.

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

#include "cpu/fair_mutex.h"
#include "cpu/isa.h"
#include "cpu/thread_pool.h"
#include "test/check.h"
#include "test/temporary_folder.h"

namespace {

using namespace dn::cpu;

// run(threads, tasks, f) is a parallel region: every task runs once, on a worker that there is.
template <typename Run>
void check_every_task_runs_once(Run run) {
  for (int threads = 1; threads <= 8; ++threads) {
    for (const int64_t tasks : {0, 1, 2, 7, 1000}) {
      std::vector<std::atomic<int>> runs(static_cast<size_t>(tasks));
      std::atomic<int> bad_worker{0};
      run(threads, tasks, [&](int64_t task, int worker) {
        ++runs[static_cast<size_t>(task)];
        if (worker < 0 || worker >= threads) ++bad_worker;
      });
      for (const auto& count : runs) CHECK(count == 1);
      CHECK(bad_worker == 0);
    }
  }
}

DN_TEST(thread_pool_runs_every_task_once) {
  check_every_task_runs_once([](int threads, int64_t tasks, auto&& f) { parallel(threads, tasks, f); });
}

DN_TEST(thread_pool_near_tasks_run_once_and_begin_with_the_thread_s_own) {
  check_every_task_runs_once([](int threads, int64_t tasks, auto&& f) { parallel_near(threads, tasks, f); });
  // With one task a thread, held until all have begun, everybody runs its own.
  std::atomic<int> begun{0};
  std::vector<std::atomic<int>> owner(4);
  parallel_near(4, 4, [&](int64_t task, int worker) {
    owner[static_cast<size_t>(task)] = worker;
    ++begun;
    const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(5);
    while (begun < 4 && std::chrono::steady_clock::now() < end) std::this_thread::yield();
  });
  CHECK(begun == 4);
  for (int i = 0; i < 4; ++i) CHECK(owner[static_cast<size_t>(i)] == i);
}

// No two threads may share a worker number: per-worker buffers rely on it.
DN_TEST(thread_pool_worker_numbers_are_exclusive) {
  std::atomic<bool> inside[8] = {};
  std::atomic<int> clashes{0};
  for (int region = 0; region < 200; ++region) {
    parallel(8, 32, [&](int64_t, int worker) {
      if (inside[worker].exchange(true)) ++clashes;
      std::this_thread::yield();
      inside[worker] = false;
    });
  }
  CHECK(clashes == 0);
}

// What a region wrote is visible after it, and what was written before is visible inside: 10^4 small regions.
DN_TEST(thread_pool_many_small_regions) {
  for (const int threads : {2, 3, 8}) {
    const int64_t tasks = 5;
    std::vector<int64_t> values(tasks, 0);
    const int regions = 10000;
    for (int region = 0; region < regions; ++region) {
      parallel(threads, tasks, [&](int64_t task, int) { values[static_cast<size_t>(task)] += task + 1; });
      if (region % 2500 == 0)
        std::this_thread::sleep_for(std::chrono::milliseconds(1));  // workers fall asleep
    }
    for (int64_t task = 0; task < tasks; ++task)
      CHECK(values[static_cast<size_t>(task)] == (task + 1) * regions);
  }
}

DN_TEST(thread_pool_concurrent_callers) {
  std::vector<std::thread> callers;
  std::atomic<int> wrong{0};
  for (int caller = 0; caller < 2; ++caller) {
    callers.emplace_back([&wrong, caller] {
      for (int region = 0; region < 3000; ++region) {
        std::vector<int64_t> out(9, 0);
        parallel(caller + 2, 9,
                 [&](int64_t task, int) { out[static_cast<size_t>(task)] = task * region + caller; });
        for (int64_t task = 0; task < 9; ++task)
          wrong += out[static_cast<size_t>(task)] != task * region + caller;
      }
    });
  }
  for (auto& caller : callers) caller.join();
  CHECK(wrong == 0);
}

// Who has waited longer than kPatience is next, even if the owner asks again at once.
DN_TEST(fair_mutex_is_handed_to_who_has_waited) {
  FairMutex mutex;
  for (int round = 0; round < 20; ++round) {
    std::atomic<bool> had{false};
    mutex.lock();
    std::thread other([&] {
      std::lock_guard<FairMutex> lock(mutex);
      had = true;
    });
    while (mutex.waiting() == 0) std::this_thread::yield();
    std::this_thread::sleep_for(2 * FairMutex::kPatience);
    mutex.unlock();
    mutex.lock();
    CHECK(had);
    mutex.unlock();
    other.join();
  }
}

// Regions of a caller that has one after the other do not keep another caller waiting for all of them.
DN_TEST(thread_pool_callers_take_turns) {
  constexpr int kRegions = 10, kMost = 4000;
  std::atomic<bool> done{false}, begun{false};
  std::atomic<int> greedy{0};
  std::thread other([&] {
    while (!done && greedy < kMost) {
      parallel(2, 2, [&](int64_t, int) {
        const auto end = std::chrono::steady_clock::now() + std::chrono::microseconds(500);
        while (std::chrono::steady_clock::now() < end) continue;
      });
      ++greedy;
      begun = true;
    }
  });
  while (!begun) std::this_thread::yield();
  for (int region = 0; region < kRegions; ++region) parallel(2, 2, [](int64_t, int) {});
  done = true;
  other.join();
  CHECK_MSG(greedy < kMost / 4, std::to_string(greedy) + " regions went before " + std::to_string(kRegions));
}

#if defined(__linux__)
// Quotas of the process's own cgroup and of those above it, for both versions of cgroups.
DN_TEST(available_cores_follow_the_quotas_of_cgroups) {
  const dn::TemporaryFolder folder;
  const std::string root = folder / "cgroup";
  const auto write = [&](const std::string& path, const std::string& text) {
    std::filesystem::create_directories((root + path).substr(0, (root + path).rfind('/')));
    std::ofstream(root + path) << text;
  };
  const auto cores = [&](const char* groups) {
    write("/self", groups);
    return cgroup_cores(root, root + "/self");
  };
  CHECK(cores("0::/\n") == 0);
  write("/a/b/cpu.max", "max 100000\n");
  CHECK(cores("0::/a/b\n") == 0);
  write("/a/b/cpu.max", "250000 100000\n");
  CHECK(cores("0::/a/b\n") == 3);
  CHECK(cores("0::/a\n") == 0);
  write("/a/cpu.max", "150000 100000\n");
  CHECK(cores("0::/a/b\n") == 2);
  CHECK(cores("0::/not/seen/here\n") == 0);
  write("/cpu.max", "1000 100000\n");
  CHECK(cores("0::/not/seen/here\n") == 1);
  CHECK(cores("0::/a/b\n") == 1);
  std::filesystem::remove(root + "/cpu.max");
  write("/cpu/c/cpu.cfs_quota_us", "400000\n");
  write("/cpu/c/cpu.cfs_period_us", "100000\n");
  CHECK(cores("3:memory:/a/b\n4:cpu,cpuacct:/c\n0::/a/b\n") == 4);
  write("/cpu/c/cpu.cfs_quota_us", "-1\n");
  CHECK(cores("4:cpu,cpuacct:/c\n") == 0);
  CHECK(cores("nonsense\n5:cpu:nonsense\n") == 0);
}
#endif

// Two tasks that wait for each other finish only when two threads really run them.
DN_TEST(thread_pool_tasks_run_at_the_same_time) {
  std::atomic<int> arrived{0};
  std::atomic<int> met{0};
  parallel(2, 2, [&](int64_t, int) {
    ++arrived;
    const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(20);
    while (arrived < 2 && std::chrono::steady_clock::now() < end) std::this_thread::yield();
    met += arrived == 2;
  });
  CHECK(met == 2);
}

DN_TEST(isa_is_one_the_machine_has) {
  CHECK(available_threads() >= 1);
  CHECK(active_isa() <= detected_isa());
  const char* const forced = std::getenv("DN_ISA");
  if (forced == nullptr || *forced == '\0') {
    CHECK(active_isa() == detected_isa());
  } else {
    CHECK(std::string(isa_name(active_isa())) == forced);
  }
}

}  // namespace
