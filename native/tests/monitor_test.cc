// Heartbeats, and how faults are judged and spread, over a transport that writes down what it is
// told.
#include <doctest/doctest.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "tests/proxy_rig.hpp"

using namespace commlib;
using namespace commlib::testing;

namespace {

constexpr size_t kRingBytes = 4096;
constexpr uint64_t kClosed = ~0ull;

}  // namespace

TEST_CASE("a fault of the transport becomes the Runtime's fault") {
  for (int peer : {1, -1}) {
    ProxyEnd end(0, {0, 1, 2}, kRingBytes);
    FakeTransport& fake = end.use_fake();
    end.proxy().start();
    fake.fail({peer, -25, "put_nbx", "rank 1: connection reset"});
    REQUIRE(wait_until([&] { return end.board().raised(); }));
    const FaultRecord record = end.board().record();
    CHECK(record.kind == (peer < 0 ? FaultKind::kTransport : FaultKind::kPeerLost));
    CHECK(record.rank == 0);
    CHECK(record.peer == peer);
    CHECK(record.code == -25);
    CHECK(std::string(record.phase) == "transport/put_nbx");
    CHECK(std::string(record.detail) == "rank 1: connection reset");
    // The first fault stays; a later one is a consequence.
    fake.fail({2, -1, "later", "later"});
    end.proxy().stop(false, 0);
    CHECK(end.board().record().peer == peer);
    CHECK(fake.is_shut_down());
  }
}

TEST_CASE("a peer that has said good-bye can neither fail nor fall silent") {
  ProxyEnd end(0, {0, 1, 2}, kRingBytes);
  FakeTransport& fake = end.use_fake(0.2);
  store_release(end.word(end.mesh().registered().heartbeat_in, 1), kClosed);
  end.proxy().start();
  fake.fail({1, -25, "put_nbx", "rank 1: closed its endpoint"});
  const double begin = now_s();
  uint64_t beat = 0;
  // The other peer goes on beating; its failure is the sign that the first one was passed over.
  REQUIRE(wait_until([&] {
    store_release(end.word(end.mesh().registered().heartbeat_in, 2), ++beat);
    return now_s() - begin > 0.7;
  }));
  CHECK(!end.board().raised());
  fake.fail({2, -25, "put_nbx", "rank 2: connection reset"});
  REQUIRE(wait_until([&] { return end.board().raised(); }));
  CHECK(end.board().record().peer == 2);
}

TEST_CASE("silence is judged from the first beat on") {
  ProxyEnd end(0, {0, 1}, kRingBytes);
  end.use_fake(0.2);
  uint64_t* beat = end.word(end.mesh().registered().heartbeat_in, 1);
  const double begin = now_s();
  end.proxy().start();
  // Never seen: the deadline of an operation covers a peer that does not start.
  REQUIRE(wait_until([&] { return now_s() - begin > 0.5; }));
  CHECK(!end.board().raised());
  const double last = now_s();
  store_release(beat, 1);
  REQUIRE(wait_until([&] { return end.board().raised(); }));
  CHECK(now_s() - last > 0.2);
  const FaultRecord record = end.board().record();
  CHECK(record.kind == FaultKind::kPeerLost);
  CHECK(record.rank == 0);
  CHECK(record.peer == 1);
  CHECK(record.seen == 1);
  CHECK(std::string(record.phase) == "heartbeat");
}

TEST_CASE("a process that was away itself does not take its absence for that of others") {
  ProxyEnd end(0, {0, 1}, kRingBytes);
  FakeTransport& fake = end.use_fake(0.4);
  uint64_t* beat = end.word(end.mesh().registered().heartbeat_in, 1);
  const auto num_beats = [&] { return fake.events(Event::kSignal).size(); };
  store_release(beat, 1);
  end.proxy().start();
  REQUIRE(wait_until([&] { return num_beats() > 2; }));  // the peer's beat has been seen
  end.proxy().set_frozen(true);
  const double begin = now_s();
  REQUIRE(wait_until([&] { return now_s() - begin > 0.6; }));
  const size_t before = num_beats();
  end.proxy().set_frozen(false);
  // It looks again, and the peer, which was away as well, has not beaten yet.
  REQUIRE(wait_until([&] { return num_beats() > before + 1; }));
  for (uint64_t value = 2; value < 10; ++value) {
    store_release(beat, value);
    const size_t now = num_beats();
    REQUIRE(wait_until([&] { return num_beats() > now; }));
  }
  CHECK(!end.board().raised());
}

