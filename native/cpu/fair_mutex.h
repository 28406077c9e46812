// A mutex that nobody waits for without end: as fast as another one while nobody has waited long, and then
// handed to who has waited longest. std::mutex goes to whoever asks first after it is free, and a thread that
// takes it again and again asks sooner than one that has to be woken.
#pragma once

#include <chrono>
#include <condition_variable>
#include <deque>
#include <mutex>

namespace dn::cpu {

class FairMutex {
 public:
  // Beyond it a waiting thread is next. Shorter waits would be paid with a thread to wake at every turn.
  static constexpr std::chrono::microseconds kPatience{1000};

  void lock() {
    std::unique_lock<std::mutex> guard(mutex_);
    if (!held_) {  // free for whoever comes first
      held_ = true;
      return;
    }
    Waiter self;
    waiting_.push_back(&self);
    do self.wake.wait(guard);
    while (held_ && !self.granted);
    if (self.granted) return;
    held_ = true;
    remove(&self);
  }

  void unlock() {
    std::lock_guard<std::mutex> guard(mutex_);
    if (waiting_.empty()) {
      held_ = false;
      return;
    }
    Waiter* const first = waiting_.front();
    if (Clock::now() - first->since >= kPatience) {
      first->granted = true;  // held_ stays
      waiting_.pop_front();
    } else {
      held_ = false;
    }
    first->wake.notify_one();  // under the mutex: the waiter lives until it is released
  }

  // Threads that wait.
  size_t waiting() {
    std::lock_guard<std::mutex> guard(mutex_);
    return waiting_.size();
  }

 private:
  using Clock = std::chrono::steady_clock;
  struct Waiter {
    std::condition_variable wake;
    Clock::time_point since = Clock::now();
    bool granted = false;
  };

  void remove(Waiter* waiter) {
    for (auto it = waiting_.begin(); it != waiting_.end(); ++it) {
      if (*it == waiter) {
        waiting_.erase(it);
        return;
      }
    }
  }

  std::mutex mutex_;
  bool held_ = false;
  std::deque<Waiter*> waiting_;  // in the order in which they came
};

}  // namespace dn::cpu
