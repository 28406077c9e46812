// Memory of large results, kept for the next ones.

#include <atomic>
#include <cstring>
#include <thread>
#include <vector>

#include "core/page_pool.h"
#include "test/check.h"

namespace {

using namespace dn;

constexpr size_t kBytes = size_t{8} << 20;

DN_TEST(page_pool_hands_a_block_out_again) {
  PagePool pool;
  auto first = pool.take(kBytes);
  std::memset(first->data(), 7, kBytes);
  void* const data = first->data();
  pool.give(std::move(first));
  CHECK(pool.bytes() == kBytes);
  const auto second = pool.take(kBytes - 4096);  // a little smaller fits too
  CHECK(second->data() == data);
  CHECK(pool.bytes() == 0);
  const auto third = pool.take(kBytes);  // and is not handed out twice
  CHECK(third->data() != data);
}

DN_TEST(page_pool_does_not_lend_what_does_not_fit) {
  PagePool pool;
  auto block = pool.take(kBytes);
  void* const data = block->data();
  pool.give(std::move(block));
  const auto larger = pool.take(kBytes + 1);
  CHECK(larger->bytes() >= kBytes + 1);
  CHECK(larger->data() != data);
  const auto smaller = pool.take(kBytes / 2);  // it would hold twice the memory it needs
  CHECK(smaller->data() != data);
  CHECK(pool.bytes() == kBytes);
}

DN_TEST(page_pool_keeps_no_more_than_it_says) {
  PagePool pool;
  std::vector<std::shared_ptr<Pages>> blocks;
  for (size_t i = 0; i < PagePool::kMostBytes / kBytes + 3; ++i) blocks.push_back(pool.take(kBytes));
  void* const oldest = blocks.front()->data();
  void* const newest = blocks.back()->data();
  for (auto& block : blocks) pool.give(std::move(block));
  CHECK(pool.bytes() == PagePool::kMostBytes);
  const auto next = pool.take(kBytes);
  CHECK(next->data() == newest);
  CHECK(next->data() != oldest);
}

DN_TEST(page_pool_keeps_two_blocks_of_any_size) {
  PagePool pool;
  const size_t large = PagePool::kMostBytes / 2 + kBytes;  // never touched: costs no memory
  std::vector<std::shared_ptr<Pages>> blocks;
  for (int i = 0; i < 3; ++i) blocks.push_back(pool.take(large));
  for (auto& block : blocks) pool.give(std::move(block));
  CHECK(pool.bytes() == 2 * large);
}

DN_TEST(page_pool_keeps_nothing_after_close) {
  PagePool pool;
  auto lent = pool.take(kBytes);
  pool.give(pool.take(kBytes));
  pool.close();
  CHECK(pool.bytes() == 0);
  pool.give(std::move(lent));  // a result that outlives its model
  CHECK(pool.bytes() == 0);
}

DN_TEST(page_pool_knows_what_is_out) {
  PagePool pool;
  auto block = pool.take(kBytes);
  void* const data = block->data();
  int other = 0;
  CHECK(pool.lent(data) == block);
  CHECK(pool.lent(&other) == nullptr);
  auto writer = pool.lent(data);
  pool.give(std::move(block));  // while somebody writes to it
  CHECK(pool.bytes() == 0);
  CHECK(pool.lent(data) == nullptr);
  std::memset(writer->data(), 1, kBytes);
  writer.reset();
  auto alone = pool.take(kBytes);
  void* const again = alone->data();
  pool.give(std::move(alone));
  CHECK(pool.bytes() == kBytes);
  CHECK(pool.lent(again) == nullptr);  // kept, not lent
}

DN_TEST(page_pool_lends_a_block_to_one_thread_at_a_time) {
  PagePool pool;
  std::atomic<int> clashes{0};
  std::vector<std::thread> threads;
  for (int id = 1; id <= 4; ++id) {
    threads.emplace_back([&, id] {
      for (int i = 0; i < 200; ++i) {
        auto block = pool.take(kBytes);
        auto* const word = static_cast<std::atomic<int>*>(block->data());
        word->store(id);
        std::this_thread::yield();
        if (word->load() != id) ++clashes;
        pool.give(std::move(block));
      }
    });
  }
  for (auto& thread : threads) thread.join();
  CHECK(clashes == 0);
}

}  // namespace
