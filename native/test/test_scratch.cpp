// Scratch memory of the CPU kernels: nothing that was asked for lies outside the block.

#include <cstdint>
#include <vector>

#include "cpu/scratch.h"
#include "test/check.h"

namespace {

using namespace dn::cpu;

bool on_a_line(const float* p) { return reinterpret_cast<uintptr_t>(p) % 64 == 0; }

DN_TEST(scratch_holds_what_was_asked_for_however_little_it_grows) {
  Scratch scratch;
  for (int64_t floats = 1; floats < 4000; floats += 1 + floats / 40) {
    float* const block = scratch.reserve(floats);
    CHECK(on_a_line(block));
    CHECK(scratch.capacity() >= floats);
    for (int64_t i = 0; i < floats; ++i) block[i] = 1.0f;
  }
  const int64_t capacity = scratch.capacity();
  float* const block = scratch.reserve(capacity);
  CHECK(scratch.reserve(1) == block);  // and is kept
  CHECK(scratch.capacity() == capacity);
}

DN_TEST(scratch_pieces_lie_apart_and_inside) {
  const std::vector<int64_t> sizes = {1, 17, 16, 0, 5, 4096, 15};
  Scratch scratch;
  std::vector<float*> pieces(sizes.size());
  lay_out(scratch, [&](Cutter& cut) {
    for (size_t i = 0; i < sizes.size(); ++i) pieces[i] = cut.take(sizes[i]);
  });
  const float* const begin = scratch.reserve(0);
  for (size_t i = 0; i < sizes.size(); ++i) {
    CHECK(on_a_line(pieces[i]));
    CHECK(pieces[i] >= (i == 0 ? begin : pieces[i - 1] + sizes[i - 1]));
    CHECK(pieces[i] + sizes[i] <= begin + scratch.capacity());
  }
}

}  // namespace
