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
  // Kept at most: about what JavaScript's garbage collector lets lie around before it gives results back, a
  // few at a time; and two blocks in any case, one being written and one being read.
  static constexpr size_t kMostBytes = size_t{384} << 20;
  static constexpr size_t kLeastBlocks = 2;

  // At least `bytes`, with whatever an earlier result left in them. Throws Error(kOutOfMemory).
  std::shared_ptr<Pages> take(size_t bytes);
  // The block at `data` while somebody has it from take(), else null. Who writes to it without being its
  // owner holds it so.
  std::shared_ptr<Pages> lent(const void* data) const;
  // Keeps the block for take(), in place of the oldest ones where there are too many. One that another still
  // holds is not kept, and freed by the last of them.
  void give(std::shared_ptr<Pages> pages);
  // Frees what is kept, and from now on what is given.
  void close();
  // Kept now.
  size_t bytes() const;

 private:
  // With the mutex held:
  size_t kept_bytes() const;
  std::shared_ptr<Pages> lend(std::shared_ptr<Pages> pages);

  mutable std::mutex mutex_;
  std::vector<std::shared_ptr<Pages>> kept_;  // oldest first
  std::vector<std::weak_ptr<Pages>> lent_;
  bool closed_ = false;
};

}  // namespace dn
