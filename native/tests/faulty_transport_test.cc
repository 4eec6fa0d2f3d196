// Every kind of injected fault ends in the right result or in the right exception, through the
// whole engine.
#include "tests/faulty_transport.hpp"

#include <doctest/doctest.h>

#include "tests/fake_transport.hpp"
#include "tests/fault_bed.hpp"
#include "tests/scene_run.hpp"
#include "tests/transport_stream.hpp"
#include "transport/providers.hpp"

using namespace commlib;
using namespace commlib::testing;

namespace {

std::unique_ptr<Transport> make_inner(PutListener* listener, int rank) {
  return make_loopback(listener, rank);
}

FaultPlan plan_of(uint64_t seed, int max_delay, bool reorder, int duplicate_percent) {
  FaultPlan plan;
  plan.seed = seed;
  plan.max_delay = max_delay;
  plan.reorder = reorder;
  plan.duplicate_percent = duplicate_percent;
  return plan;
}

using Injected = std::shared_ptr<InjectedFaults>;

void use_faults(EngineConfig& config, const FaultPlan& plan, const Injected& injected) {
  config.make_transport = [plan, injected](PutListener* listener, int rank) {
    return std::make_unique<FaultyTransport>(listener, rank, plan, injected, make_inner);
  };
}

// What reaches the inner transport when ten batches of two channels go to two peers each.
std::vector<std::string> trace(const FaultPlan& plan) {
  TokenCounter tokens;
  FakeTransport* fake = nullptr;
  FaultyTransport faulty(&tokens, 0, plan, std::make_shared<InjectedFaults>(),
                         [&](PutListener* listener, int) {
                           auto made = std::make_unique<FakeTransport>(listener);
                           fake = made.get();
                           return made;
                         });
  uint64_t token = 0;
  for (uint64_t batch = 1; batch <= 10; ++batch) {
    for (int peer : {1, 2}) {
      for (size_t channel : {0, 64}) faulty.put(peer, 0, channel, 8, token++);
      faulty.fence(peer);
      for (size_t channel : {0, 64}) faulty.put_signal(peer, 1024 + channel, batch);
    }
    faulty.progress();
  }
  for (int i = 0; i < 100; ++i) faulty.progress();
  std::vector<std::string> lines;
  for (const Event& event : fake->events())
    lines.push_back(std::to_string(event.kind) + " peer " + std::to_string(event.peer) + " at " +
                    std::to_string(event.remote_offset) + ": " + std::to_string(event.value));
  return lines;
}

void run_faulty_scene(Scene scene, const FaultPlan& plan, const Injected& injected) {
  CAPTURE(plan.seed);
  use_faults(scene.config, plan, injected);
  run_scene(scene);
}

const std::vector<std::vector<int>> kTopologies = {{0, 0, 1, 1}, {0, 1, 2, 3}, {0, 0, 0, 1, 2, 2}};

// All topologies, dtypes in turn, with several seeds; every value is held against the oracle.
void run_scenes(const std::function<FaultPlan(uint64_t)>& plan, const Injected& injected) {
  uint64_t seed = 0;
  for (const auto& nodes : kTopologies)
    for (int repeat = 0; repeat < 2; ++repeat) {
      Scene scene = make_scene(nodes, 2, 4);
      scene.dtype = ++seed % 2 == 0 ? Dtype::kBf16 : Dtype::kF32;
      scene.is_weighted = seed % 3 == 0;
      scene.config.num_threads = 1 + int(seed % 2);
      run_faulty_scene(scene, plan(seed), injected);
    }
}

}  // namespace

TEST_CASE("the same seed injects the same faults, another seed others") {
  const FaultPlan plan = plan_of(3, 5, true, 0);
  CHECK(trace(plan) == trace(plan));
  CHECK(trace(plan) != trace(plan_of(4, 5, true, 0)));
  CHECK(trace(plan) != trace(plan_of(3, 0, false, 0)));
}

TEST_CASE("injected faults stay within the contract: fences and the order of one word hold") {
  for (uint64_t seed = 1; seed <= 20; ++seed) {
    const Injected injected = std::make_shared<InjectedFaults>();
    const StreamShape shape{256, 300, 8};
    const auto make = [&](PutListener* listener, int rank) {
      return std::make_unique<FaultyTransport>(listener, rank, plan_of(seed, 6, true, 0), injected,
                                               make_inner);
    };
    Node a(0, shape, make), b(1, shape, make);
    a.transport->connect(1, b.transport->address());
    b.transport->connect(0, a.transport->address());
    Stream from(a, 1, true, false), to(b, 0, false, true);
    const auto start = Clock::now();
    bool is_complete = false;
    while (!is_complete && seconds_since(start) < 30.0) {
      const bool is_sent = from.step();
      is_complete = to.step() && is_sent;
    }
    CHECK(is_complete);
    CHECK(to.bad_words() == 0);
    CHECK(a.tokens.each_once(shape.messages));
    CHECK(injected->delayed > 0);
    CHECK(injected->reordered > 0);
  }
}