TEST_CASE("a fault is told to every peer but the failed one, once") {
  // Rank 1 of {0, 0 | 1, 1 | 2, 2}: node peer 0, rails 3 and 5.
  ProxyEnd end(1, {0, 0, 1, 1, 2, 2}, kRingBytes);
  Arena neighbour(end.mesh().control().total_bytes, 0, end.mesh().control().total_bytes);
  end.mesh().map_peer(0, neighbour.address());
  FakeTransport& fake = end.use_fake(0.4);
  end.proxy().start();
  fake.fail({3, -25, "put_nbx", "rank 3: connection reset"});
  const RegisteredRegion& there = end.mesh().registered_of(5);
  const auto is_told = [&](const Event& event) {
    return event.kind == Event::kSignal &&
           event.remote_offset == RegisteredRegion::line(there.fault_count_in, 1);
  };
  const auto num_told = [&] {
    const auto events = fake.events(Event::kSignal);
    return std::count_if(events.begin(), events.end(), is_told);
  };
  const auto own_beat = [&] {
    return load_acquire(end.mesh().arena_word(1, end.mesh().control().heartbeat));
  };
  REQUIRE(wait_until([&] { return num_told() > 0; }));
  const size_t num_events = fake.events().size();
  const uint64_t beat = own_beat();
  REQUIRE(wait_until([&] { return own_beat() > beat + 5; }));  // the node still sees us
  CHECK(num_told() == 1);
  CHECK(fake.events().size() == num_events);  // other nodes: it was the last they heard of us
  const std::vector<Event> puts = fake.events(Event::kPut);
  REQUIRE(puts.size() == 1);
  CHECK(puts[0].peer == 5);
  CHECK(puts[0].bytes == sizeof(FaultRecord));
  CHECK(puts[0].local_offset == end.mesh().registered().fault_record_out);
  CHECK(puts[0].remote_offset == there.fault_record_in_of(1));
  const auto* told =
      reinterpret_cast<uint64_t*>(neighbour.base() + end.mesh().control().fault_count_of(1));
  CHECK(load_acquire(told) == 1);
  FaultRecord copy;
  std::memcpy(static_cast<void*>(&copy), neighbour.base() + end.mesh().control().fault_record_of(1),
              sizeof copy);
  CHECK(copy.peer == 3);
  CHECK(copy.rank == 1);
}

TEST_CASE("a fault that a peer reports is taken over as it is") {
  for (bool is_local : {true, false}) {
    ProxyEnd end(1, {0, 0, 1, 1}, kRingBytes);
    Arena neighbour(end.mesh().control().total_bytes, 0, end.mesh().control().total_bytes);
    end.mesh().map_peer(0, neighbour.address());
    end.use_fake(1);
    FaultRecord fault;
    fault.kind = FaultKind::kTimeout;
    fault.rank = 2;
    fault.peer = 3;
    fault.channel = 3;
    fault.set_phase("dispatch/expand");
    const RegisteredRegion& registered = end.mesh().registered();
    const ControlRegion& control = end.mesh().control();
    uint8_t* record = is_local ? end.mesh().arena_base(1) + control.fault_record_of(0)
                               : end.mesh().memory().base() + registered.fault_record_in_of(3);
    uint64_t* count = is_local ? end.mesh().arena_word(1, control.fault_count_of(0))
                               : end.word(registered.fault_count_in, 3);
    std::memcpy(record, &fault, sizeof fault);
    end.proxy().start();
    CHECK(!end.board().raised());
    store_release(count, 1);
    REQUIRE(wait_until([&] { return end.board().raised(); }));
    const FaultRecord taken = end.board().record();
    CHECK(taken.kind == FaultKind::kTimeout);
    CHECK(taken.rank == 2);
    CHECK(taken.peer == 3);
    CHECK(taken.channel == 3);
    CHECK(std::string(taken.phase) == "dispatch/expand");
  }
}

TEST_CASE("node peers tell each other of faults through shared memory") {
  for (const int first : {0, 1}) {
    ProxyEnd ends[2] = {ProxyEnd(0, {0, 0}, kRingBytes), ProxyEnd(1, {0, 0}, kRingBytes)};
    for (int rank : {0, 1}) {
      ends[rank].mesh().map_peer(1 - rank, ends[1 - rank].mesh().arena()->address());
      ends[rank].set_transport(nullptr, 0.4);
    }
    for (ProxyEnd& end : ends) end.proxy().start();
    FaultRecord fault;
    fault.kind = FaultKind::kTimeout;
    fault.rank = first;
    fault.peer = 1 - first;
    fault.tag = 77;
    fault.set_detail("no progress for 1.0 s");
    CHECK(ends[first].board().raise(fault));
    REQUIRE(wait_until([&] { return ends[1 - first].board().raised(); }));
    const FaultRecord taken = ends[1 - first].board().record();
    CHECK(std::memcmp(&taken, &fault, sizeof fault) == 0);
    CHECK(!ends[1 - first].board().raise(FaultRecord{}));  // the first one stays
    CHECK(ends[1 - first].board().record().tag == 77);
  }
}
