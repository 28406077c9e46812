// The host's side of the emulated device: memory that the host cannot touch outside of launches and copies.
// New memory is NaN, and every piece is fenced: a write beyond its end is found when it is freed. memory.h
// limits it, to test running out.

#include "cuda/runtime.h"

#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <utility>
#include <vector>

#include "core/error.h"
#include "cuda/emulator/emulator.h"
#include "cuda/emulator/memory.h"

namespace dn::emulator {
namespace {

// All device memory there is: address space, of which only what is written becomes memory.
constexpr size_t kArenaBytes = size_t{1} << 32;

unsigned char* arena() {
  static unsigned char* const base = [] {
    void* const p = mmap(nullptr, kArenaBytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw Fault("the emulator cannot reserve its device memory");
    return static_cast<unsigned char*>(p);
  }();
  return base;
}

int access_depth = 0;

// Streams are always idle, except that one may be recording.
struct EmulatedStream {
  bool capturing = false;
  std::vector<std::function<void()>> recorded;
};
// The stream that this thread captures.
thread_local EmulatedStream* captured = nullptr;

void refuse_in_capture(const char* what) {
  if (captured) throw Error(Code::kDevice, std::string(what) + " while a graph is captured");
}

std::recursive_mutex& device_mutex() {
  static std::recursive_mutex mutex;
  return mutex;
}

}  // namespace

bool record(void* stream, std::function<void()> work) {
  EmulatedStream* const s = static_cast<EmulatedStream*>(stream);
  if (!s || !s->capturing) return false;
  s->recorded.push_back(std::move(work));
  return true;
}

GraphCounts& graph_counts() {
  static GraphCounts counts;
  return counts;
}

MemoryState& memory() {
  static MemoryState state;
  return state;
}

DeviceAccess::DeviceAccess() : lock_(device_mutex()) {
  if (access_depth++ == 0) mprotect(arena(), kArenaBytes, PROT_READ | PROT_WRITE);
}
DeviceAccess::~DeviceAccess() {
  if (--access_depth == 0) mprotect(arena(), kArenaBytes, PROT_NONE);
}

}  // namespace dn::emulator

namespace dn::cuda {
namespace {

constexpr size_t kFence = 256;
constexpr unsigned char kFenceByte = 0xFF;  // NaN in every type: reading beyond a piece shows

size_t padded_bytes(size_t bytes) { return (bytes + 2 * kFence + 255) / 256 * 256; }

}  // namespace

std::vector<Device> list_devices(std::string*) {
  Device device;
  device.name = "emulator";
  device.memory = size_t{1} << 34;
  device.major = 8;
  device.multiprocessors = 4;
  return {device};
}

void select_device(int) {}
Stream create_stream() {
  const emulator::DeviceAccess access;
  ++emulator::memory().handles;
  return new emulator::EmulatedStream;
}
void destroy_stream(Stream stream) {
  const emulator::DeviceAccess access;
  --emulator::memory().handles;
  delete static_cast<emulator::EmulatedStream*>(stream);
}
void synchronize(Stream) { emulator::refuse_in_capture("waiting for the device"); }

void* device_alloc(size_t bytes) {
  emulator::refuse_in_capture("allocating device memory");
  const emulator::DeviceAccess access;
  emulator::MemoryState& state = emulator::memory();
  if (state.used + bytes > state.limit) {
    throw Error(Code::kOutOfMemory, "the device has " + std::to_string(state.limit - state.used) + " of " +
                                        std::to_string(state.limit) + " bytes free, " +
                                        std::to_string(bytes) + " were asked for");
  }
  // The first gap between pieces that is large enough.
  unsigned char* raw = emulator::arena();
  for (const auto& [piece, size] : state.pieces) {
    unsigned char* const begin = static_cast<unsigned char*>(piece) - kFence;
    if (static_cast<size_t>(begin - raw) >= padded_bytes(bytes)) break;
    raw = begin + padded_bytes(size);
  }
  if (raw + padded_bytes(bytes) > emulator::arena() + emulator::kArenaBytes)
    throw Error(Code::kOutOfMemory, "the emulator's device memory is full");
  std::memset(raw, kFenceByte, kFence);
  std::memset(raw + kFence, 0xFF, bytes);
  std::memset(raw + kFence + bytes, kFenceByte, padded_bytes(bytes) - kFence - bytes);
  state.pieces[raw + kFence] = bytes;
  state.used += bytes;
  return raw + kFence;
}

void device_free(void* p) {
  if (emulator::captured) throw emulator::Fault("freeing device memory while a graph is captured");
  const emulator::DeviceAccess access;
  emulator::MemoryState& state = emulator::memory();
  const auto piece = state.pieces.find(p);
  if (piece == state.pieces.end()) throw emulator::Fault("freeing device memory that is not allocated");
  unsigned char* const begin = static_cast<unsigned char*>(p);
  for (size_t i = 0; i < kFence; ++i) {
    if (begin[piece->second + i] != kFenceByte) ++state.overruns;
    if (begin[-1 - static_cast<ptrdiff_t>(i)] != kFenceByte) ++state.overruns;
  }
  // Whole pages go back to the system: every change of protection walks what is resident.
  constexpr uintptr_t kPage = 4096;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(begin) + kPage - 1) / kPage * kPage;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(begin) + piece->second) / kPage * kPage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED);
  state.used -= piece->second;
  state.pieces.erase(piece);
}

