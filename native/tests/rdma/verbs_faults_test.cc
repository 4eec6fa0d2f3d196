// Verbs provider: peers that die, stop, shut down or are not ready, wrong keys, misuse.
#include <cstring>
#include <optional>

#include "tests/rdma/verbs_rig.hpp"
#include "transport/verbs.hpp"
#include "transport/verbs_control.hpp"

namespace commlib::testing {

TEST_CASE("a killed peer is a fault that names it, and puts still complete") {
  PeerProcess peer = start_peer("endless");
  Node node(0, kEndless, maker());
  peer.connect(node);
  Stream stream(node, 1, true, false);
  step_until_flowing(stream);
  peer.signal(SIGKILL);
  const auto killed = Clock::now();
  CHECK(peer.wait() == -SIGKILL);
  std::optional<TransportFault> fault;
  while (!fault && seconds_since(killed) < 20.0) {
    stream.step();
    fault = node.transport->take_fault();
  }
  REQUIRE(fault.has_value());
  MESSAGE("after ", seconds_since(killed) * 1e3, " ms: ", fault->message);
  CHECK(fault->peer == 1);
  CHECK(fault->code == IBV_WC_RETRY_EXC_ERR);
  CHECK(fault->message.find("rank 0 to rank 1") != std::string::npos);
  const uint64_t first = stream.sent();
  node.transport->put(1, 0, 0, 4096, first);
  node.transport->put_signal(1, 0, 1);
  node.transport->progress();
  CHECK(node.transport->idle());
  CHECK_FALSE(node.transport->take_fault().has_value());
  const auto closing = Clock::now();
  node.transport->shutdown(2.0);
  CHECK(seconds_since(closing) < 2.5);
  CHECK(node.tokens.each_once(first + 1));
}

TEST_CASE("a stopped peer is no fault, traffic resumes, closing does not wait for it") {
  for (const bool by_immediate : {false, true}) {
    PeerProcess peer = start_peer("endless");
    Node node(0, kEndless, maker(by_immediate));
    peer.connect(node);
    Stream stream(node, 1, true, false);
    step_until_flowing(stream);
    peer.signal(SIGSTOP);
    step_for(stream, 0.2);
    const uint64_t before = stream.acknowledged();
    // With immediates: far more signals than it has receives posted.
    for (uint64_t i = 0; by_immediate && i < 3 * kMailboxReceives; ++i)
      node.transport->put_signal(1, kEndless.ack_offset() + 8, i);
    step_for(stream, 3.0);
    CHECK(stream.acknowledged() == before);
    CHECK(node.transport->idle() == !by_immediate);
    check_no_fault(node);
    peer.signal(SIGCONT);
    const auto resumed = Clock::now();
    while (stream.acknowledged() == before && seconds_since(resumed) < kPatience) stream.step();
    CHECK(stream.acknowledged() > before);
    check_no_fault(node);
    peer.signal(SIGSTOP);
    step_for(stream, 0.1);
    const auto closing = Clock::now();
    node.transport->shutdown(0.5);
    CHECK(seconds_since(closing) < 1.6);
    CHECK(node.tokens.each_once(stream.sent()));
  }
}

TEST_CASE("a key that does not fit is a fault at the sender and moves nothing") {
  StreamShape shape{4096, 1, 1};
  for (const bool is_signal : {false, true}) {
    Node a(0, shape, maker()), b(1, shape, maker());
    std::vector<uint8_t> address = b.transport->address();
    VerbsAddressLane lane;
    uint8_t* at = address.data() + sizeof(VerbsAddressHead);
    std::memcpy(&lane, at, sizeof lane);
    (is_signal ? lane.signal_key : lane.data_key) ^= 0x5a;
    std::memcpy(at, &lane, sizeof lane);
    a.transport->connect(1, address);
    *a.words(0) = 42;
    if (is_signal)
      a.transport->put_signal(1, shape.sequence_offset(), 42);
    else
      a.transport->put(1, 0, 0, 4096, 0);
    std::optional<TransportFault> fault;
    REQUIRE(progress_until(a, b, [&] { return (fault = a.transport->take_fault()).has_value(); }));
    MESSAGE(fault->message);
    CHECK(fault->peer == 1);
    CHECK(fault->code == IBV_WC_REM_ACCESS_ERR);
    CHECK(*b.words(0) == 0);
    CHECK(b.load(shape.sequence_offset()) == 0);
    a.transport->progress();
    CHECK(a.tokens.each_once(is_signal ? 0 : 1));
  }
}

TEST_CASE("a receiver that is not ready: waits for ever, or a fault if told how long") {
  StreamShape shape{4096, 1, 1};
  constexpr uint64_t kSignals = 3 * kMailboxReceives;
  for (const int retries : {7, 1}) {
    Node a(0, shape, [&](PutListener* listener, int rank) {
      TransportOptions options = options_of(rank, true);
      options.rnr_retry_count = retries;
      return make_verbs(listener, rank, options);
    });
    Node b(1, shape, maker());
    connect(a, b);
    warm_up(a, b);
    // More than b has receives for, and b does not post new ones.
    for (uint64_t i = 1; i <= kSignals; ++i) a.transport->put_signal(1, shape.sequence_offset(), i);
    std::optional<TransportFault> fault;
    const auto start = Clock::now();
    while (!fault && seconds_since(start) < (retries == 7 ? 2.0 : kPatience)) {
      if (a.transport->progress() == 0) std::this_thread::yield();
      fault = a.transport->take_fault();
    }
    CHECK(b.load(shape.sequence_offset()) == 0);
    if (retries == 7) {
      CHECK(!fault.has_value());
      CHECK(!a.transport->idle());
      const auto has_all = [&] { return b.load(shape.sequence_offset()) == kSignals; };
      CHECK(progress_until(a, b, has_all));
      check_no_fault(a);
    } else {
      REQUIRE(fault.has_value());
      MESSAGE(fault->message);
      CHECK(fault->peer == 1);
      CHECK(fault->code == IBV_WC_RNR_RETRY_EXC_ERR);
    }
  }
}

TEST_CASE("a peer that has shut down is a fault that names it") {
  StreamShape shape{4096, 1, 1};
  Node a(0, shape, maker());
  auto b = std::make_unique<Node>(1, shape, maker());
  connect(a, *b);
  warm_up(a, *b);
  b.reset();
  a.transport->put(1, 0, 0, 4096, 0);
  std::optional<TransportFault> fault;
  REQUIRE(progress_until(a, a, [&] { return (fault = a.transport->take_fault()).has_value(); }));
  CHECK(fault->peer == 1);
  a.transport->progress();
  CHECK(a.tokens.each_once(1));
}

TEST_CASE("a peer that does not answer yet is no fault, and what it is sent arrives later") {
  StreamShape shape{4096, 1, 1};
  Node a(0, shape, maker()), b(1, shape, maker());
  a.transport->connect(1, b.transport->address());
  *a.words(0) = 42;
  a.transport->put(1, 0, shape.receive_offset(0), 8, 0);
  a.transport->put_signal(1, shape.sequence_offset(), 1);
  const auto start = Clock::now();
  while (seconds_since(start) < 1.0) a.transport->progress();  // b does nothing
  check_no_fault(a);
  CHECK(!a.transport->idle());
  // b was never told to connect to a; it need not.
  REQUIRE(progress_until(a, b, [&] { return b.load(shape.sequence_offset()) == 1; }));
  CHECK(*b.words(shape.receive_offset(0)) == 42);
  a.transport->shutdown(1.0);
  for (int i = 0; i < 1000; ++i) b.transport->progress();
  check_no_fault(b);
}

TEST_CASE("a message of set-up that fails here costs itself, and is an error when all do") {
  const auto open = [](const std::string& nic) {
    NicRequest request;
    request.names = {nic};
    return std::make_unique<VerbsDevice>(
        *load_verbs(), choose_nics(read_nic_ports("/sys"), request).front(), TransportOptions{});
  };
  const auto device = open(split(own_nics)[0]), other = open(split(peer_nics)[0]);
  ControlPort port(*device), far(*other);
  ibv_ah* route = device->create_route(other->path());
  ibv_ah* back = other->create_route(device->path());
  // A route of another protection domain cannot be used.
  const auto stranger = open(split(own_nics)[0]);
  ibv_ah* wrong = stranger->create_route(other->path());
  const auto arrives = [](ControlPort& from, ibv_ah* by, ControlPort& to) {
    const auto start = Clock::now();
    for (auto next = start; seconds_since(start) < kPatience;) {
      if (Clock::now() >= next) {  // lost if it came while the receiver was starting anew
        from.send(by, to.address(), {});
        next = Clock::now() + std::chrono::milliseconds(100);
      }
      from.receive();
      if (!to.receive().empty()) return true;
    }
    return false;
  };
  CHECK(arrives(port, route, far));
  uint32_t failures = 0;
  const auto fail = [&] {
    port.send(wrong, far.address(), {});
    const auto start = Clock::now();
    while (seconds_since(start) < 0.1) port.receive();
    ++failures;
  };
  fail();
  CHECK(arrives(port, route, far));
  CHECK(arrives(far, back, port));
  failures = 0;
  try {
    while (failures < 2 * ControlPort::kMaxFailures) fail();
    FAIL("no error");
  } catch (const TransportException& error) {
    MESSAGE(std::string(error.what()));
    CHECK(failures >= ControlPort::kMaxFailures - 1);  // two that fail at once count as one
  }
  CHECK(arrives(port, route, far));
  device->destroy_route(route);
  other->destroy_route(back);
  stranger->destroy_route(wrong);
}

TEST_CASE("shutdown reports the tokens of a peer that never answered") {
  StreamShape shape{4096, 1, 1};
  Node a(0, shape, maker()), b(1, shape, maker());
  a.transport->connect(1, b.transport->address());
  for (uint64_t token = 0; token < 300; ++token) a.transport->put(1, 0, 0, 8, token);
  const auto start = Clock::now();
  a.transport->shutdown(0.3);
  CHECK(seconds_since(start) < 1.4);
  CHECK(a.tokens.each_once(300));
}

TEST_CASE("misuse is reported, not transmitted") {
  StreamShape shape{4096, 1, 4};
  Node a(0, shape, maker()), b(1, shape, maker());
  CHECK_THROWS_AS(a.transport->connect(1, {1, 2, 3}), TransportException);
  CHECK_THROWS_AS(a.transport->register_region(a.base, 4096), TransportException);
  a.transport->put(5, 0, 0, 8, 0);
  auto fault = a.transport->take_fault();
  REQUIRE(fault.has_value());
  CHECK(fault->peer == 5);
  a.transport->connect(2, b.transport->address());
  CHECK_THROWS_AS(a.transport->connect(2, b.transport->address()), TransportException);
  a.transport->put(2, 0, shape.region_bytes(), 8, 1);
  fault = a.transport->take_fault();
  REQUIRE(fault.has_value());
  CHECK(fault->peer == 2);
  CHECK(fault->message.find("outside the region") != std::string::npos);
  a.transport->connect(3, b.transport->address());
  a.transport->put_signal(3, 4, 1);
  fault = a.transport->take_fault();
  REQUIRE(fault.has_value());
  CHECK(fault->message.find("misaligned") != std::string::npos);
  a.transport->progress();
  CHECK(a.tokens.each_once(2));
}

}  // namespace commlib::testing
