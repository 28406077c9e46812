// The pool: workers start when first needed, spin for a moment after a region, give way to whoever else wants
// the core for a little longer, and then sleep, so that idle threads cost the host nothing. A region is never
// late because of a sleeper: a worker that wakes after the last task was claimed finds the region closed and
// is not waited for.

#include "cpu/thread_pool.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include "cpu/fair_mutex.h"
#include "cpu/isa.h"

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#include <pthread.h>
#include <signal.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace dn::cpu {
namespace {

// How long a worker looks for the next region, and the caller for its workers, without letting go of the
// core.
constexpr std::chrono::microseconds kSpin{30};
// How long after that it looks between yields: the host's own work between two steps of a loop takes less,
// and waking a sleeper can take longer than a step.
constexpr std::chrono::microseconds kYield{1000};
// How long a system that refused a thread is not asked for another one.
constexpr std::chrono::seconds kRefused{1};

// Region state word: number in the upper half, closed flag, workers inside.
constexpr uint64_t kClosed = uint64_t{1} << 31;
constexpr uint64_t kInside = kClosed - 1;
constexpr uint64_t kNextRegion = uint64_t{1} << 32;

void cpu_pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Calls done() until it is true or kSpin and then `yields` have passed; says which.
template <typename F>
bool spin_until(std::chrono::microseconds yields, F&& done) {
  const auto end = std::chrono::steady_clock::now() + kSpin;
  for (;;) {
    for (int i = 0; i < 16; ++i) {
      if (done()) return true;
      cpu_pause();
    }
    const auto now = std::chrono::steady_clock::now();
    if (now >= end + yields) return done();
    if (now >= end) std::this_thread::yield();
  }
}

// Keeps this library mapped for good: sleeping workers would return into unmapped code if the host closed it.
void pin_library() {
#if (defined(__linux__) || defined(__APPLE__)) && defined(RTLD_NODELETE)
  Dl_info info;
  if (dladdr(reinterpret_cast<const void*>(&pin_library), &info) != 0 && info.dli_fname != nullptr) {
    dlopen(info.dli_fname, RTLD_LAZY | RTLD_NOLOAD | RTLD_NODELETE);
  }
#endif
}

}  // namespace

struct ThreadPool::Impl {
  struct Worker {
    std::mutex mutex;
    std::condition_variable wake;
    bool sleeping = false;  // guarded by mutex
  };

  FairMutex turn;  // held by the caller whose region runs

  // The region; written by the caller while closed, read by workers that have entered.
  TaskFn fn = nullptr;
  void* context = nullptr;
  int64_t tasks = 0;
  std::atomic<int64_t> next{0};
  std::atomic<int> limit{0};  // workers with a smaller number take part
  std::atomic<bool> spin{true};
  alignas(64) std::atomic<uint64_t> state{kClosed};

  std::mutex done_mutex;
  std::condition_variable done;
  std::vector<Worker*> workers;                 // workers[i] is worker i + 1; never shrinks, never freed
  std::chrono::steady_clock::time_point again;  // not before it is the system asked for another thread

