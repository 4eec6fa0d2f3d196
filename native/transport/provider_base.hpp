// What all providers share: completions that wait for progress(), and the list of faults.
#pragma once

#include <deque>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "transport/region_map.hpp"
#include "transport/transport.hpp"

namespace commlib {

class ProviderBase : public Transport {
 public:
  std::optional<TransportFault> take_fault() override {
    if (faults_.empty()) return std::nullopt;
    TransportFault fault = std::move(faults_.front());
    faults_.pop_front();
    return fault;
  }

 protected:
  ProviderBase(PutListener* listener, int rank) : listener_(listener), rank_(rank) {}

  int rank() const { return rank_; }

  // A put may finish inside put() itself. Its token waits here for progress(), so that the
  // listener is never entered from the code that posts.
  void complete_later(uint64_t token) { completed_.push_back(token); }
  bool has_completions() const { return !completed_.empty(); }

  int report_completions() {
    reporting_.swap(completed_);  // the listener may post, which may add to completed_
    const int count = static_cast<int>(reporting_.size());
    for (uint64_t token : reporting_) listener_->on_put_complete(token);
    reporting_.clear();
    return count;
  }

  // One fault per peer: what follows the first is its consequence.
  void add_fault(int peer, int code, std::string call, std::string message) {
    if (!faulted_.insert(peer).second) return;
    faults_.push_back({peer, code, std::move(call), std::move(message)});
    listener_->on_fault();
  }

 private:
  PutListener* listener_;
  int rank_;
  std::vector<uint64_t> completed_;
  std::vector<uint64_t> reporting_;
  std::deque<TransportFault> faults_;
  std::set<int> faulted_;
};

}  // namespace commlib
