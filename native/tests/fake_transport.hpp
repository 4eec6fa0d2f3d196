// A transport that moves nothing and writes down what it is asked to do. Puts complete when the
// test says so, in the order the test chooses; their bytes are read until then, as a network card
// would, so that a race detector sees who overwrites them too early.
#pragma once

#include <algorithm>
#include <deque>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "transport/transport.hpp"

namespace commlib::testing {

struct Event {
  enum Kind { kPut, kFence, kSignal };
  Kind kind;
  int peer;
  size_t local_offset = 0;
  size_t remote_offset = 0;
  size_t bytes = 0;
  uint64_t value = 0;  // token of a put, value of a signal
};

class FakeTransport : public Transport {
 public:
  explicit FakeTransport(PutListener* listener) : listener_(listener) {}

  // --- the test's side, any thread ---
  std::vector<Event> events() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return events_;
  }
  std::vector<Event> events(Event::Kind kind) const {
    std::vector<Event> list = events();
    list.erase(std::remove_if(list.begin(), list.end(),
                              [kind](const Event& event) { return event.kind != kind; }),
               list.end());
    return list;
  }
  // The put with this token completes at the next progress().
  void complete(uint64_t token) {
    std::lock_guard<std::mutex> lock(mutex_);
    completed_.push_back(token);
  }
  void fail(TransportFault fault) {
    std::lock_guard<std::mutex> lock(mutex_);
    faults_.push_back(std::move(fault));
  }
  bool is_shut_down() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return is_shut_down_;
  }

  // --- the proxy's side ---
  std::string name() const override { return "fake"; }
  std::string describe() const override { return "fake"; }
  void register_region(void* base, size_t) override { base_ = static_cast<const uint8_t*>(base); }
  std::vector<uint8_t> address() const override { return {}; }
  void connect(int, const std::vector<uint8_t>&) override {}
  void put(int peer, size_t local_offset, size_t remote_offset, size_t bytes,
           uint64_t token) override {
    add({Event::kPut, peer, local_offset, remote_offset, bytes, token});
  }
  void fence(int peer) override { add({Event::kFence, peer}); }
  void put_signal(int peer, size_t remote_offset, uint64_t value) override {
    add({Event::kSignal, peer, 0, remote_offset, sizeof value, value});
  }
  int progress() override {
    std::vector<Event> puts;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      for (uint64_t token : completed_)
        for (const Event& event : events_)
          if (event.kind == Event::kPut && event.value == token) puts.push_back(event);
      completed_.clear();
    }
    for (const Event& put : puts) {
      for (size_t i = 0; base_ != nullptr && i < put.bytes; ++i)
        sum_ += base_[put.local_offset + i];
      listener_->on_put_complete(put.value);
    }
    return int(puts.size());
  }
  bool idle() const override { return true; }
  std::optional<TransportFault> take_fault() override {
    std::lock_guard<std::mutex> lock(mutex_);
    if (faults_.empty()) return std::nullopt;
    TransportFault fault = std::move(faults_.front());
    faults_.pop_front();
    return fault;
  }
  void shutdown(double) noexcept override {
    std::lock_guard<std::mutex> lock(mutex_);
    is_shut_down_ = true;
  }

 private:
  void add(Event event) {
    std::lock_guard<std::mutex> lock(mutex_);
    events_.push_back(event);
  }

  PutListener* listener_;
  const uint8_t* base_ = nullptr;
  uint64_t sum_ = 0;
  mutable std::mutex mutex_;
  std::vector<Event> events_;
  std::vector<uint64_t> completed_;
  std::deque<TransportFault> faults_;
  bool is_shut_down_ = false;
};

}  // namespace commlib::testing
