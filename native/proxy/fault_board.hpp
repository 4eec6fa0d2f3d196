// The first fault of a Runtime, whoever found it. Set once; every step loop polls raised().
#pragma once

#include <atomic>
#include <mutex>

#include "common/atomics.hpp"
#include "common/fault.hpp"

namespace commlib {

class FaultBoard {
 public:
  // A word in memory that kernels read: 1 once there is a fault, which ends their waits with no
  // call of a driver, in which some thread may wait for them. Once, before there are threads.
  void set_stop_word(uint64_t* word) { stop_word_ = word; }

  // Ends them before it is known what has happened: raise() or resume_kernels() follows.
  void stop_kernels() {
    if (stop_word_ != nullptr) store_release(stop_word_, 1);  // partner: is_stopped() there
  }
  void resume_kernels() {
    std::lock_guard<std::mutex> lock(mutex_);
    if (stop_word_ != nullptr && !raised_.load(std::memory_order_relaxed))
      store_release(stop_word_, 0);
  }
  // Between the two.
  bool is_stopping() const {
    return stop_word_ != nullptr && load_acquire(stop_word_) != 0 && !raised();
  }

  bool raised() const { return raised_.load(std::memory_order_acquire); }

  // True if this record became the Runtime's fault.
  bool raise(const FaultRecord& record) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (raised_.load(std::memory_order_relaxed)) return false;
    record_ = record;
    raised_.store(true, std::memory_order_release);  // partner: raised()
    stop_kernels();
    return true;
  }

  FaultRecord record() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return record_;
  }

 private:
  mutable std::mutex mutex_;
  std::atomic<bool> raised_{false};
  FaultRecord record_;
  uint64_t* stop_word_ = nullptr;
};

}  // namespace commlib
