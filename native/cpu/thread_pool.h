// The process-wide pool of worker threads. A parallel region hands out task numbers to the caller and the
// workers; which thread runs a task never changes a result. Regions of concurrent callers take turns, so
// several models in one process do not oversubscribe the cores.
#pragma once

#include <cstdint>
#include <type_traits>

namespace dn::cpu {

// Cores this process may use (affinity mask, cgroup quota), at least 1.
int available_threads();

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

}  // namespace dn::cpu
