// A checked stream over a Transport, shared by the tests: random words, put, fence, signal; the
// consumer is a thread of its own that verifies every word.
#pragma once

#include <sys/mman.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "transport/transport.hpp"

namespace commlib::testing {

using Clock = std::chrono::steady_clock;

inline double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// Counts how often each token comes back.
class TokenCounter : public PutListener {
 public:
  void on_put_complete(uint64_t token) override { ++reports_[token]; }
  void on_fault() override { ++num_faults_; }
  int num_faults() const { return num_faults_; }
  int reports(uint64_t token) const {
    auto it = reports_.find(token);
    return it == reports_.end() ? 0 : it->second;
  }
  bool is_done(uint64_t token) const { return reports(token) > 0; }
  bool each_once(uint64_t count) const {
    if (reports_.size() != count) return false;
    for (const auto& [token, reports] : reports_) {
      if (token >= count || reports != 1) return false;
    }
    return true;
  }

 private:
  std::map<uint64_t, int> reports_;
  int num_faults_ = 0;
};

// [send slots][receive slots][control words], all in one region; or [control words] there and the
// slots in a device region, which is another mapping of host memory here.
struct StreamShape {
  size_t slot_bytes = 7168;
  uint64_t messages = 1000;
  size_t slots = 8;
  bool has_device_region = false;

  static constexpr size_t kPage = 4096;
  size_t slots_offset() const { return has_device_region ? kPage : 0; }
  size_t send_offset(uint64_t message) const {
    return slots_offset() + (message % slots) * slot_bytes;
  }
  size_t receive_offset(uint64_t message) const {
    return slots_offset() + (slots + message % slots) * slot_bytes;
  }
  size_t slots_end() const { return slots_offset() + 2 * slots * slot_bytes; }
  size_t sequence_offset() const {  // written by the producer
    return has_device_region ? 0 : slots_end();
  }
  size_t ack_offset() const { return sequence_offset() + 64; }  // written by the consumer
  size_t region_bytes() const {
    const size_t end = has_device_region ? slots_end() : ack_offset() + 64;
    return (end + kPage - 1) / kPage * kPage;
  }
  size_t host_bytes() const { return has_device_region ? kPage : region_bytes(); }
  size_t device_bytes() const { return region_bytes() - host_bytes(); }
};

// Zeroed host memory between two pages that nobody may touch: no other mapping is its continuation.
class Mapping {
 public:
  explicit Mapping(size_t bytes) : bytes_((bytes + kGuard - 1) / kGuard * kGuard + 2 * kGuard) {
    whole_ = mmap(nullptr, bytes_, PROT_NONE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (whole_ == MAP_FAILED) throw std::runtime_error("mmap failed");
    if (mprotect(base(), bytes_ - 2 * kGuard, PROT_READ | PROT_WRITE) != 0)
      throw std::runtime_error("mprotect failed");
  }
  ~Mapping() { munmap(whole_, bytes_); }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  std::byte* base() const { return static_cast<std::byte*>(whole_) + kGuard; }

 private:
  static constexpr size_t kGuard = 4096;
  size_t bytes_;
  void* whole_;
};

// splitmix64: no two words of the stream are related.
inline uint64_t payload_word(uint64_t seed, uint64_t message, size_t index) {
  uint64_t z = seed + message * 0x9E3779B97F4A7C15ull + index * 0xD1B54A32D192ED03ull;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}

using NodeMaker = std::function<std::unique_ptr<Transport>(PutListener*, int)>;

// A rank: transport, region, tokens.
struct Node {
  Node(int rank_in, StreamShape shape_in, const NodeMaker& make)
      : rank(rank_in),
        shape(shape_in),
        host(shape.host_bytes()),
        device(shape.device_bytes()),
        base(host.base()) {
    transport = make(&tokens, rank);
    transport->register_region(base, shape.host_bytes());
    if (shape.has_device_region)
      transport->register_device_region({device.base(), shape.device_bytes(), -1, 0});
  }

  uint64_t* words(size_t offset) {
    const size_t border = shape.host_bytes();
    return reinterpret_cast<uint64_t*>(offset < border ? base + offset
                                                       : device.base() + (offset - border));
  }
  // Acquire: partner is the release in the peer's put_signal.
  uint64_t load(size_t offset) { return __atomic_load_n(words(offset), __ATOMIC_ACQUIRE); }

