// Ranks as threads of one process: puts are memory copies.
//
// Made for race detectors. Nothing on the data path synchronises a sender with a consumer, or one
// sender with another, except the release store of put_signal. So a protocol that forgets a
// release or an acquire is reported, and a correct one runs clean.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <deque>
#include <mutex>
#include <thread>
#include <unordered_map>
#include <utility>

#include "transport/provider_base.hpp"
#include "transport/providers.hpp"

namespace commlib {
namespace {

// Guards one sender's access to one region against the owner taking the region away. One link per
// (sender, region), because a state shared by senders would order them with each other.
class Link {
 public:
  // Sender. False once the owner has closed the region. Acquire: partner is leave().
  bool enter() {
    int expected = kIdle;
    return state_.compare_exchange_strong(expected, kBusy, std::memory_order_acquire);
  }
  // Sender. Release: the copies happen before the owner's close() returns.
  void leave() { state_.store(kIdle, std::memory_order_release); }
  // Owner. Acquire: partner is leave().
  void close() {
    int expected = kIdle;
    while (!state_.compare_exchange_weak(expected, kClosed, std::memory_order_acquire)) {
      if (expected == kClosed) return;
      expected = kIdle;
      std::this_thread::yield();
    }
  }

 private:
  enum State { kIdle, kBusy, kClosed };
  std::atomic<int> state_{kIdle};
};

struct NoKey {};
using Map = RegionMap<NoKey>;

struct Region {
  Map map;
  std::mutex mutex;  // guards the rest; taken only by connect() and shutdown()
  std::vector<std::shared_ptr<Link>> links;
  bool closed = false;
};

class Registry {
 public:
  static Registry& instance() {
    static Registry registry;
    return registry;
  }
  uint64_t add(std::shared_ptr<Region> region) {
    std::lock_guard<std::mutex> lock(mutex_);
    regions_.emplace(++last_id_, std::move(region));
    return last_id_;
  }
  std::shared_ptr<Region> find(uint64_t id) {
    std::lock_guard<std::mutex> lock(mutex_);
    auto it = regions_.find(id);
    return it == regions_.end() ? nullptr : it->second;
  }
  void remove(uint64_t id) {
    std::lock_guard<std::mutex> lock(mutex_);
    regions_.erase(id);
  }

 private:
  std::mutex mutex_;
  std::unordered_map<uint64_t, std::shared_ptr<Region>> regions_;
  uint64_t last_id_ = 0;
};

struct Put {
  uint64_t from;  // addresses
  uint64_t to;
  size_t bytes;
  uint64_t token;
};

struct Signal {
  uint64_t to;
  uint64_t value;
};

// What was posted between two fences.
struct Group {
  std::vector<Put> puts;
  std::vector<Signal> signals;
  bool empty() const { return puts.empty() && signals.empty(); }
};

struct Peer {
  std::shared_ptr<Region> region;
  std::shared_ptr<Link> link;
  std::deque<Group> groups;  // the last one takes new commands
  bool failed = false;
};

class LoopbackTransport final : public ProviderBase {
 public:
  LoopbackTransport(PutListener* listener, int rank, LoopbackOptions options)
      : ProviderBase(listener, rank), options_(options) {}
  ~LoopbackTransport() override { shutdown(0.0); }

  std::string name() const override { return "loopback"; }
  std::string describe() const override {
    return "loopback: " + std::to_string(peers_.size()) + " peers in this process";
  }

  void register_region(void* base, size_t bytes) override {
    if (region_) throw TransportException("register_region", 0, -1, "already registered");
    region_ = std::make_shared<Region>();
    region_->map.add(reinterpret_cast<uint64_t>(base), bytes, {});
    id_ = Registry::instance().add(region_);
  }
  // Of memory that the processor reaches: a second mapping.
  void register_device_region(const DeviceRegion& region) override {
    if (!region_ || region_->map.has_device())
      throw TransportException("register_device_region", 0, -1, "once, behind a host region");
    region_->map.add(reinterpret_cast<uint64_t>(region.base), region.bytes, {});
  }

  std::vector<uint8_t> address() const override {
    if (!region_) throw TransportException("address", 0, -1, "no region is registered");
    std::vector<uint8_t> blob(sizeof(id_));
    std::memcpy(blob.data(), &id_, sizeof(id_));
    return blob;
  }

  void connect(int peer, const std::vector<uint8_t>& address) override;
  void put(int peer, size_t local_offset, size_t remote_offset, size_t bytes,
           uint64_t token) override;
  void fence(int peer) override;
  void put_signal(int peer, size_t remote_offset, uint64_t value) override;
  int progress() override;
  bool idle() const override;
  void shutdown(double timeout_s) noexcept override;

 private:
  Peer* find_peer(int peer);
  void fail(int peer, const std::string& call, const std::string& message);
  int run(Peer& peer);
  void store_signal(const Signal& signal) const;

