// Injects faults into another transport. What it does is within the contract of transport.hpp, at
// its worst (delay, reorder), or is one defined breach of it (a completion twice, a lost peer).
//
// All decisions are hashes of the seed and the number of the command, so the same commands meet the
// same faults, however the threads run.
#pragma once

#include <algorithm>
#include <atomic>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "transport/transport.hpp"

namespace commlib::testing {

struct FaultPlan {
  uint64_t seed = 0;
  // Commands and completions are held back for up to so many calls of progress().
  int max_delay = 0;
  // What no fence keeps in order comes in another order: commands of all channels to one peer, the
  // peers among each other, completions.
  bool reorder = false;
  int duplicate_percent = 0;  // completions that are reported a second time, later
  int lost_peer = -1;         // commands to this rank vanish ...
  uint64_t lost_after = 0;    // ... after so many puts to it
  bool is_noticed = true;     // reported like a reset connection; else the puts never complete
};

// What was injected; for the tests, which must know that there was something.
struct InjectedFaults {
  std::atomic<uint64_t> delayed{0}, reordered{0}, duplicated{0}, vanished{0};
};

class FaultyTransport final : public Transport, private PutListener {
 public:
  using Maker = std::function<std::unique_ptr<Transport>(PutListener*, int rank)>;

  FaultyTransport(PutListener* listener, int rank, FaultPlan plan,
                  std::shared_ptr<InjectedFaults> injected, const Maker& make)
      : listener_(listener), rank_(rank), plan_(plan), injected_(std::move(injected)) {
    inner_ = make(this, rank);
  }
  ~FaultyTransport() override { shutdown(0.0); }

  std::string name() const override { return "faulty " + inner_->name(); }
  std::string describe() const override {
    return "faults of seed " + std::to_string(plan_.seed) + " in " + inner_->describe();
  }
  void register_region(void* base, size_t bytes) override { inner_->register_region(base, bytes); }
  void register_device_region(const DeviceRegion& region) override {
    inner_->register_device_region(region);
  }
  DeviceReach device_reach(int peer) const override { return inner_->device_reach(peer); }
  std::vector<uint8_t> address() const override { return inner_->address(); }
  void connect(int peer, const std::vector<uint8_t>& address) override {
    inner_->connect(peer, address);
  }

  void put(int peer, size_t local_offset, size_t remote_offset, size_t bytes,
           uint64_t token) override {
    Peer& entry = peers_[peer];
    if (peer == plan_.lost_peer && entry.num_puts >= plan_.lost_after) lose(peer, entry);
    ++entry.num_puts;
    if (entry.is_lost) return vanish(token);
    hold(peer, entry, {Kind::kPut, local_offset, remote_offset, bytes, token});
  }
  void fence(int peer) override {
    Peer& entry = peers_[peer];
    if (!entry.groups.back().empty())
      entry.groups.emplace_back();
    else if (entry.groups.size() == 1)  // nothing is held back: what was issued is fenced
      inner_->fence(peer);
  }
  void put_signal(int peer, size_t remote_offset, uint64_t value) override {
    Peer& entry = peers_[peer];
    if (!entry.is_lost)
      hold(peer, entry, {Kind::kSignal, 0, remote_offset, sizeof value, value});
    else
      ++injected_->vanished;
  }

  int progress() override {
    ++round_;
    int events = 0;
    std::vector<int> order;
    for (const auto& [peer, entry] : peers_) order.push_back(peer);
    if (plan_.reorder && !order.empty())
      std::rotate(order.begin(), order.begin() + long(decide(round_, 7) % order.size()),
                  order.end());
    for (int peer : order) events += pass(peer, peers_[peer]);
    events += inner_->progress();
    return events + report();
  }

  bool idle() const override {
    return num_held_ == 0 && completions_.empty() && swallowed_.empty() && inner_->idle();
  }

  std::optional<TransportFault> take_fault() override {
    if (faults_.empty()) return inner_->take_fault();
    TransportFault fault = std::move(faults_.front());
    faults_.pop_front();
    return fault;
  }

  void shutdown(double timeout_s) noexcept override {
    if (is_shut_down_) return;
    is_shut_down_ = true;
    for (auto& [peer, entry] : peers_) pass(peer, entry);
    inner_->shutdown(timeout_s);
    for (uint64_t token : swallowed_) complete(token);
    swallowed_.clear();
    report();
  }

 private:
  enum class Kind { kPut, kSignal };

  struct Command {
    Kind kind;
    size_t local_offset;
    size_t remote_offset;
    size_t bytes;
    uint64_t value;  // token of a put, value of a signal
    uint64_t due = 0;
    uint64_t place = 0;  // among those of its group that are due, lowest first
  };
  using Commands = std::vector<Command>;

  struct Peer {
    std::deque<Commands> groups{1};  // separated by fences; the last one takes new commands
    uint64_t num_commands = 0;
    uint64_t num_puts = 0;
    bool is_lost = false;
  };

