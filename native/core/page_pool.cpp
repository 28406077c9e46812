// Large results of a model, see page_pool.h.

#include "core/page_pool.h"

#include <algorithm>
#include <utility>

namespace dn {

std::shared_ptr<Pages> PagePool::take(size_t bytes) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    // One that is not much larger: a small result must not hold the memory of a large one.
    const auto fits = [&](const std::shared_ptr<Pages>& pages) {
      return pages->bytes() >= bytes && pages->bytes() - bytes <= bytes / 4;
    };
    const auto found = std::find_if(kept_.rbegin(), kept_.rend(), fits);
    if (found != kept_.rend()) {
      std::shared_ptr<Pages> pages = std::move(*found);
      kept_.erase(std::next(found).base());
      return lend(std::move(pages));
    }
  }
  auto fresh = std::make_shared<Pages>(bytes);
  std::lock_guard<std::mutex> lock(mutex_);
  return lend(std::move(fresh));
}

std::shared_ptr<Pages> PagePool::lent(const void* data) const {
  std::lock_guard<std::mutex> lock(mutex_);
  for (const auto& block : lent_) {
    std::shared_ptr<Pages> pages = block.lock();
    if (pages && pages->data() == data) return pages;
  }
  return nullptr;
}

void PagePool::give(std::shared_ptr<Pages> pages) {
  std::vector<std::shared_ptr<Pages>> dropped;  // unmapped without the lock
  std::lock_guard<std::mutex> lock(mutex_);
  const auto is_this = [&](const std::weak_ptr<Pages>& block) { return block.lock() == pages; };
  lent_.erase(std::remove_if(lent_.begin(), lent_.end(), is_this), lent_.end());
  // With the mutex held and nothing lent, nobody else can begin to hold it.
  if (pages.use_count() > 1) return;
  kept_.push_back(std::move(pages));
  while (closed_ ? !kept_.empty() : kept_.size() > kLeastBlocks && kept_bytes() > kMostBytes) {
    dropped.push_back(std::move(kept_.front()));
    kept_.erase(kept_.begin());
  }
}

void PagePool::close() {
  std::vector<std::shared_ptr<Pages>> kept;
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

// Forgets the blocks that were freed and never given back.
std::shared_ptr<Pages> PagePool::lend(std::shared_ptr<Pages> pages) {
  const auto is_gone = [](const std::weak_ptr<Pages>& block) { return block.expired(); };
  lent_.erase(std::remove_if(lent_.begin(), lent_.end(), is_gone), lent_.end());
  lent_.push_back(pages);
  return pages;
}

}  // namespace dn