void free_memory(size_t* free_bytes, size_t* total_bytes) {
  const emulator::DeviceAccess access;
  *total_bytes = emulator::memory().limit;
  *free_bytes = *total_bytes - emulator::memory().used;
}
void* pinned_alloc(size_t bytes) {
  emulator::refuse_in_capture("allocating page-locked memory");
  const emulator::DeviceAccess access;
  ++emulator::memory().handles;
  return std::malloc(bytes > 0 ? bytes : 1);
}
void pinned_free(void* p) {
  const emulator::DeviceAccess access;
  --emulator::memory().handles;
  std::free(p);
}

void copy_to_device(void* dst, const void* host, size_t bytes, Stream) {
  emulator::refuse_in_capture("copying from the host");
  const emulator::DeviceAccess access;
  std::memcpy(dst, host, bytes);
}
void copy_to_host(void* host, const void* src, size_t bytes, Stream) {
  emulator::refuse_in_capture("copying to the host");
  const emulator::DeviceAccess access;
  std::memcpy(host, src, bytes);
}
void copy_on_device(void* dst, const void* src, size_t bytes, Stream stream) {
  if (emulator::record(stream, [=] { copy_on_device(dst, src, bytes, nullptr); })) return;
  const emulator::DeviceAccess access;
  std::memmove(dst, src, bytes);
}
void copy_rows_on_device(void* dst, size_t dst_pitch, const void* src, size_t src_pitch, size_t width,
                         size_t rows, Stream stream) {
  if (emulator::record(stream,
                       [=] { copy_rows_on_device(dst, dst_pitch, src, src_pitch, width, rows, nullptr); }))
    return;
  const emulator::DeviceAccess access;
  for (size_t r = 0; r < rows; ++r)
    std::memmove(static_cast<char*>(dst) + r * dst_pitch, static_cast<const char*>(src) + r * src_pitch,
                 width);
}
void fill_zero(void* dst, size_t bytes, Stream stream) {
  if (emulator::record(stream, [=] { fill_zero(dst, bytes, nullptr); })) return;
  const emulator::DeviceAccess access;
  std::memset(dst, 0, bytes);
}

namespace {

using Recorded = std::vector<std::function<void()>>;

}  // namespace

void begin_capture(Stream stream) {
  emulator::EmulatedStream* const s = static_cast<emulator::EmulatedStream*>(stream);
  if (emulator::captured || s->capturing) throw emulator::Fault("a capture begins inside of another one");
  s->capturing = true;
  emulator::captured = s;
}
Graph end_capture(Stream stream) {
  emulator::EmulatedStream* const s = static_cast<emulator::EmulatedStream*>(stream);
  if (emulator::captured != s) throw emulator::Fault("a capture ends that this thread did not begin");
  const emulator::DeviceAccess access;
  emulator::captured = nullptr;
  s->capturing = false;
  ++emulator::memory().handles;
  ++emulator::graph_counts().captures;
  return new Recorded(std::exchange(s->recorded, {}));
}
void cancel_capture(Stream stream) {
  emulator::EmulatedStream* const s = static_cast<emulator::EmulatedStream*>(stream);
  emulator::captured = nullptr;
  s->capturing = false;
  s->recorded.clear();
}
void launch_graph(Graph graph, Stream) {
  emulator::refuse_in_capture("launching a graph");
  ++emulator::graph_counts().launches;
  for (const std::function<void()>& work : *static_cast<Recorded*>(graph)) work();
}
void destroy_graph(Graph graph) {
  const emulator::DeviceAccess access;
  --emulator::memory().handles;
  delete static_cast<Recorded*>(graph);
}

}  // namespace dn::cuda
