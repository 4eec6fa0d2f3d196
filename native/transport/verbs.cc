// Verbs provider: posting, completion, control messages, failure, shutdown. Proxy thread only.
#include "transport/verbs.hpp"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <thread>

namespace commlib {
namespace {

// Work requests carry who they belong to: this bit and the number of a receiver, or the number of a
// peer in the upper half.
constexpr uint64_t kReceiverBit = 1ull << 63;
constexpr std::chrono::milliseconds kMaxPatience{200};
// Asynchronous events cost a system call to look for, and come about never.
constexpr uint64_t kEventPeriod = 256;

uint64_t receiver_id(size_t number) { return kReceiverBit | uint64_t(number); }

}  // namespace

// ---------------------------------------------------------------------------------- posting

// Null if commands to this peer cannot be carried out any more.
VerbsTransport::Peer* VerbsTransport::find_peer(int peer, const char* call) {
  if (is_shut_down_) return nullptr;
  const size_t index = static_cast<size_t>(peer);
  if (peer < 0 || index >= peers_.size() || peers_[index] == nullptr) {
    add_fault(peer, ENOTCONN, call, "rank " + std::to_string(peer) + " is not connected");
    return nullptr;
  }
  return peers_[index]->is_failed ? nullptr : peers_[index].get();
}

void VerbsTransport::put(int peer, size_t local_offset, size_t remote_offset, size_t bytes,
                         uint64_t token) {
  Peer* entry = find_peer(peer, "put");
  if (entry == nullptr) return complete_later(token);
  const RegionMap<uint32_t>&here = lanes_[entry->lane].memory, &there = entry->target.memory;
  const bool is_local_inside = here.find(local_offset, bytes).has_value();
  if (is_local_inside && there.find(remote_offset, bytes)) {
    if (bytes == 0) return complete_later(token);
    return submit(*entry, {false, local_offset, remote_offset, bytes, token});
  }
  complete_later(token);
  fail_peer(*entry, EINVAL, "put",
            is_local_inside ? "remote " + there.refusal(remote_offset, bytes)
                            : "local " + here.refusal(local_offset, bytes));
}

void VerbsTransport::put_signal(int peer, size_t remote_offset, uint64_t value) {
  Peer* entry = find_peer(peer, "put_signal");
  if (entry == nullptr) return;
  if (!entry->target.memory.find_word(remote_offset))
    return fail_peer(*entry, EINVAL, "put_signal",
                     entry->target.memory.word_refusal(remote_offset));
  submit(*entry, {true, 0, remote_offset, sizeof value, value});
}

// Commands wait for progress(), so that one doorbell serves a batch of them.
void VerbsTransport::submit(Peer& peer, const VerbsCommand& command) {
  peer.sender->submit(command);
  mark_dirty(peer);
}

void VerbsTransport::mark_dirty(Peer& peer) {
  if (peer.is_dirty) return;
  peer.is_dirty = true;
  dirty_.push_back(&peer);
}

int VerbsTransport::post_dirty() {
  int events = 0;
  for (size_t i = 0; i < dirty_.size(); ++i) {
    Peer& peer = *dirty_[i];
    peer.is_dirty = false;
    if (peer.is_failed || !peer.sender->is_open()) continue;
    ++events;
    if (const int code = peer.sender->post(); code != 0)
      fail_peer(peer, code, "ibv_post_send", std::strerror(code));
  }
  dirty_.clear();
  return events;
}

// ---------------------------------------------------------------------------------- completion

int VerbsTransport::poll(Lane& lane) {
  ibv_wc done[32];
  const int count = ibv_poll_cq(lane.device->queue(), 32, done);
  if (count < 0) add_fault(-1, EIO, "ibv_poll_cq", lane.device->choice().device + ": failed");
  for (int i = 0; i < count; ++i) {
    if ((done[i].wr_id & kReceiverBit) != 0)
      on_received(done[i]);
    else
      on_sent(done[i]);
  }
  report(tokens_);
  return std::max(count, 0);
}

void VerbsTransport::on_sent(const ibv_wc& done) {
  Peer& peer = *connected_[size_t(done.wr_id >> 32)];
  if (peer.is_failed) return;  // what its queue pair left behind
  if (done.status == IBV_WC_SUCCESS) {
    peer.sender->complete(done.wr_id, &tokens_);
    if (peer.sender->has_held()) mark_dirty(peer);
    return;
  }
  const VerbsApi& api = peer.sender->device().api();
  fail_peer(peer, done.status, "RDMA write",
            std::string(api.wc_status_str(done.status)) + " (status " +
                std::to_string(int(done.status)) + ", vendor error " +
                std::to_string(done.vendor_err) + ")");
}

void VerbsTransport::on_received(const ibv_wc& done) {
  VerbsReceiver& receiver = *receivers_[size_t(done.wr_id & ~kReceiverBit)];
  if (done.status == IBV_WC_WR_FLUSH_ERR) return;  // an event tells why
  int failure = 0;
  std::string what = "receive";
  if (done.status == IBV_WC_SUCCESS) {
    const VerbsReceiver::Signal signal = receiver.take_signal(done.imm_data, &failure);
    const RegionMap<uint32_t>& memory = lanes_[0].memory;  // places are the same in all
    if (const auto word = memory.find_word(signal.offset)) {
      // Release: partner is the acquire load of whoever polls this word.
      __atomic_store_n(reinterpret_cast<uint64_t*>(word->address), signal.value, __ATOMIC_RELEASE);
    } else {
      failure = EINVAL;
      what = "signal: " + memory.word_refusal(signal.offset);
    }
  } else {
    failure = done.status;
  }
  if (failure != 0 && !is_shut_down_)
    add_fault(receiver.peer(), failure, "receive",
              "rank " + std::to_string(rank()) + " from rank " + std::to_string(receiver.peer()) +
                  ": " + what + ": code " + std::to_string(failure));
}

int VerbsTransport::advance() {
  int events = post_dirty();
  for (Lane& lane : lanes_) events += poll(lane);
  events += receive_control();
  if (!asking_.empty()) ask_again();
  if (!dirty_.empty()) events += post_dirty();
  if (++num_progress_ % kEventPeriod == 0) watch_events();
  return events;
}

int VerbsTransport::progress() {
  if (is_shut_down_) return report_completions();
  const int events = advance();
  return events + report_completions();
}

void VerbsTransport::report(std::vector<uint64_t>& tokens) {
  for (uint64_t token : tokens) complete_later(token);
  tokens.clear();
}

bool VerbsTransport::is_drained() const {
  return std::all_of(connected_.begin(), connected_.end(),
                     [](const Peer* peer) { return peer->is_failed || peer->sender->is_idle(); });
}

bool VerbsTransport::idle() const { return is_drained() && !has_completions(); }

// ---------------------------------------------------------------------------------- control

int VerbsTransport::receive_control() {
  int events = 0;
  for (Lane& lane : lanes_) {
    try {
      for (const ControlMessage& message : lane.control->receive()) {
        ++events;
        if (message.kind == ControlKind::kConnect)
          on_connect(message);
        else if (message.kind == ControlKind::kAccept)
          on_accept(message);
      }
    } catch (const TransportException& error) {
      add_fault(-1, error.code(), error.call(),
                "rank " + std::to_string(rank()) + ": " + error.what());
    }
  }
  return events;
}

void VerbsTransport::ask(Peer& peer) {
  Lane& lane = lanes_[peer.lane];
  ControlMessage message;
  message.kind = ControlKind::kConnect;
  message.from = rank();
  message.lane = peer.lane;
  message.cookie = peer.cookie;
  message.end = peer.sender->end();
  message.reply_to = lane.control->address();
  message.is_signal_by_immediate = options_.signal_by_immediate;
  lane.control->send(peer.route, peer.control, message);
  peer.next_try = Clock::now() + peer.patience;
  peer.patience = std::min(2 * peer.patience, kMaxPatience);
}

void VerbsTransport::ask_again() {
  const Clock::time_point now = Clock::now();
  for (Peer* peer : asking_)
    if (now >= peer->next_try) ask(*peer);
}

// A peer wants to send to us.
void VerbsTransport::on_connect(const ControlMessage& message) {
  if (message.lane >= lanes_.size()) return;
  Lane& lane = lanes_[message.lane];
  if (lane.memory.is_empty()) return;
  const auto known = std::find_if(receivers_.begin(), receivers_.end(),
                                  [&](const auto& receiver) { return receiver->is_for(message); });
  if (known != receivers_.end()) return (*known)->accept(*lane.control, rank());
  try {
    receivers_.push_back(
        std::make_unique<VerbsReceiver>(*lane.device, message, receiver_id(receivers_.size())));
    receivers_.back()->accept(*lane.control, rank());
  } catch (const TransportException& error) {
    add_fault(message.from, error.code(), error.call(),
              "rank " + std::to_string(rank()) + " cannot accept rank " +
                  std::to_string(message.from) + ": " + error.what());
  }
}

// A peer has made its end.
void VerbsTransport::on_accept(const ControlMessage& message) {
  const auto found = std::find_if(asking_.begin(), asking_.end(),
                                  [&](const Peer* peer) { return peer->cookie == message.cookie; });
  if (found == asking_.end()) return;
  Peer& peer = **found;
  peer.target.mailbox_address = message.mailbox_address;
  peer.target.mailbox_key = message.mailbox_key;
  try {
    peer.sender->open(message.end, peer.target);
  } catch (const TransportException& error) {
    return fail_peer(peer, error.code(), error.call(), error.what());
  }
  stop_asking(peer);
  mark_dirty(peer);
}

void VerbsTransport::stop_asking(Peer& peer) {
  asking_.erase(std::remove(asking_.begin(), asking_.end(), &peer), asking_.end());
  if (peer.route != nullptr) lanes_[peer.lane].device->destroy_route(peer.route);
  peer.route = nullptr;
}

// ---------------------------------------------------------------------------------- failure

// What the card reports without being asked. A port that goes down is no fault yet: it may come
// back before the retries are used up.
void VerbsTransport::watch_events() {
  for (Lane& lane : lanes_) {
    while (const auto event = lane.device->next_event()) {
      const std::string text =
          lane.device->choice().device + ": " + lane.device->api().event_type_str(event->type);
      const bool is_of_queue_pair = event->type == IBV_EVENT_QP_FATAL ||
                                    event->type == IBV_EVENT_QP_REQ_ERR ||
                                    event->type == IBV_EVENT_QP_ACCESS_ERR;
      if (event->type == IBV_EVENT_DEVICE_FATAL || event->type == IBV_EVENT_CQ_ERR)
        add_fault(-1, event->type, "ibv_get_async_event", text);
      if (!is_of_queue_pair) continue;
      for (Peer* peer : connected_)
        if (!peer->is_failed && peer->sender->qp() == event->qp)
          fail_peer(*peer, event->type, "ibv_get_async_event", text);
      for (const auto& receiver : receivers_)
        if (receiver->qp() == event->qp)
          add_fault(receiver->peer(), event->type, "ibv_get_async_event",
                    "rank " + std::to_string(rank()) + " from rank " +
                        std::to_string(receiver->peer()) + ": " + text);
    }
  }
}

// Ends the connection at once: what was in flight is given up, its tokens are reported.
void VerbsTransport::fail_peer(Peer& peer, int code, const std::string& call,
                               const std::string& message) {
  if (peer.is_failed) return;
  peer.is_failed = true;
  stop_asking(peer);
  std::vector<uint64_t> tokens;
  peer.sender->abandon(&tokens);
  report(tokens);
  if (is_shut_down_) return;  // peers close too, in any order
  add_fault(peer.rank, code, call,
            "rank " + std::to_string(rank()) + " to rank " + std::to_string(peer.rank) + ": " +
                call + ": " + message);
}

// ---------------------------------------------------------------------------------- shutdown

void VerbsTransport::shutdown(double timeout_s) noexcept {
  if (is_shut_down_) return;
  is_shut_down_ = true;
  const auto timeout = std::chrono::duration<double>(timeout_s);
  const auto deadline = Clock::now() + std::chrono::duration_cast<Clock::duration>(timeout);
  while (!is_drained() && Clock::now() < deadline)
    if (advance() == 0) std::this_thread::yield();
  close();
  report_completions();
}

// Nothing here waits for a peer: queue pairs are taken from the card, then the memory.
void VerbsTransport::close() noexcept {
  for (Peer* peer : connected_) {
    stop_asking(*peer);
    peer->sender->abandon(&tokens_);
    peer->is_failed = true;
  }
  report(tokens_);
  receivers_.clear();
  for (const auto& peer : peers_)
    if (peer != nullptr) peer->sender.reset();
  release_lanes();
}

}  // namespace commlib
