// The first fault of a Runtime, whoever found it. Set once; every step loop polls raised().
#pragma once

#include <atomic>
#include <mutex>

#include "common/fault.hpp"

namespace commlib {

class FaultBoard {
 public:
  bool raised() const { return raised_.load(std::memory_order_acquire); }

  // True if this record became the Runtime's fault.
  bool raise(const FaultRecord& record) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (raised_.load(std::memory_order_relaxed)) return false;
    record_ = record;
    raised_.store(true, std::memory_order_release);  // partner: raised()
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
};

}  // namespace commlib
