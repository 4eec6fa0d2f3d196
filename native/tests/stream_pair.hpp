// A stream in both directions at once between two ranks that are threads of this process. Needs
// doctest.
#pragma once

#include "tests/transport_stream.hpp"

namespace commlib::testing {

constexpr double kPatience = 60.0;  // only a hang takes that long; emulated devices are slow

struct StreamOutcome {
  bool is_complete = false;
  uint64_t bad_words = 0;
  bool tokens_once = false;
  std::string fault;
};

// Runs one end until done; `done` is counted up so that both ends progress until both are done.
inline StreamOutcome run_stream_end(Node& node, int peer, std::atomic<int>& done) {
  Stream stream(node, peer, true, true);
  const auto start = Clock::now();
  StreamOutcome outcome;
  bool is_counted = false;
  while (done.load() < 2 && seconds_since(start) < kPatience) {
    outcome.is_complete = stream.step();
    if (outcome.is_complete && !is_counted) {
      is_counted = true;
      ++done;
    }
  }
  if (const auto fault = node.transport->take_fault()) outcome.fault = fault->message;
  outcome.bad_words = stream.bad_words();
  outcome.tokens_once = node.tokens.each_once(node.shape.messages);
  return outcome;
}

// Connects ranks 0 and 1, checks every word, shuts both down.
inline void check_stream_pair(Node& a, Node& b) {
  a.transport->connect(1, b.transport->address());
  b.transport->connect(0, a.transport->address());
  std::atomic<int> done{0};
  std::vector<StreamOutcome> outcomes(2);
  std::thread other([&] { outcomes[1] = run_stream_end(b, 0, done); });
  outcomes[0] = run_stream_end(a, 1, done);
  other.join();
  MESSAGE(a.transport->describe());
  for (const StreamOutcome& outcome : outcomes) {
    CHECK(outcome.is_complete);
    CHECK(outcome.bad_words == 0);
    CHECK(outcome.tokens_once);
    CHECK(outcome.fault == "");
  }
  a.transport->shutdown(1.0);
  b.transport->shutdown(1.0);
  CHECK_FALSE(a.transport->take_fault().has_value());
  CHECK_FALSE(b.transport->take_fault().has_value());
}

}  // namespace commlib::testing