  struct Completion {
    uint64_t token;
    uint64_t due;
    uint64_t place;
  };

  // splitmix64 of seed, rank, number and purpose.
  uint64_t decide(uint64_t number, uint64_t purpose) const {
    uint64_t z = plan_.seed * 0x9E3779B97F4A7C15ull + uint64_t(rank_) * 0xD1B54A32D192ED03ull +
                 number * 0x2545F4914F6CDD1Dull + purpose * 0xA24BAED4963EE407ull;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
  }
  uint64_t delay(uint64_t number, uint64_t purpose) const {
    return decide(number, purpose) % uint64_t(plan_.max_delay + 1);
  }

  void hold(int peer, Peer& entry, Command command) {
    const uint64_t number = (uint64_t(peer) << 40) + entry.num_commands++;
    command.due = round_ + delay(number, 1);
    command.place = plan_.reorder ? decide(number, 2) : number;
    if (command.due > round_) ++injected_->delayed;
    entry.groups.back().push_back(command);
    ++num_held_;
  }

  // Gives the inner transport what is due, group by group.
  int pass(int peer, Peer& entry) {
    int events = 0;
    for (;;) {
      Commands& group = entry.groups.front();
      for (size_t i = next_due(group); i < group.size(); i = next_due(group), ++events) {
        if (i > 0) ++injected_->reordered;
        issue(peer, group[i]);
        group.erase(group.begin() + long(i));
        --num_held_;
      }
      if (!group.empty() || entry.groups.size() == 1) return events;
      entry.groups.pop_front();
      inner_->fence(peer);
    }
  }

  // Index of the command to issue now, or the number of commands. Without reordering only the
  // first; signals of one word keep their order in any case.
  size_t next_due(const Commands& group) const {
    size_t best = group.size();
    for (size_t i = 0; i < group.size(); ++i) {
      if (i > 0 && !plan_.reorder) break;
      const Command& command = group[i];
      if (command.due > round_ && !is_shut_down_) continue;
      const bool is_behind =
          command.kind == Kind::kSignal &&
          std::any_of(group.begin(), group.begin() + long(i), [&](const Command& other) {
            return other.kind == Kind::kSignal && other.remote_offset == command.remote_offset;
          });
      if (!is_behind && (best == group.size() || command.place < group[best].place)) best = i;
    }
    return best;
  }

  void issue(int peer, const Command& command) {
    if (command.kind == Kind::kPut)
      inner_->put(peer, command.local_offset, command.remote_offset, command.bytes, command.value);
    else
      inner_->put_signal(peer, command.remote_offset, command.value);
  }

  // From now on nothing reaches the peer, not even what is held back.
  void lose(int peer, Peer& entry) {
    if (entry.is_lost) return;
    entry.is_lost = true;
    for (const Commands& group : entry.groups) {
      num_held_ -= group.size();
      for (const Command& command : group)
        if (command.kind == Kind::kPut) vanish(command.value);
    }
    entry.groups.assign(1, {});
    if (plan_.is_noticed)
      faults_.push_back({peer, 0, "injected", "rank " + std::to_string(peer) + ": lost by plan"});
  }
  void vanish(uint64_t token) {
    ++injected_->vanished;
    if (plan_.is_noticed)
      complete(token);
    else
      swallowed_.push_back(token);
  }

  void on_put_complete(uint64_t token) override { complete(token); }
  void on_fault() override { listener_->on_fault(); }
  void complete(uint64_t token) {
    const uint64_t number = num_completions_++;
    const uint64_t place = plan_.reorder ? decide(number, 3) : number;
    completions_.push_back({token, round_ + delay(number, 4), place});
    if (decide(number, 5) % 100 >= uint64_t(plan_.duplicate_percent)) return;
    completions_.push_back({token, round_ + delay(number, 6) + 1, ~place});
    ++injected_->duplicated;
  }
  int report() {
    std::vector<Completion> due;
    const auto is_due = [&](const Completion& completion) {
      return completion.due <= round_ || is_shut_down_;
    };
    std::copy_if(completions_.begin(), completions_.end(), std::back_inserter(due), is_due);
    completions_.erase(std::remove_if(completions_.begin(), completions_.end(), is_due),
                       completions_.end());
    std::sort(due.begin(), due.end(),
              [](const Completion& a, const Completion& b) { return a.place < b.place; });
    for (const Completion& completion : due) listener_->on_put_complete(completion.token);
    return int(due.size());
  }

  PutListener* listener_;
  int rank_;
  FaultPlan plan_;
  std::shared_ptr<InjectedFaults> injected_;
  std::unique_ptr<Transport> inner_;
  std::map<int, Peer> peers_;
  std::vector<Completion> completions_;
  std::vector<uint64_t> swallowed_;
  std::deque<TransportFault> faults_;
  uint64_t round_ = 0;
  uint64_t num_completions_ = 0;
  size_t num_held_ = 0;
  bool is_shut_down_ = false;
};

}  // namespace commlib::testing
