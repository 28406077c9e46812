// The emulated device's memory, for tests that limit it or look for leaks and overruns.
#pragma once

#include <cstddef>
#include <map>
#include <mutex>

namespace dn::emulator {

struct MemoryState {
  std::map<void*, size_t> pieces;
  size_t used = 0;
  size_t limit = size_t{1} << 34;
  int handles = 0;   // pieces of page-locked memory and streams
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

}  // namespace dn::emulator
