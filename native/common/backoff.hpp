// Idle policy of every host loop: spin briefly, then yield, then sleep. Pure spinning starves the
// peers (and the kernel's network threads) of the core they need to make us progress.
#pragma once

#include <sched.h>

#include <chrono>
#include <thread>

namespace commlib {

class Backoff {
 public:
  // 0: yields for ever.
  explicit Backoff(int max_sleep_us) : max_sleep_us_(max_sleep_us) {}

  void reset() { idle_ = 0; }

  void wait() {
    if (idle_ < kYields + 64) ++idle_;
    if (idle_ < kSpins) {
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    } else if (idle_ < kYields || max_sleep_us_ == 0) {
      sched_yield();
    } else {
      const int us = idle_ - kYields < 64 ? max_sleep_us_ / 4 : max_sleep_us_;
      std::this_thread::sleep_for(std::chrono::microseconds(us < 1 ? 1 : us));
    }
  }

 private:
  static constexpr int kSpins = 32;
  static constexpr int kYields = 40;
  int idle_ = 0;
  int max_sleep_us_;
};

inline double now_s() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace commlib
