// The scheduler of the emulator: fibers, warps, barriers and asynchronous copies of one thread block.

#include "cuda/emulator/emulator.h"

#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#if defined(__x86_64__)
// Saves the callee-saved registers and the stack pointer to *save and continues where `load` was saved. A
// system call free swapcontext; the floating-point modes never change here.
extern "C" void dn_emulator_switch(void** save, void* load);
asm(R"(
.text
.type dn_emulator_switch, @function
dn_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size dn_emulator_switch, .-dn_emulator_switch
)");

#endif

namespace dn::emulator {

int planted = 0;

namespace {

constexpr int kLanes = 32;
constexpr size_t kStackBytes = 96 * 1024;
constexpr size_t kFenceBytes = 256;
constexpr unsigned char kFence = 0xA5;
constexpr size_t kCopyBytes = 16;

#if defined(__x86_64__)
struct Context {
  void* stack_pointer = nullptr;
  void prepare(char* stack, void (*entry)()) {
    // At `entry` the stack must be 8 modulo 16, as after a call.
    const uintptr_t top = (reinterpret_cast<uintptr_t>(stack) + kStackBytes) & ~uintptr_t{15};
    void** slot = reinterpret_cast<void**>(top - 16);
    slot[1] = nullptr;
    slot[0] = reinterpret_cast<void*>(entry);
    for (int i = 1; i <= 6; ++i) slot[-i] = nullptr;
    stack_pointer = slot - 6;
  }
  void switch_to(Context& other) { dn_emulator_switch(&stack_pointer, other.stack_pointer); }
};
#else
struct Context {
  ucontext_t context;
  void prepare(char* stack, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = kStackBytes;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }
  void switch_to(Context& other) { swapcontext(&context, &other.context); }
};
#endif

struct Copy {
  void* shared;
  const void* global;
  bool valid;
};

enum class State { kReady, kInWarp, kInBarrier, kDone };

struct Thread {
  Context context;
  State state = State::kReady;
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> groups;
};

struct Warp {
  int waiting = 0;
  uint64_t call = 0;
  void* arguments[kLanes];
};

struct Block {
  Grid index;
  int threads = 0;
  int live = 0;
  int current = 0;
  int at_barrier = 0;
  uint64_t barrier_call = 0;
  std::vector<Thread> thread;
  std::vector<Warp> warp;
  std::vector<unsigned char> shared;
  size_t shared_bytes = 0;
  Context scheduler;
  const std::function<void()>* body = nullptr;
  std::string fault;
};

Block* block = nullptr;
uint64_t random_state = 1;
int64_t completed = 0;

// Stacks are reused from block to block.
std::vector<std::unique_ptr<char[]>>& stacks() {
  static std::vector<std::unique_ptr<char[]>> pool;
  return pool;
}

unsigned random_below(unsigned n) {
  random_state = random_state * 6364136223846793005ull + 1442695040888963407ull;
  return static_cast<unsigned>((random_state >> 33) % n);
}

unsigned char* shared_begin(Block& b) {
  const uintptr_t start = reinterpret_cast<uintptr_t>(b.shared.data()) + kFenceBytes;
  return reinterpret_cast<unsigned char*>((start + 127) & ~uintptr_t{127});
}

void yield() { block->thread[static_cast<size_t>(block->current)].context.switch_to(block->scheduler); }

void entry() {
  (*block->body)();
  Thread& t = block->thread[static_cast<size_t>(block->current)];
  if (!t.open.empty()) fault("a thread ended with asynchronous copies it never committed");
  for (const auto& group : t.groups) {
    if (!group.empty()) fault("a thread ended with asynchronous copies it never waited for");
  }
  t.state = State::kDone;
  --block->live;
  yield();
}

std::string where(int thread) {
  return "block (" + std::to_string(block->index.x) + ", " + std::to_string(block->index.y) + ", " +
         std::to_string(block->index.z) + ") thread " + std::to_string(thread);
}

// Call identities carry the line in their low half.
std::string line_of(uint64_t call) { return "line " + std::to_string(call & 0xFFFFFFFFu); }

std::string describe_deadlock() {
  for (int t = 0; t < block->threads; ++t) {
    const Thread& thread = block->thread[static_cast<size_t>(t)];
    if (thread.state == State::kInWarp) {
      return "deadlock: " + where(t) + " waits for its warp at " +
             line_of(block->warp[static_cast<size_t>(t / kLanes)].call);
    }
  }
  for (int t = 0; t < block->threads; ++t) {
    if (block->thread[static_cast<size_t>(t)].state == State::kInBarrier)
      return "deadlock: " + where(t) + " waits at the block barrier of " + line_of(block->barrier_call);
  }
  return "deadlock";
}

bool run_warp(Block& b, size_t w) {
  bool any = false;
  const int first = static_cast<int>(random_below(kLanes)), step = random_below(2) ? 1 : kLanes - 1;
  for (int i = 0; i < kLanes; ++i) {
    const int t = static_cast<int>(w) * kLanes + (first + i * step) % kLanes;
    if (b.thread[static_cast<size_t>(t)].state != State::kReady) continue;
    any = true;
    b.current = t;
    b.scheduler.switch_to(b.thread[static_cast<size_t>(t)].context);
    if (!b.fault.empty()) return false;
  }
  return any;
}

void check_fences(Block& b) {
  unsigned char* const begin = shared_begin(b);
  for (size_t i = 0; i < kFenceBytes; ++i) {
    if (begin[b.shared_bytes + i] != kFence)
      b.fault = where(0) + ": a write beyond the end of shared memory, at byte " +
                std::to_string(b.shared_bytes + i);
  }
  for (unsigned char* p = b.shared.data(); p < begin; ++p) {
    if (*p != kFence) b.fault = where(0) + ": a write before the beginning of shared memory";
  }
}

void run_block(Block& b) {
  block = &b;
  while (static_cast<int>(stacks().size()) < b.threads)
    stacks().push_back(std::unique_ptr<char[]>(new char[kStackBytes]));
  b.thread.clear();
  b.thread.resize(static_cast<size_t>(b.threads));
  b.warp.assign(static_cast<size_t>(b.threads / kLanes), Warp());
  b.live = b.threads;
  b.at_barrier = 0;
  b.shared.assign(b.shared_bytes + 2 * kFenceBytes + 128, kFence);
  std::memset(shared_begin(b), 0xFF, b.shared_bytes);
  for (int t = 0; t < b.threads; ++t)
    b.thread[static_cast<size_t>(t)].context.prepare(stacks()[static_cast<size_t>(t)].get(), entry);

  std::vector<size_t> ready;
  while (b.live > 0 && b.fault.empty()) {
    ready.clear();
    for (size_t w = 0; w < b.warp.size(); ++w) {
      for (int lane = 0; lane < kLanes; ++lane) {
        if (b.thread[w * kLanes + static_cast<size_t>(lane)].state != State::kReady) continue;
        ready.push_back(w);
        break;
      }
    }
    if (ready.empty()) {
      b.fault = describe_deadlock();
      break;
    }
    // Mostly as far as it gets, so that warps drift apart; sometimes only a little.
    const size_t w = ready[random_below(static_cast<unsigned>(ready.size()))];
    while (run_warp(b, w) && random_below(64) != 0) {
    }
  }
  if (b.fault.empty()) check_fences(b);
  block = nullptr;
}

}  // namespace

void run_grid(Grid grid, int threads, size_t shared_bytes, const std::function<void()>& body) {
  if (threads < 1 || threads % kLanes != 0 || threads > 1024)
    throw Fault("a block of " + std::to_string(threads) +
                " threads; expected whole warps, 1024 threads at most");
  if (shared_bytes > 227 * 1024)
    throw Fault(std::to_string(shared_bytes) + " bytes of shared memory, more than any GPU has");
  if (grid.y > 65535 || grid.z > 65535) throw Fault("a grid of more than 65535 blocks in y or z");
  static Block b;
  b.threads = threads;
  b.shared_bytes = shared_bytes;
  b.body = &body;
  b.fault.clear();
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  // A random walk through all blocks: start anywhere, step by something that shares no factor with their
  // number.
  uint64_t at = blocks > 0 ? random_below(static_cast<unsigned>(blocks)) : 0,
           step = blocks > 2 ? blocks - 1 : 1;
  if (random_below(2)) step = 1;
  for (uint64_t i = 0; i < blocks; ++i, at = (at + step) % blocks) {
    b.index = {static_cast<unsigned>(at % grid.x), static_cast<unsigned>(at / grid.x % grid.y),
               static_cast<unsigned>(at / grid.x / grid.y)};
    run_block(b);
    if (!b.fault.empty()) throw Fault(b.fault);
  }
}

void set_seed(uint64_t seed) { random_state = seed * 2 + 1; }
int64_t collectives() { return completed; }

int thread_index() { return block->current; }
int block_threads() { return block->threads; }
Grid block_index() { return block->index; }
void* shared_memory() { return shared_begin(*block); }

// Leaves the block for good: its fibers are abandoned, and kernels own nothing that needs a destructor.
void fault(const std::string& what) {
  block->fault = where(block->current) + ": " + what;
  yield();
  std::abort();
}

void warp_collective(uint64_t call, void* argument, void (*combine)(void** arguments)) {
  const int t = block->current;
  Warp& w = block->warp[static_cast<size_t>(t / kLanes)];
  if (w.waiting == 0) w.call = call;
  if (w.call != call) {
    fault("divergent warp: this lane is at " + line_of(call) + ", others of its warp wait at " +
          line_of(w.call));
  }
  w.arguments[t % kLanes] = argument;
  if (++w.waiting < kLanes) {
    block->thread[static_cast<size_t>(t)].state = State::kInWarp;
    yield();
    return;
  }
  combine(w.arguments);
  w.waiting = 0;
  ++completed;
  for (int lane = 0; lane < kLanes; ++lane)
    block->thread[static_cast<size_t>(t / kLanes * kLanes + lane)].state = State::kReady;
}

void block_barrier(uint64_t call) {
  if (block->at_barrier == 0) block->barrier_call = call;
  if (block->barrier_call != call) {
    fault("divergent barrier: this thread is at " + line_of(call) + ", others wait at " +
          line_of(block->barrier_call));
  }
  if (++block->at_barrier < block->threads) {
    block->thread[static_cast<size_t>(block->current)].state = State::kInBarrier;
    yield();
    return;
  }
  block->at_barrier = 0;
  ++completed;
  for (Thread& t : block->thread) t.state = State::kReady;
}

void issue_copy(void* shared, const void* global, bool valid) {
  unsigned char* const begin = shared_begin(*block);
  unsigned char* const target = static_cast<unsigned char*>(shared);
  if (target < begin || target + kCopyBytes > begin + block->shared_bytes)
    fault("an asynchronous copy outside of shared memory, at byte " + std::to_string(target - begin));
  if (reinterpret_cast<uintptr_t>(shared) % kCopyBytes != 0 ||
      reinterpret_cast<uintptr_t>(global) % kCopyBytes != 0)
    fault("an asynchronous copy that is not aligned to 16 bytes");
  std::memset(shared, 0xFF, kCopyBytes);
  block->thread[static_cast<size_t>(block->current)].open.push_back({shared, global, valid});
}

void commit_copies() {
  Thread& t = block->thread[static_cast<size_t>(block->current)];
  t.groups.push_back(std::move(t.open));
  t.open.clear();
}

void wait_copies(int groups_left) {
  Thread& t = block->thread[static_cast<size_t>(block->current)];
  while (static_cast<int>(t.groups.size()) > groups_left) {
    for (const Copy& copy : t.groups.front()) {
      if (copy.valid) {
        std::memcpy(copy.shared, copy.global, kCopyBytes);
      } else {
        std::memset(copy.shared, 0, kCopyBytes);
      }
    }
    t.groups.pop_front();
  }
}

}  // namespace dn::emulator
