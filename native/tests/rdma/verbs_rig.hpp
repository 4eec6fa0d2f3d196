// What the tests of the verbs provider share: ports from the command line, ranks, patience.
#pragma once

#include <doctest/doctest.h>

#include "tests/peer_process.hpp"
#include "tests/stream_pair.hpp"
#include "transport/providers.hpp"

namespace commlib::testing {

inline std::string own_nics, peer_nics;  // comma-separated, from the command line

constexpr StreamShape kSmall{7168, 400, 16};
constexpr StreamShape kLarge{256 << 10, 40, 8};
constexpr StreamShape kEndless{64 << 10, 1ull << 40, 16};

inline std::vector<std::string> split(const std::string& list) {
  std::vector<std::string> parts(1);
  for (char c : list) {
    if (c == ',')
      parts.emplace_back();
    else
      parts.back() += c;
  }
  return parts;
}

// Rank 0 uses its own ports, the others the peer's. A dead peer is noticed after
// 7 * 4.096 us * 2^15 = 0.9 s or a few times that. soft-RoCE acknowledges every 64th packet and
// starts to count anew with every acknowledgement: at 0.5% loss one attempt in four fails, and with
// 3 repetitions one run in twenty failed for that alone.
inline TransportOptions options_of(int rank, bool signal_by_immediate = false) {
  TransportOptions options;
  options.nics = split(rank == 0 ? own_nics : peer_nics);
  options.signal_by_immediate = signal_by_immediate;
  options.ack_timeout = 15;
  options.retry_count = 6;
  return options;
}

inline NodeMaker maker(bool signal_by_immediate = false) {
  return [signal_by_immediate](PutListener* listener, int rank) {
    return make_verbs(listener, rank, options_of(rank, signal_by_immediate));
  };
}

inline void connect(Node& a, Node& b) {
  a.transport->connect(b.rank, b.transport->address());
  b.transport->connect(a.rank, a.transport->address());
}

// Both progress until it holds; false after kPatience.
inline bool progress_until(Node& a, Node& b, const std::function<bool()>& is_true) {
  const auto start = Clock::now();
  while (!is_true()) {
    if (seconds_since(start) > kPatience) return false;
    if (a.transport->progress() + b.transport->progress() == 0) std::this_thread::yield();
  }
  return true;
}

// Rank 0 reaches rank 1, so that what follows is not about setting up.
inline void warm_up(Node& a, Node& b) {
  a.transport->put_signal(b.rank, b.shape.ack_offset(), 77);
  REQUIRE(progress_until(a, b, [&] { return b.load(b.shape.ack_offset()) == 77; }));
  REQUIRE(progress_until(a, b, [&] { return a.transport->idle(); }));
}

inline void check_no_fault(Node& node) {
  const auto fault = node.transport->take_fault();
  CHECK_MESSAGE(!fault.has_value(), (fault ? fault->message : ""));
}

inline void step_for(Stream& stream, double seconds) {
  const auto start = Clock::now();
  while (seconds_since(start) < seconds) stream.step();
}

inline void step_until_flowing(Stream& stream) {
  const auto start = Clock::now();
  while (stream.acknowledged() == 0 && seconds_since(start) < kPatience) stream.step();
  REQUIRE(stream.acknowledged() > 0);
}

// Arguments of a second process with the same ports.
inline PeerProcess start_peer(const char* shape) {
  return PeerProcess({"--nics", own_nics, "--peer-nics", peer_nics, "--peer", shape});
}

}  // namespace commlib::testing
