/* LD_PRELOAD library for an engine that starts unpinned spinning worker threads (ggml), which may share a core for seconds: the
 * k-th thread started by a library whose name contains "libggml" runs on the (k + 1)-th core this process may use, and the thread
 * that starts it on the first. Linux with glibc. Built by the benchmark: cc -O2 -shared -fPIC pin_threads.c -ldl */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <sched.h>
#include <string.h>

typedef int (*Create)(pthread_t*, const pthread_attr_t*, void* (*)(void*), void*);

/* The n-th core of `allowed`, counted around. */
static cpu_set_t core(const cpu_set_t* allowed, int n) {
  cpu_set_t one;
  CPU_ZERO(&one);
  n %= CPU_COUNT(allowed);
  for (int i = 0; i < CPU_SETSIZE; ++i) {
    if (CPU_ISSET(i, allowed) && n-- == 0) {
      CPU_SET(i, &one);
      break;
    }
  }
  return one;
}

int pthread_create(pthread_t* thread, const pthread_attr_t* attributes, void* (*start)(void*), void* argument) {
  static Create create;
  static cpu_set_t allowed;
  static int count;
  if (!create) {
    create = (Create)dlsym(RTLD_NEXT, "pthread_create");
    sched_getaffinity(0, sizeof allowed, &allowed);
  }
  Dl_info info;
  if (!dladdr((void*)start, &info) || !info.dli_fname || !strstr(info.dli_fname, "libggml"))
    return create(thread, attributes, start, argument);
  /* Worker threads are started anew for every computation, so that the count goes around with the cores but the first. */
  const int cores = CPU_COUNT(&allowed);
  const int worker = cores > 1 ? 1 + __sync_fetch_and_add(&count, 1) % (cores - 1) : 0;
  const cpu_set_t first = core(&allowed, 0), own = core(&allowed, worker);
  pthread_attr_t pinned;
  pthread_attr_init(&pinned);
  pthread_attr_setaffinity_np(&pinned, sizeof own, &own);
  const int result = create(thread, &pinned, start, argument);
  pthread_attr_destroy(&pinned);
  pthread_setaffinity_np(pthread_self(), sizeof first, &first);
  return result;
}
