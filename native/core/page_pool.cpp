// Large results of a model, see page_pool.h.

#include "core/page_pool.h"

#include <algorithm>
#include <utility>

namespace dn {

std::unique_ptr<Pages> PagePool::take(size_t bytes) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    // One that is not much larger: a small result must not hold the memory of a large one.
    const auto fits = [&](const std::unique_ptr<Pages>& pages) {
      return pages->bytes() >= bytes && pages->bytes() - bytes <= bytes / 4;
    };
    const auto found = std::find_if(kept_.rbegin(), kept_.rend(), fits);
    if (found != kept_.rend()) {
      std::unique_ptr<Pages> pages = std::move(*found);
      kept_.erase(std::next(found).base());
      return pages;
    }
  }
  return std::make_unique<Pages>(bytes);
}

void PagePool::give(std::unique_ptr<Pages> pages) {
  std::vector<std::unique_ptr<Pages>> dropped;  // unmapped without the lock
  std::lock_guard<std::mutex> lock(mutex_);
  kept_.push_back(std::move(pages));
  while (closed_ ? !kept_.empty() : kept_.size() > kLeastBlocks && kept_bytes() > kMostBytes) {
    dropped.push_back(std::move(kept_.front()));
    kept_.erase(kept_.begin());
  }
}

void PagePool::close() {
  std::vector<std::unique_ptr<Pages>> kept;
  std::lock_guard<std::mutex> lock(mutex_);
  closed_ = true;
  kept.swap(kept_);
}

size_t PagePool::bytes() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return kept_bytes();
}

size_t PagePool::kept_bytes() const {
  size_t sum = 0;
  for (const auto& pages : kept_) sum += pages->bytes();
  return sum;
}

}  // namespace dn
