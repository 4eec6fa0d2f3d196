// Things that are posted one after the other and complete in any order: up to which all have.
#pragma once

#include <cstdint>
#include <deque>

namespace commlib {

class InOrder {
 public:
  // Its number.
  uint64_t post() {
    is_complete_.push_back(false);
    return num_complete_ + is_complete_.size() - 1;
  }

  // False: this one has been posted by nobody. A second report of the same changes nothing.
  bool complete(uint64_t number) {
    if (number < num_complete_) return true;
    if (number - num_complete_ >= is_complete_.size()) return false;
    is_complete_[number - num_complete_] = true;
    while (!is_complete_.empty() && is_complete_.front()) {
      is_complete_.pop_front();
      ++num_complete_;
    }
    return true;
  }

  uint64_t num_posted() const { return num_complete_ + is_complete_.size(); }
  uint64_t num_complete() const { return num_complete_; }  // so many, from the first

 private:
  uint64_t num_complete_ = 0;
  std::deque<bool> is_complete_;  // of those behind
};

}  // namespace commlib
