#include "proxy/monitor.hpp"

#include <algorithm>
#include <cstring>

#include "common/atomics.hpp"

namespace commlib {
namespace {

constexpr uint64_t kClosedBeat = ~0ull;

}  // namespace

Monitor::Monitor(Mesh& mesh, Transport* transport, FaultBoard& board, const MonitorShare& share)
    : mesh_(mesh),
      transport_(transport),
      board_(board),
      heartbeat_timeout_s_(share.heartbeat_timeout_s),
      has_node_peers_(share.has_node_peers),
      fault_stage_(share.fault_stage),
      period_s_(std::clamp(share.heartbeat_timeout_s / 20, 0.002, 0.1)) {
  const Group& group = mesh.group();
  if (has_node_peers_)
    for (int rank : group.peers())
      if (rank != group.rank()) peers_.push_back({rank, true, 0, 0});
  for (int rank : share.remote_peers) peers_.push_back({rank, false, 0, 0});
}

uint64_t Monitor::read_beat(const Peer& peer) const {
  const uint64_t* word = peer.is_local ? mesh_.arena_word(peer.rank, mesh_.control().heartbeat)
                                       : mesh_.registered_word(RegisteredRegion::line(
                                             mesh_.registered().heartbeat_in, peer.rank));
  return load_acquire(word);  // partner: beat() at the peer
}

void Monitor::beat(uint64_t value) {
  const int me = mesh_.group().rank();
  if (has_node_peers_) store_release(mesh_.arena_word(me, mesh_.control().heartbeat), value);
  // Whoever has been told of the fault may leave at any moment; from then on nothing is sent.
  if (spread_) return;
  for (const Peer& peer : peers_) {
    if (peer.is_local) continue;
    const size_t there = RegisteredRegion::line(mesh_.registered_of(peer.rank).heartbeat_in, me);
    transport_->put_signal(peer.rank, there, value);
  }
}

bool Monitor::tick(double now) {
  if (now < next_tick_) return false;
  next_tick_ = now + period_s_;
  beat(++beats_);
  collect_faults();
  check_beats(now);
  if (board_.raised()) spread_fault();
  last_tick_ = now;
  return true;
}

void Monitor::check_beats(double now) {
  // If this very process did not run for a while (stopped, swapped out), the peers' silence is only
  // our own absence: start their clocks anew.
  const bool was_away = last_tick_ == 0 || now - last_tick_ > heartbeat_timeout_s_ / 2;
  for (Peer& peer : peers_) {
    const uint64_t value = read_beat(peer);
    // 0: the peer has not started yet; the deadline of the waiting operation covers that.
    if (value != peer.last_beat || was_away || value == 0 || value == kClosedBeat) {
      peer.last_beat = value;
      peer.last_change = now;
    } else if (now - peer.last_change > heartbeat_timeout_s_ && !board_.raised()) {
      FaultRecord fault;
      fault.kind = FaultKind::kPeerLost;
      fault.rank = mesh_.group().rank();
      fault.peer = peer.rank;
      fault.seen = value;
      fault.expected = value + 1;
      fault.set_phase("heartbeat");
      char text[sizeof fault.detail];
      std::snprintf(text, sizeof text, "no heartbeat for %.1f s (limit %.1f s)",
                    now - peer.last_change, heartbeat_timeout_s_);
      fault.set_detail(text);
      board_.raise(fault);
    }
  }
}

void Monitor::collect_faults() {
  if (board_.raised()) return;
  const int me = mesh_.group().rank();
  for (const Peer& peer : peers_) {
    const uint64_t* count;
    const uint8_t* record;
    if (peer.is_local) {
      count = mesh_.arena_word(me, mesh_.control().fault_count_of(peer.rank));
      record = mesh_.arena_base(me) + mesh_.control().fault_record_of(peer.rank);
    } else {
      count = mesh_.registered_word(
          RegisteredRegion::line(mesh_.registered().fault_count_in, peer.rank));
      record = mesh_.memory().base() + mesh_.registered().fault_record_in_of(peer.rank);
    }
    if (load_acquire(count) == 0) continue;  // partner: spread_fault() at the peer
    FaultRecord fault;
    std::memcpy(static_cast<void*>(&fault), record, sizeof fault);
    board_.raise(fault);
    return;
  }
}

// The last that other nodes hear of us.
void Monitor::spread_fault() {
  if (spread_) return;
  spread_ = true;
  const FaultRecord fault = board_.record();
  const int me = mesh_.group().rank();
  for (const Peer& peer : peers_) {
    if (!peer.is_local) continue;
    std::memcpy(mesh_.arena_base(peer.rank) + mesh_.control().fault_record_of(me), &fault,
                sizeof fault);
    // Partner: collect_faults() at the peer.
    store_release(mesh_.arena_word(peer.rank, mesh_.control().fault_count_of(me)), 1);
  }
  if (transport_ == nullptr) return;
  std::call_once(*fault_stage_, [&] {
    std::memcpy(mesh_.memory().base() + mesh_.registered().fault_record_out, &fault, sizeof fault);
  });
  for (const Peer& peer : peers_) {
    if (peer.is_local || peer.rank == fault.peer) continue;
    const RegisteredRegion& there = mesh_.registered_of(peer.rank);
    transport_->put(peer.rank, mesh_.registered().fault_record_out, there.fault_record_in_of(me),
                    sizeof fault, ~0ull);
    transport_->fence(peer.rank);
    transport_->put_signal(peer.rank, RegisteredRegion::line(there.fault_count_in, me), 1);
  }
}

void Monitor::say_closed() { beat(kClosedBeat); }

bool Monitor::is_closed(int peer) const {
  for (const Peer& p : peers_)
    if (p.rank == peer) return read_beat(p) == kClosedBeat;
  return false;
}

bool Monitor::are_remote_peers_closed() const {
  return std::all_of(peers_.begin(), peers_.end(), [this](const Peer& peer) {
    return peer.is_local || read_beat(peer) == kClosedBeat;
  });
}

}  // namespace commlib