TEST_CASE("shutdown reports every token, held back or swallowed") {
  for (const bool is_noticed : {false, true}) {
    FaultPlan plan = plan_of(1, 1000, true, 0);
    plan.lost_peer = 1;
    plan.lost_after = 3;
    plan.is_noticed = is_noticed;
    StreamShape shape{64, 1, 4};
    const auto make = [&](PutListener* listener, int rank) {
      return std::make_unique<FaultyTransport>(listener, rank, plan,
                                               std::make_shared<InjectedFaults>(), make_inner);
    };
    Node a(0, shape, make), b(1, shape, make);
    a.transport->connect(1, b.transport->address());
    for (uint64_t token = 0; token < 8; ++token) a.transport->put(1, 0, 0, 64, token);
    a.transport->progress();
    CHECK_FALSE(a.transport->idle());
    CHECK(a.transport->take_fault().has_value() == is_noticed);
    a.transport->shutdown(1.0);
    CHECK(a.tokens.each_once(8));
  }
}

TEST_CASE("delay: the result is right") {
  const Injected injected = std::make_shared<InjectedFaults>();
  run_scenes([](uint64_t seed) { return plan_of(seed, 12, false, 0); }, injected);
  CHECK(injected->delayed > 100);
  CHECK(injected->reordered == 0);
}

TEST_CASE("reorder between channels: the result is right") {
  const Injected injected = std::make_shared<InjectedFaults>();
  run_scenes([](uint64_t seed) { return plan_of(seed, 0, true, 0); }, injected);
  CHECK(injected->reordered > 100);
  CHECK(injected->delayed == 0);
}

TEST_CASE("duplicate completions: the result is right") {
  const Injected injected = std::make_shared<InjectedFaults>();
  run_scenes([](uint64_t seed) { return plan_of(seed, 3, false, 50); }, injected);
  CHECK(injected->duplicated > 100);
}

TEST_CASE("all of it at once: the result is right") {
  const Injected injected = std::make_shared<InjectedFaults>();
  run_scenes([](uint64_t seed) { return plan_of(100 + seed, 8, true, 30); }, injected);
  CHECK(injected->delayed > 100);
  CHECK(injected->reordered > 100);
  CHECK(injected->duplicated > 100);
}

namespace {

constexpr int kFrom = 1, kTo = 3;  // rails for each other

// Rank kFrom loses rank kTo some way into the second round of a 2 x 2 group.
FaultBedOptions with_lost_peer(bool is_noticed, const Injected& injected) {
  FaultBedOptions options;
  options.adapt = [is_noticed, injected](EngineConfig& config) {
    FaultPlan plan = plan_of(5, 2, true, 10);
    if (config.rank == kFrom) {
      plan.lost_peer = kTo;
      plan.lost_after = 70;
      plan.is_noticed = is_noticed;
    }
    use_faults(config, plan, injected);
  };
  return options;
}

// Operations until one fails on some rank; then every rank's next operation gives the fault.
std::vector<FaultRecord> run_until_fault(FaultBed& bed) {
  for (int round = 0; round < 50; ++round)
    for (const OpKind kind : {OpKind::kDispatch, OpKind::kCombine}) {
      if (all_are(bed.group().run_ops(bed.make(kind)), OutcomeKind::kDone)) continue;
      std::vector<FaultRecord> records;
      for (const Outcome& outcome : bed.group().run_ops(bed.barriers())) {
        REQUIRE(outcome.kind == OutcomeKind::kFault);
        records.push_back(outcome.fault);
      }
      return records;
    }
  return {};
}

// The same record on all ranks, and closing waits for nobody.
FaultRecord check_fault(FaultBed& bed, const Injected& injected) {
  REQUIRE(bed.is_warm());
  CHECK(injected->vanished == 0);
  const std::vector<FaultRecord> records = run_until_fault(bed);
  REQUIRE(records.size() == 4);
  CHECK(injected->vanished > 0);
  for (const FaultRecord& record : records) CHECK(is_same_fault(record, records[0]));
  const double begin = now_s();
  bed.group().close();
  CHECK(now_s() - begin < 10);
  return records[0];
}

}  // namespace

TEST_CASE("a lost peer that the transport notices is lost to all ranks") {
  const Injected injected = std::make_shared<InjectedFaults>();
  FaultBed bed(with_lost_peer(true, injected));
  const FaultRecord record = check_fault(bed, injected);
  CAPTURE(describe(record));
  CHECK(record.kind == FaultKind::kPeerLost);
  CHECK(record.rank == kFrom);
  CHECK(record.peer == kTo);
  CHECK(std::string(record.phase) == "transport/injected");
}

TEST_CASE("a connection that silently swallows everything is found by the heartbeat") {
  const Injected injected = std::make_shared<InjectedFaults>();
  FaultBedOptions options = with_lost_peer(false, injected);
  options.heartbeat_timeout_s = kHeartbeat;
  FaultBed bed(options);
  const FaultRecord record = check_fault(bed, injected);
  CAPTURE(describe(record));
  CHECK(record.kind == FaultKind::kPeerLost);
  CHECK(record.rank == kTo);  // it hears nothing any more
  CHECK(record.peer == kFrom);
  CHECK(std::string(record.phase) == "heartbeat");
}

TEST_CASE("swallowed data without a heartbeat is a timeout that names the peer") {
  const Injected injected = std::make_shared<InjectedFaults>();
  FaultBedOptions options = with_lost_peer(false, injected);
  options.impatient = kTo;
  FaultBed bed(options);
  const FaultRecord record = check_fault(bed, injected);
  CAPTURE(describe(record));
  CHECK(record.kind == FaultKind::kTimeout);
  CHECK(record.rank == kTo);
  CHECK(record.peer == kFrom);
}
