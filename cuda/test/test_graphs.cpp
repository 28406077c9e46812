// Capturing and replaying through the runtime layer: a graph holds the arguments of its launches and the
// addresses, not the contents, of memory; what cannot be replayed is refused while it is captured. On the
// emulator and on a GPU.

#include <vector>

#include "cuda/rows.h"
#include "cuda/runtime.h"
#include "cuda/test/support.h"

namespace dn::cuda_test {
namespace {

using cuda::Stream;

// A stream with device memory for two numbers.
class Device {
 public:
  Device() {
    cuda::select_device(0);
    stream = cuda::create_stream();
    memory = static_cast<float*>(cuda::device_alloc(2 * sizeof(float)));
  }
  ~Device() {
    cuda::device_free(memory);
    cuda::destroy_stream(stream);
  }
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;
  void set(float a, float b) {
    const float values[] = {a, b};
    cuda::copy_to_device(memory, values, sizeof values, stream);
    cuda::synchronize(stream);
  }
  float get(int i) {
    float value = 0;
    cuda::copy_to_host(&value, memory + i, sizeof value, stream);
    cuda::synchronize(stream);
    return value;
  }
  Stream stream;
  float* memory;
};

DN_TEST(cuda_graphs_replay_with_the_memory_of_the_moment) {
  Device device;
  device.set(1, 10);
  float scale = 1;
  cuda::begin_capture(device.stream);
  // memory[0] += scale * memory[1], by an op with a scalar among its arguments: column sums of one row.
  cuda::add_partial_rows(device.memory, device.memory + 1, static_cast<int64_t>(scale), 1, 1, device.stream);
  const cuda::Graph graph = cuda::end_capture(device.stream);
  scale = 0;
  CHECK(device.get(0) == 1);  // captured, not run
  cuda::launch_graph(graph, device.stream);
  cuda::launch_graph(graph, device.stream);
  CHECK(device.get(0) == 21);
  device.set(0, 5);
  cuda::launch_graph(graph, device.stream);
  CHECK(device.get(0) == 5);
  cuda::destroy_graph(graph);
}

DN_TEST(cuda_graphs_refuse_what_cannot_be_replayed) {
  Device device;
  device.set(1, 2);
  const auto refused = [&](const char* what, const auto& work) {
    cuda::begin_capture(device.stream);
    CHECK_THROWS(work(), Code::kDevice, what);
    cuda::cancel_capture(device.stream);
  };
  float value = 3;
  refused("waiting for the device while", [&] { cuda::synchronize(device.stream); });
  refused("allocating device memory while", [&] { cuda::device_alloc(16); });
  refused("allocating page-locked memory while", [&] { cuda::pinned_alloc(16); });
  refused("copying from the host while",
          [&] { cuda::copy_to_device(device.memory, &value, sizeof value, device.stream); });
  refused("copying to the host while",
          [&] { cuda::copy_to_host(&value, device.memory, sizeof value, device.stream); });
  // Afterwards the stream works as before.
  CHECK(device.get(0) == 1);
  CHECK(value == 3);
}

}  // namespace
}  // namespace dn::cuda_test