  void work(int worker) {
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;)
      fn(context, task, worker);
  }

  // Enters region `number` (upper half of the state) unless it has closed.
  bool enter(uint64_t number) {
    uint64_t seen = state.load(std::memory_order_acquire);
    while ((seen & ~kInside) == number) {
      if (state.compare_exchange_weak(seen, seen + 1, std::memory_order_acq_rel)) return true;
    }
    return false;
  }

  void leave() {
    const uint64_t before = state.fetch_sub(1, std::memory_order_acq_rel);
    if ((before & kClosed) != 0 && (before & kInside) == 1) {
      std::lock_guard<std::mutex> lock(done_mutex);
      done.notify_one();
    }
  }

  // The body of worker `id`; returns never.
  [[noreturn]] void serve(int id, Worker& self) {
    uint64_t last = 0;  // number of the last region seen
    const auto called = [&] {
      const uint64_t seen = state.load(std::memory_order_acquire);
      return (seen & kClosed) == 0 && (seen & ~kInside) != last && id < limit.load(std::memory_order_relaxed);
    };
    for (;;) {
      if (!(spin.load(std::memory_order_relaxed) && spin_until(kYield, called))) {
        std::unique_lock<std::mutex> lock(self.mutex);
        self.sleeping = true;
        self.wake.wait(lock, called);
        self.sleeping = false;
      }
      last = state.load(std::memory_order_acquire) & ~(kInside | kClosed);
      if (!enter(last)) continue;
      if (id < limit.load(std::memory_order_relaxed)) work(id);
      leave();
    }
  }

  // Starts workers 1 .. count if they are missing. Fewer than asked for when the system refuses threads.
  int start(int count) {
    const auto now = std::chrono::steady_clock::now();
    if (static_cast<int>(workers.size()) < count && now < again) count = static_cast<int>(workers.size());
    if (workers.empty()) {
      pin_library();
      detected_isa();  // asks for the AMX state, which threads inherit
    }
#if defined(__unix__) || defined(__APPLE__)
    sigset_t all, old;  // signals are the host's business
    sigfillset(&all);
    const bool masked =
        static_cast<int>(workers.size()) < count && pthread_sigmask(SIG_SETMASK, &all, &old) == 0;
#endif
    while (static_cast<int>(workers.size()) < count) {
      Worker* worker = nullptr;
      try {
        workers.reserve(workers.size() + 1);
        worker = new Worker;
        const int id = static_cast<int>(workers.size()) + 1;
        std::thread([this, id, worker] { serve(id, *worker); }).detach();
        workers.push_back(worker);
      } catch (const std::exception&) {
        delete worker;
        again = now + kRefused;
        break;
      }
    }
#if defined(__unix__) || defined(__APPLE__)
    if (masked) pthread_sigmask(SIG_SETMASK, &old, nullptr);
#endif
    return std::min(count, static_cast<int>(workers.size()));
  }
};

ThreadPool::ThreadPool() : impl_(new Impl) {}
ThreadPool::~ThreadPool() = default;

ThreadPool& ThreadPool::shared() {
  static ThreadPool* const pool = new ThreadPool;  // never freed: workers may outlive static destruction
  return *pool;
}

void ThreadPool::run(int64_t tasks, int threads, TaskFn fn, void* context) {
  if (tasks <= 0) return;
  const int wanted = static_cast<int>(std::min<int64_t>({tasks, threads, kMaxThreads}));
  if (wanted <= 1) {
    for (int64_t task = 0; task < tasks; ++task) fn(context, task, 0);
    return;
  }
  Impl& pool = *impl_;
  std::lock_guard<FairMutex> turn(pool.turn);
  const int helpers = pool.start(wanted - 1);
  pool.fn = fn;
  pool.context = context;
  pool.tasks = tasks;
  pool.next.store(0, std::memory_order_relaxed);
  pool.limit.store(helpers + 1, std::memory_order_relaxed);
  pool.spin.store(wanted <= available_threads(), std::memory_order_relaxed);
  const uint64_t number = (pool.state.load(std::memory_order_relaxed) & ~(kInside | kClosed)) + kNextRegion;
  pool.state.store(number, std::memory_order_release);
  for (int i = 0; i < helpers; ++i) {
    Impl::Worker& worker = *pool.workers[static_cast<size_t>(i)];
    bool sleeping;
    {
      std::lock_guard<std::mutex> lock(worker.mutex);
      sleeping = worker.sleeping;
    }
    if (sleeping) worker.wake.notify_one();
  }

  pool.work(0);

  const uint64_t before = pool.state.fetch_or(kClosed, std::memory_order_acq_rel);
  if ((before & kInside) == 0) return;
  const auto empty = [&] { return (pool.state.load(std::memory_order_acquire) & kInside) == 0; };
  if (pool.spin.load(std::memory_order_relaxed) && spin_until({}, empty)) return;
  std::unique_lock<std::mutex> lock(pool.done_mutex);
  pool.done.wait(lock, empty);
}

}  // namespace dn::cpu