  LoopbackOptions options_;
  std::shared_ptr<Region> region_;
  uint64_t id_ = 0;
  std::unordered_map<int, Peer> peers_;
  bool is_shut_down_ = false;
};

void LoopbackTransport::connect(int peer, const std::vector<uint8_t>& address) {
  uint64_t id = 0;
  if (address.size() != sizeof(id)) {
    throw TransportException("connect", 0, peer, "malformed loopback address");
  }
  std::memcpy(&id, address.data(), sizeof(id));
  std::shared_ptr<Region> region = Registry::instance().find(id);
  const std::string who = "rank " + std::to_string(peer);
  if (!region) {
    throw TransportException("connect", 0, peer, who + " is not in this process or has closed");
  }
  if (peers_.count(peer)) throw TransportException("connect", 0, peer, who + " is connected");
  auto link = std::make_shared<Link>();
  std::lock_guard<std::mutex> lock(region->mutex);
  if (region->closed) throw TransportException("connect", 0, peer, who + " has closed");
  region->links.push_back(link);
  Peer& entry = peers_[peer];
  entry.region = region;
  entry.link = std::move(link);
  entry.groups.emplace_back();
}

// Null if commands to this peer cannot be carried out any more.
Peer* LoopbackTransport::find_peer(int peer) {
  auto it = peers_.find(peer);
  if (it != peers_.end()) return it->second.failed ? nullptr : &it->second;
  if (!is_shut_down_) fail(peer, "post", "is not connected");
  return nullptr;
}

void LoopbackTransport::fail(int peer, const std::string& call, const std::string& message) {
  add_fault(peer, 0, call, "rank " + std::to_string(peer) + ": " + message);
  auto it = peers_.find(peer);
  if (it == peers_.end()) return;
  it->second.failed = true;
  for (const Group& group : it->second.groups) {
    for (const Put& put : group.puts) complete_later(put.token);
  }
  it->second.groups.clear();
}

void LoopbackTransport::put(int peer, size_t local_offset, size_t remote_offset, size_t bytes,
                            uint64_t token) {
  Peer* entry = find_peer(peer);
  if (entry == nullptr) return complete_later(token);
  const Map& there = entry->region->map;
  const Map& here = region_ ? region_->map : Map();
  const auto to = there.find(remote_offset, bytes), from = here.find(local_offset, bytes);
  if (to && from) {
    entry->groups.back().puts.push_back({from->address, to->address, bytes, token});
    return;
  }
  complete_later(token);
  fail(peer, "put",
       to ? "local " + here.refusal(local_offset, bytes)
          : "remote " + there.refusal(remote_offset, bytes));
}

void LoopbackTransport::fence(int peer) {
  Peer* entry = find_peer(peer);
  if (entry != nullptr && !entry->groups.back().empty()) entry->groups.emplace_back();
}

void LoopbackTransport::put_signal(int peer, size_t remote_offset, uint64_t value) {
  Peer* entry = find_peer(peer);
  if (entry == nullptr) return;
  const auto word = entry->region->map.find_word(remote_offset);
  if (!word) return fail(peer, "put_signal", entry->region->map.word_refusal(remote_offset));
  entry->groups.back().signals.push_back({word->address, value});
}

void LoopbackTransport::store_signal(const Signal& signal) const {
  auto* word = reinterpret_cast<uint64_t*>(signal.to);
  if (options_.seed_missing_release) {
    __atomic_store_n(word, signal.value, __ATOMIC_RELAXED);
  } else {
    // Release: partner is the acquire load of whoever polls this word.
    __atomic_store_n(word, signal.value, __ATOMIC_RELEASE);
  }
}

// Carries out a group or a part of it, and removes it once it is done.
int LoopbackTransport::run(Peer& peer) {
  Group& group = peer.groups.front();
  auto copy = [&](const Put& put) {
    std::memcpy(reinterpret_cast<void*>(put.to), reinterpret_cast<const void*>(put.from),
                put.bytes);
    complete_later(put.token);
  };
  int events = 0;
  // No fence holds a put back: the newest go first.
  if (options_.reorder_unfenced && peer.groups.size() > 1 && !peer.groups.back().puts.empty()) {
    const std::vector<Put> puts = std::exchange(peer.groups.back().puts, {});
    std::for_each(puts.rbegin(), puts.rend(), copy);
    return static_cast<int>(puts.size());
  }
  if (options_.reorder_unfenced && !group.signals.empty() && !group.puts.empty()) {
    for (const Signal& signal : group.signals) store_signal(signal);
    events = static_cast<int>(group.signals.size());
    group.signals.clear();
    return events;
  }
  if (options_.reorder_unfenced) std::reverse(group.puts.begin(), group.puts.end());
  for (const Put& put : group.puts) copy(put);
  for (const Signal& signal : group.signals) store_signal(signal);
  events = static_cast<int>(group.puts.size() + group.signals.size());
  peer.groups.pop_front();
  if (peer.groups.empty()) peer.groups.emplace_back();
  return events;
}

// One group per peer and call, or less: completions arrive late and piecemeal, as they do on a
// network.
int LoopbackTransport::progress() {
  int events = 0;
  for (auto& [rank, peer] : peers_) {
    if (peer.failed || peer.groups.front().empty()) continue;
    if (!peer.link->enter()) {
      fail(rank, "put", "shut its transport down");
      continue;
    }
    events += run(peer);
    peer.link->leave();
  }
  return events + report_completions();
}

bool LoopbackTransport::idle() const {
  for (const auto& [rank, peer] : peers_) {
    if (!peer.failed && !peer.groups.front().empty()) return false;
  }
  return !has_completions();
}

void LoopbackTransport::shutdown(double) noexcept {
  if (is_shut_down_) return;
  is_shut_down_ = true;
  while (!idle()) progress();  // copies only: never waits for a peer
  peers_.clear();
  if (!region_) return;
  Registry::instance().remove(id_);
  std::lock_guard<std::mutex> lock(region_->mutex);
  region_->closed = true;
  for (const auto& link : region_->links) link->close();
}

}  // namespace

std::unique_ptr<Transport> make_loopback(PutListener* listener, int rank, LoopbackOptions options) {
  return std::make_unique<LoopbackTransport>(listener, rank, options);
}

}  // namespace commlib
