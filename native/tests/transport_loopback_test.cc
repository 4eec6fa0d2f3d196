// Loopback and null providers. Runs under ThreadSanitizer too; `--seed-missing-release` is the
// negative control that ThreadSanitizer has to report.
#include <doctest/doctest.h>

#include <cstring>

#include "tests/transport_stream.hpp"
#include "transport/providers.hpp"

namespace commlib::testing {
namespace {

struct Outcome {
  bool is_complete = false;
  uint64_t bad_words = 0;
  bool tokens_once = false;
};

Outcome run_end(Node& node, int peer) {
  Stream stream(node, peer, true, true);
  const auto start = Clock::now();
  Outcome outcome;
  while (!outcome.is_complete && seconds_since(start) < 30.0) outcome.is_complete = stream.step();
  outcome.bad_words = stream.bad_words();
  outcome.tokens_once = node.tokens.each_once(node.shape.messages);
  return outcome;
}

// Both directions at once between two ranks: two proxy threads, two consumer threads.
std::vector<Outcome> run_pair(StreamShape shape, LoopbackOptions options) {
  auto make = [&](PutListener* listener, int rank) {
    return make_loopback(listener, rank, options);
  };
  Node a(0, shape, make), b(1, shape, make);
  a.transport->connect(1, b.transport->address());
  b.transport->connect(0, a.transport->address());
  std::vector<Outcome> outcomes(2);
  std::thread other([&] { outcomes[1] = run_end(b, 0); });
  outcomes[0] = run_end(a, 1);
  other.join();
  return outcomes;
}

void check_pair(const std::vector<Outcome>& outcomes) {
  for (const Outcome& outcome : outcomes) {
    CHECK(outcome.is_complete);
    CHECK(outcome.bad_words == 0);
    CHECK(outcome.tokens_once);
  }
}

TEST_CASE("every word is there when the signal is") {
  check_pair(run_pair({7168, 3000, 8}, {}));
  check_pair(run_pair({256 << 10, 200, 4}, {}));
}

TEST_CASE("a forgotten fence is noticed") {
  StreamShape shape{64, 1, 4};
  Node a(0, shape, [](PutListener* l, int r) { return make_loopback(l, r); });
  Node b(1, shape, [](PutListener* l, int r) { return make_loopback(l, r); });
  a.transport->connect(1, b.transport->address());
  *a.words(0) = 42;
  a.transport->put(1, 0, 0, 64, 0);
  a.transport->put_signal(1, shape.sequence_offset(), 1);
  a.transport->progress();
  CHECK(b.load(shape.sequence_offset()) == 1);
  CHECK(*b.words(0) == 0);
  a.transport->progress();
  CHECK(*b.words(0) == 42);
  CHECK(a.tokens.each_once(1));
}

TEST_CASE("completions come from progress, once, and idle follows them") {
  StreamShape shape{64, 1, 4};
  Node a(0, shape, [](PutListener* l, int r) { return make_loopback(l, r); });
  Node b(1, shape, [](PutListener* l, int r) { return make_loopback(l, r); });
  a.transport->connect(1, b.transport->address());
  CHECK(a.transport->idle());
  for (uint64_t token = 0; token < 3; ++token) {
    a.transport->put(1, 0, 0, 64, token);
    a.transport->fence(1);
  }
  CHECK(a.tokens.reports(0) == 0);
  CHECK_FALSE(a.transport->idle());
  while (!a.transport->idle()) a.transport->progress();
  CHECK(a.tokens.each_once(3));
}

TEST_CASE("signals keep their order without a fence") {
  StreamShape shape{64, 1, 4};
  Node a(0, shape, [](PutListener* l, int r) { return make_loopback(l, r); });
  Node b(1, shape, [](PutListener* l, int r) { return make_loopback(l, r); });
  a.transport->connect(1, b.transport->address());
  for (uint64_t value = 1; value <= 5; ++value) {
    a.transport->put_signal(1, shape.sequence_offset(), value);
  }
  while (!a.transport->idle()) a.transport->progress();
  CHECK(b.load(shape.sequence_offset()) == 5);
}

TEST_CASE("a peer that has shut down is a fault that names it, and puts still complete") {
  StreamShape shape{64, 1, 4};
  Node a(0, shape, [](PutListener* l, int r) { return make_loopback(l, r); });
  auto b =
      std::make_unique<Node>(7, shape, [](PutListener* l, int r) { return make_loopback(l, r); });
  const auto address = b->transport->address();
  a.transport->connect(7, address);
  CHECK_THROWS_AS(a.transport->connect(7, address), TransportException);
  b.reset();
  for (uint64_t token = 0; token < 4; ++token) a.transport->put(7, 0, 0, 64, token);
  while (!a.transport->idle()) a.transport->progress();
  CHECK(a.tokens.each_once(4));
  const auto fault = a.transport->take_fault();
  REQUIRE(fault.has_value());
  CHECK(fault->peer == 7);
  CHECK_FALSE(a.transport->take_fault().has_value());
  CHECK_THROWS_AS(a.transport->connect(8, address), TransportException);
}

TEST_CASE("a put outside a region is a fault and moves nothing") {
  StreamShape shape{64, 1, 4};
  Node a(0, shape, [](PutListener* l, int r) { return make_loopback(l, r); });
  Node b(1, shape, [](PutListener* l, int r) { return make_loopback(l, r); });
  a.transport->connect(1, b.transport->address());
  a.transport->put(1, 0, shape.region_bytes() - 8, 64, 0);
  a.transport->progress();
  CHECK(a.tokens.each_once(1));
  const auto fault = a.transport->take_fault();
  REQUIRE(fault.has_value());
  CHECK(fault->message.find("outside the region") != std::string::npos);
}

TEST_CASE("null completes every put and moves nothing") {
  StreamShape shape{64, 1, 4};
  Node a(0, shape, [](PutListener* l, int r) { return make_transport("null", l, r); });
  a.transport->connect(1, {});
  for (uint64_t token = 0; token < 100; ++token) {
    a.transport->put(1, 0, 0, 64, token);
    a.transport->fence(1);
    a.transport->put_signal(1, 0, token);
  }
  CHECK(a.tokens.reports(0) == 0);
  CHECK(a.transport->progress() == 100);
  CHECK(a.tokens.each_once(100));
  CHECK(a.transport->idle());
}

TEST_CASE("an unknown provider is refused with the names") {
  TokenCounter tokens;
  try {
    make_transport("carrier pigeon", &tokens, 0);
    FAIL("accepted");
  } catch (const std::invalid_argument& error) {
    const std::string message = error.what();
    for (const char* word : {"pigeon", "auto", "verbs", "ucx", "loopback", "null"}) {
      CHECK(message.find(word) != std::string::npos);
    }
  }
}

}  // namespace
}  // namespace commlib::testing

int main(int argc, char** argv) {
  if (argc > 1 && std::strcmp(argv[1], "--seed-missing-release") == 0) {
    commlib::LoopbackOptions options;
    options.seed_missing_release = true;
    options.reorder_unfenced = false;
    commlib::testing::run_pair({7168, 500, 8}, options);
    return 0;  // a race detector makes it non-zero
  }
  return doctest::Context(argc, argv).run();
}
