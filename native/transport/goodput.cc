#include "transport/goodput.hpp"

#include <algorithm>

#include "common/atomics.hpp"
#include "common/backoff.hpp"

namespace commlib {
namespace {

constexpr size_t kPage = 4096;

// Per peer a line for the signal that it sent and a line for the acknowledgement of ours.
size_t arrived_offset(int peer) { return 2 * kLine * size_t(peer); }
size_t ack_offset(int peer) { return arrived_offset(peer) + kLine; }

}  // namespace

GoodputProbe::GoodputProbe(const std::string& transport, int rank, int num_ranks,
                           size_t message_bytes, int window, TransportOptions options,
                           void* messages)
    : rank_(rank),
      words_bytes_(align_up(arrived_offset(num_ranks), kPage)),
      message_bytes_(message_bytes),
      window_(window),
      memory_(kPage + words_bytes_ + (messages ? 0 : message_bytes * size_t(window))) {
  options.has_device_region = messages != nullptr;
  transport_ = make_transport(transport, this, rank, options);
  const auto address = reinterpret_cast<uintptr_t>(memory_.data());
  base_ = memory_.data() + (align_up(address, kPage) - address);
  const size_t message_memory = message_bytes * size_t(window);
  transport_->register_region(base_, words_bytes_ + (messages ? 0 : message_memory));
  // Either way messages lie behind the words.
  if (messages != nullptr) transport_->register_device_region({messages, message_memory});
}

GoodputProbe::~GoodputProbe() { transport_->shutdown(1.0); }

void GoodputProbe::connect(int peer, const std::vector<uint8_t>& address) {
  transport_->connect(peer, address);
}

uint64_t* GoodputProbe::arrived_word(int peer) const {
  return reinterpret_cast<uint64_t*>(base_ + arrived_offset(peer));
}

uint64_t* GoodputProbe::ack_word(int peer) const {
  return reinterpret_cast<uint64_t*>(base_ + ack_offset(peer));
}

void GoodputProbe::step(double deadline) {
  thread_local Backoff backoff(100);
  if (transport_->progress() > 0)
    backoff.reset();
  else
    backoff.wait();
  if (const auto fault = transport_->take_fault())
    throw TransportException(fault->call, fault->code, fault->peer, fault->message);
  if (now_s() > deadline)
    throw TransportException("goodput", 0, -1, "rank " + std::to_string(rank_) + " timed out");
}

void GoodputProbe::put_all(const std::vector<int>& targets, const std::vector<size_t>& bytes,
                           double deadline) {
  std::vector<size_t> left = bytes;
  uint64_t message = 0;
  for (bool has_moved = true; has_moved;) {
    has_moved = false;
    for (size_t i = 0; i < targets.size(); ++i) {
      if (left[i] == 0) continue;
      while (outstanding_ >= window_) step(deadline);
      const size_t part = std::min(message_bytes_, left[i]);
      const size_t slot = words_bytes_ + (message % size_t(window_)) * message_bytes_;
      ++outstanding_;
      transport_->put(targets[i], slot, slot, part, message++);
      transport_->progress();
      left[i] -= part;
      has_moved = true;
    }
  }
}

double GoodputProbe::run(const std::vector<int>& targets, const std::vector<size_t>& bytes,
                         const std::vector<int>& sources, uint64_t round, double timeout_s) {
  const double begin = now_s();
  const double deadline = begin + timeout_s;
  put_all(targets, bytes, deadline);
  for (int peer : targets) {
    transport_->fence(peer);
    transport_->put_signal(peer, arrived_offset(rank_), round);
  }
  double seconds = 0;
  size_t num_acknowledged = 0;
  std::vector<bool> is_served(sources.size());
  size_t num_served = 0;
  while (num_acknowledged < targets.size() || num_served < sources.size() || !transport_->idle()) {
    step(deadline);
    for (size_t i = 0; i < sources.size(); ++i) {
      // Partner: the put_signal above at the peer.
      if (is_served[i] || load_acquire(arrived_word(sources[i])) < round) continue;
      transport_->put_signal(sources[i], ack_offset(rank_), round);
      is_served[i] = true;
      ++num_served;
    }
    if (num_acknowledged == targets.size()) continue;
    num_acknowledged = 0;
    for (int peer : targets)  // partner: the put_signal of the acknowledgement at the peer
      num_acknowledged += load_acquire(ack_word(peer)) >= round;
    if (num_acknowledged == targets.size()) seconds = now_s() - begin;
  }
  return seconds;
}

}  // namespace commlib
