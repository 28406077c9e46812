// Runs CUDA kernels on a CPU, one thread block at a time, so that the kernels' own sources can be tested
// where there is no GPU. Every CUDA thread is a fiber. What this is for is finding mistakes, so it is harsher
// than a GPU:
//   - warp collectives (shuffles, ldmatrix, mma) wait for all 32 lanes; lanes that meet at different calls
//   are a fault;
//   - block barriers likewise, and a thread that returns while others wait is a fault, as is any other
//   deadlock;
//   - an asynchronous copy destroys its target when issued and delivers only when waited for;
//   - shared memory starts as NaN and is fenced; warps, their lanes and blocks run in random order, greedily.
// Not modelled: memory ordering, bank conflicts, caches, speed. This header is the scheduler;
// emulator/device.h is what kernels see.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>

namespace dn::emulator {

// A kernel did what a GPU would punish, or might. The message says which thread of which block, and what.
class Fault : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

struct Grid {
  unsigned x = 1, y = 1, z = 1;
};

// Runs `body` once for every thread of every block; returns when all have ended. Throws Fault.
void run_grid(Grid grid, int threads, size_t shared_bytes, const std::function<void()>& body);

// Order of execution is a function of this; tests run with several.
void set_seed(uint64_t seed);

// Number of warp collectives and barriers completed since the start: tests of the emulator itself.
int64_t collectives();

// A deliberate mistake that a kernel makes when asked to (DN_PLANTED in the kernels), 0: none. Tests plant
// each and expect it to be caught.
extern int planted;

// What a running kernel asks of the scheduler.
int thread_index();
int block_threads();
Grid block_index();
void* shared_memory();
[[noreturn]] void fault(const std::string& what);

// Waits until all lanes of the warp have called with the same `call`; the last one runs combine(arguments of
// the 32 lanes). `call` identifies the operation and where it stands in the source.
void warp_collective(uint64_t call, void* argument, void (*combine)(void** arguments));
void block_barrier(uint64_t call);

// Copies of the calling thread.
void issue_copy(void* shared, const void* global, bool valid);
void commit_copies();
void wait_copies(int groups_left);

}  // namespace dn::emulator
