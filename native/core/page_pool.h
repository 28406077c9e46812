// Large results of a model, kept for its next ones. Memory that the process has touched costs nothing to
// write again; memory fresh from the kernel is cleared page by page first, which for (256, 50257) logits
// takes a fifth of the time of computing them, and several times that on a virtual machine that gives unused
// memory back. Any thread may call anything.
#pragma once

#include <cstddef>
#include <memory>
#include <mutex>
#include <vector>

#include "core/pages.h"

namespace dn {

class PagePool {
 public:
  // Blocks kept at most: JavaScript's garbage collector gives results back a few at a time.
  static constexpr size_t kMostBlocks = 4;

  // At least `bytes`, with whatever an earlier result left in them. Throws Error(kOutOfMemory).
  std::unique_ptr<Pages> take(size_t bytes);
  // Keeps the block for take(), in place of the oldest one where there are kMostBlocks.
  void give(std::unique_ptr<Pages> pages);
  // Frees what is kept, and from now on what is given.
  void close();
  // Kept now.
  size_t bytes() const;

 private:
  mutable std::mutex mutex_;
  std::vector<std::unique_ptr<Pages>> kept_;  // oldest first
  bool closed_ = false;
};

}  // namespace dn
