// Memory for intermediate results: a block that only grows, and how pieces are cut out of it.
#pragma once

#include <cstdint>
#include <memory>

#include "core/pages.h"

namespace dn::cpu {

// Grows only and is kept between calls, because fresh pages cost more than the passes over them. Not shared:
// one thread or one call at a time.
class Scratch {
 public:
  // `floats` numbers on a page boundary, with whatever was in them; pointers into the block of an earlier
  // call become invalid. Throws Error(kOutOfMemory); the next call then begins with nothing.
  float* reserve(int64_t floats) {
    const size_t bytes = static_cast<size_t>(floats) * sizeof(float);
    if (!pages_ || bytes > pages_->bytes()) {
      pages_.reset();  // before the larger one is taken
      pages_ = std::make_unique<Pages>(bytes);
    }
    return static_cast<float*>(pages_->data());
  }
  // Numbers that reserve() gives without growing.
  int64_t capacity() const { return pages_ ? static_cast<int64_t>(pages_->bytes() / sizeof(float)) : 0; }

 private:
  std::unique_ptr<Pages> pages_;
};

// Cuts pieces out of a block, each on a 64-byte boundary. Without a block it only counts, so that a layout is
// written once and run twice: to learn its size, then to get its pieces.
class Cutter {
 public:
  explicit Cutter(float* block) : block_(block) {}
  float* take(int64_t floats) {
    float* const piece = block_ ? block_ + used_ : nullptr;
    used_ += (floats + 15) / 16 * 16;
    return piece;
  }
  int64_t used() const { return used_; }

 private:
  float* block_;
  int64_t used_ = 0;
};

// Runs layout(cutter) twice, see Cutter: once to count, once on memory of `scratch`.
template <typename Layout>
void lay_out(Scratch& scratch, Layout&& layout) {
  Cutter count(nullptr);
  layout(count);
  Cutter cut(scratch.reserve(count.used()));
  layout(cut);
}

}  // namespace dn::cpu
