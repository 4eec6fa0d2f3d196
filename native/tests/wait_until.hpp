// Waiting for another thread, with a limit.
#pragma once

#include <functional>

#include "common/backoff.hpp"

namespace commlib::testing {

// False if `is_true` has not come true after `seconds`. A failure here is a failed test, so the
// limit may be generous.
inline bool wait_until(const std::function<bool()>& is_true, double seconds = 30) {
  const double deadline = now_s() + seconds;
  while (!is_true()) {
    if (now_s() > deadline) return false;
    std::this_thread::sleep_for(std::chrono::microseconds(200));
  }
  return true;
}

}  // namespace commlib::testing
