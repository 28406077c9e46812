// Memory straight from the kernel: zero-filled, page-aligned, and touched only when first written, so that
// taking much of it costs the calling thread nothing. Large pieces ask for huge pages: a page fault for every
// 4 KiB of a fresh result takes longer than computing it.
#pragma once

#include <cstddef>

namespace dn {

class Pages {
 public:
  // Throws Error(kOutOfMemory).
  explicit Pages(size_t bytes);
  ~Pages();
  Pages(const Pages&) = delete;
  Pages& operator=(const Pages&) = delete;
  void* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  void* data_ = nullptr;
  size_t bytes_;
};

}  // namespace dn
