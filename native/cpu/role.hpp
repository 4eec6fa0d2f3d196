// A role of P2-P4 as a resumable state machine. step() never blocks.
#pragma once

#include "common/backoff.hpp"
#include "common/types.hpp"

namespace commlib {

// What a role stands still for; becomes the fault record when the deadline passes.
struct Wait {
  int peer = -1;
  int channel = -1;  // source rank of the stream
  uint64_t expected = 0;
  uint64_t seen = 0;
};

// Bytes this role read and wrote, for the "no staging copy beyond P2-P4" figure.
struct RoleCounters {
  uint64_t rows = 0;
  uint64_t bytes_read = 0;
  uint64_t bytes_written = 0;
};

// Urgent roles keep the network busy: they send, or drain what a sender waits for. The others are
// the node's own work, which fills the gaps.
enum class Urgency { kFillsGaps, kUrgent };

class Role {
 public:
  explicit Role(const char* name, Urgency urgency = Urgency::kFillsGaps)
      : name_(name), urgency_(urgency) {}
  virtual ~Role() = default;
  // Does a bounded amount of work; true if anything moved.
  virtual bool step() = 0;
  virtual bool is_done() const = 0;
  virtual Wait waits_for() const = 0;
  const char* name() const { return name_; }
  bool is_urgent() const { return urgency_ == Urgency::kUrgent; }
  const RoleCounters& counters() const { return counters_; }
  // step(), and notes the time if anything moved.
  bool timed_step() {
    const double before = begin_s_ > 0 ? 0 : now_s();
    if (!step()) return false;
    if (begin_s_ == 0) begin_s_ = before;
    end_s_ = now_s();
    return true;
  }
  // Of its first and last movement; 0 if nothing has moved.
  double begin_s() const { return begin_s_; }
  double end_s() const { return end_s_; }

 protected:
  RoleCounters counters_;

 private:
  const char* name_;
  Urgency urgency_;
  double begin_s_ = 0;
  double end_s_ = 0;
};

}  // namespace commlib
