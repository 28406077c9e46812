// The emulated device's memory, for tests that limit it or look for leaks and overruns.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <mutex>

namespace dn::emulator {

struct MemoryState {
  std::map<void*, size_t> pieces;
  size_t used = 0;
  size_t limit = size_t{1} << 34;
  int handles = 0;   // pieces of page-locked memory, streams and graphs
  int overruns = 0;  // bytes written beside a piece, counted when it was freed
};

MemoryState& memory();

// While one of these lives the host may touch device memory: launches and copies hold one. At all other times
// a host that takes a device pointer for its own crashes, as it would on a GPU. One thread at a time: there
// is one device.
class DeviceAccess {
 public:
  DeviceAccess();
  ~DeviceAccess();
  DeviceAccess(const DeviceAccess&) = delete;
  DeviceAccess& operator=(const DeviceAccess&) = delete;

 private:
  std::unique_lock<std::recursive_mutex> lock_;
};

// Records what would run on a stream that is being captured, and says whether it is; arguments are held by
// value. Launches and copies on the device begin with it.
bool record(void* stream, std::function<void()> work);
// Graphs captured and replays launched since the start.
struct GraphCounts {
  int64_t captures = 0, launches = 0;
};
GraphCounts& graph_counts();

}  // namespace dn::emulator
