// The process-wide pool of worker threads. A parallel region hands out task numbers to the caller and the
// workers; which thread runs a task never changes a result. Regions of concurrent callers take turns
// of about a millisecond, so several models in one process neither oversubscribe the cores nor wait for each
// other's whole steps.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <type_traits>

#include "cpu/cores.h"

namespace dn::cpu {

class ThreadPool {
 public:
  using TaskFn = void (*)(void* context, int64_t task, int worker);

  static ThreadPool& shared();

  // Runs fn(context, task, worker) for task 0 .. tasks-1 on at most `threads` threads, worker in [0,
  // threads); returns when all are done. Tasks are claimed in order, one at a time. fn must not throw and
  // must not call run.
  void run(int64_t tasks, int threads, TaskFn fn, void* context);

 private:
  ThreadPool();
  ~ThreadPool();
  struct Impl;
  Impl* impl_;
};

// f(task, worker)
template <typename F>
void parallel(int threads, int64_t tasks, F&& f) {
  using Fn = std::remove_reference_t<F>;
  ThreadPool::shared().run(
      tasks, threads,
      [](void* context, int64_t task, int worker) { (*static_cast<Fn*>(context))(task, worker); },
      const_cast<void*>(static_cast<const void*>(&f)));
}

// The same for tasks whose neighbours work on neighbouring memory: every thread begins with its own share of
// them, in order, and then helps with what is left of the others'. A thread that meets the same rows in one
// region after the other finds them in its own caches.
template <typename F>
void parallel_near(int threads, int64_t tasks, F&& f) {
  constexpr int64_t kMostShares = 64;
  struct alignas(64) Share {
    std::atomic<int64_t> next;
    int64_t end;
  };
  const int64_t shares = std::min<int64_t>({threads, tasks, kMostShares});
  if (shares <= 1) return parallel(threads, tasks, f);
  Share share[kMostShares];
  for (int64_t i = 0; i < shares; ++i) {
    share[i].next.store(tasks * i / shares, std::memory_order_relaxed);
    share[i].end = tasks * (i + 1) / shares;
  }
  parallel(threads, std::min<int64_t>(threads, tasks), [&](int64_t, int worker) {
    for (int64_t i = 0; i < shares; ++i) {
      Share& s = share[(worker + i) % shares];
      for (int64_t task; (task = s.next.fetch_add(1, std::memory_order_relaxed)) < s.end;) f(task, worker);
    }
  });
}

}  // namespace dn::cpu