  int rank;
  StreamShape shape;
  TokenCounter tokens;
  Mapping host, device;
  std::byte* base;
  std::unique_ptr<Transport> transport;  // goes before the memory
};

// Verifies messages as they arrive, on its own thread.
class Consumer {
 public:
  Consumer(Node& node, int producer) : node_(node), producer_(producer) {
    thread_ = std::thread([this] { run(); });
  }
  ~Consumer() { join(); }
  void join() {
    stop_.store(true, std::memory_order_relaxed);
    if (thread_.joinable()) thread_.join();
  }
  // Acquire: partner is the release in run(); slots up to here may be overwritten.
  uint64_t consumed() const { return consumed_.load(std::memory_order_acquire); }
  uint64_t bad_words() const { return bad_words_; }  // after join()

 private:
  void run() {
    const StreamShape& shape = node_.shape;
    uint64_t seen = 0;
    while (seen < shape.messages && !stop_.load(std::memory_order_relaxed)) {
      const uint64_t arrived = node_.load(shape.sequence_offset());
      if (arrived == seen) std::this_thread::yield();
      for (; seen < arrived; ++seen) verify(seen);
      consumed_.store(seen, std::memory_order_release);  // partner: consumed()
    }
  }
  void verify(uint64_t message) {
    const uint64_t seed = static_cast<uint64_t>(producer_);
    const uint64_t* words = node_.words(node_.shape.receive_offset(message));
    for (size_t i = node_.shape.slot_bytes / 8; i-- > 0;) {  // the last word lands last
      if (words[i] != payload_word(seed, message, i)) ++bad_words_;
    }
  }

  Node& node_;
  int producer_;
  std::atomic<uint64_t> consumed_{0};
  std::atomic<bool> stop_{false};
  uint64_t bad_words_ = 0;
  std::thread thread_;
};

// One end of a stream, driven by step() on the proxy thread.
class Stream {
 public:
  Stream(Node& node, int peer, bool produces, bool consumes)
      : node_(node), peer_(peer), produces_(produces) {
    if (consumes) consumer_ = std::make_unique<Consumer>(node, peer);
  }

  // Posts what the window allows, returns true once everything is sent, acknowledged and idle.
  bool step() {
    const int events = node_.transport->progress();
    const bool has_sent = produces_ && sent_ < node_.shape.messages && send_one();
    acknowledge();
    if (events == 0 && !has_sent) std::this_thread::yield();
    const uint64_t messages = node_.shape.messages;
    const bool is_sent = !produces_ || acknowledged() == messages;
    const bool is_received = !consumer_ || acknowledged_out_ == messages;
    return is_sent && is_received && node_.transport->idle();
  }

  uint64_t sent() const { return sent_; }
  uint64_t acknowledged() { return node_.load(node_.shape.ack_offset()); }
  uint64_t bad_words() {
    if (!consumer_) return 0;
    consumer_->join();
    return consumer_->bad_words();
  }

 private:
  bool send_one() {
    const StreamShape& shape = node_.shape;
    if (sent_ >= shape.slots) {  // slot reuse: consumed at the peer, and read here
      const uint64_t previous = sent_ - shape.slots;
      if (acknowledged() <= previous || !node_.tokens.is_done(previous)) return false;
    }
    const uint64_t seed = static_cast<uint64_t>(node_.rank);
    uint64_t* words = node_.words(shape.send_offset(sent_));
    for (size_t i = 0; i < shape.slot_bytes / 8; ++i) words[i] = payload_word(seed, sent_, i);
    node_.transport->put(peer_, shape.send_offset(sent_), shape.receive_offset(sent_),
                         shape.slot_bytes, sent_);
    node_.transport->fence(peer_);
    ++sent_;
    node_.transport->put_signal(peer_, shape.sequence_offset(), sent_);
    return true;
  }
  void acknowledge() {
    if (!consumer_ || consumer_->consumed() == acknowledged_out_) return;
    acknowledged_out_ = consumer_->consumed();
    node_.transport->put_signal(peer_, node_.shape.ack_offset(), acknowledged_out_);
  }

  Node& node_;
  int peer_;
  bool produces_;
  uint64_t sent_ = 0;
  uint64_t acknowledged_out_ = 0;
  std::unique_ptr<Consumer> consumer_;
};

}  // namespace commlib::testing
