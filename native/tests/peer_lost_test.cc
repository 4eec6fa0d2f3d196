// Ranks that die, stop or merely dawdle; and ends that come at a bad moment.
#include <doctest/doctest.h>

#include "tests/fault_bed.hpp"
#include "tests/wait_until.hpp"

using namespace commlib;
using namespace commlib::testing;

namespace {

FaultBedOptions with_heartbeat() {
  FaultBedOptions options;
  options.heartbeat_timeout_s = kHeartbeat;
  return options;
}

void check_lost(const FaultRecord& record, int peer) {
  const std::string text = describe(record);
  CAPTURE(text);
  CHECK(record.kind == FaultKind::kPeerLost);
  CHECK(record.peer == peer);
}

// Another Runtime of the process.
void check_bystander(FaultBed& bed) {
  CHECK(all_are(bed.group().run_ops(bed.make(OpKind::kDispatch)), OutcomeKind::kDone));
  CHECK(all_are(bed.group().run_ops(bed.make(OpKind::kCombine)), OutcomeKind::kDone));
  for (const Outcome& outcome : bed.group().close()) CHECK(outcome.kind == OutcomeKind::kDone);
}

}  // namespace

TEST_CASE("a stopped process is lost to all within the heartbeat timeout, also to far ranks") {
  for (const int victim : {1, 2}) {
    FaultBed bed(with_heartbeat());
    REQUIRE(bed.is_warm());
    bed.stall(victim, nullptr);
    bed.group().engine(victim).proxy().set_frozen(true);
    const double begin = now_s();
    const Ops ops = bed.make(OpKind::kDispatch);
    bed.group().submit(ops);
    for (int rank = 0; rank < 4; ++rank) {
      if (rank == victim) continue;
      const Outcome outcome = ops[size_t(rank)]->wait_for(90);
      REQUIRE(outcome.kind == OutcomeKind::kFault);
      check_lost(outcome.fault, victim);
      CHECK(std::string(outcome.fault.phase) == "heartbeat");
      CHECK(outcome.waited_phase == "dispatch/exchange");
    }
    CHECK(now_s() - begin < kHeartbeat + 5);
    CHECK(!ops[size_t(victim)]->is_finished());
    // It wakes up, sees that it was away, and learns what the others have decided.
    bed.group().engine(victim).proxy().set_frozen(false);
    const Outcome outcome = ops[size_t(victim)]->wait_for(90);
    CHECK(outcome.kind == OutcomeKind::kFault);
    check_lost(outcome.fault, victim);
    CHECK(outcome.fault.rank != victim);
    const double close_begin = now_s();
    bed.group().close();
    CHECK(now_s() - close_begin < 10);
  }
}

TEST_CASE("with several proxy threads all ranks of all nodes hear of a lost one") {
  FaultBedOptions options = with_heartbeat();
  options.num_proxy_threads = 2;
  options.node_of_rank = {0, 0, 1, 2, 3};
  for (const int victim : {1, 2}) {
    FaultBed bed(options);
    REQUIRE(bed.is_warm());
    bed.stall(victim, nullptr);
    bed.group().engine(victim).proxy().set_frozen(true);
    const Ops ops = bed.make(OpKind::kDispatch);
    bed.group().submit(ops);
    for (int rank = 0; rank < 5; ++rank) {
      if (rank == victim) continue;
      const Outcome outcome = ops[size_t(rank)]->wait_for(90);
      REQUIRE(outcome.kind == OutcomeKind::kFault);
      check_lost(outcome.fault, victim);
    }
    bed.group().engine(victim).proxy().set_frozen(false);
    CHECK(ops[size_t(victim)]->wait_for(90).kind == OutcomeKind::kFault);
    const double close_begin = now_s();
    bed.group().close();
    CHECK(now_s() - close_begin < 10);
  }
}

TEST_CASE("a rank that stops while nothing is under way is lost as well") {
  FaultBed bed(with_heartbeat());
  REQUIRE(bed.is_warm());
  bed.group().engine(3).proxy().set_frozen(true);
  for (int rank : {0, 1, 2}) {
    REQUIRE(wait_until([&] { return bed.group().engine(rank).has_fault(); }));
    check_lost(bed.group().engine(rank).fault(), 3);
    const double begin = now_s();
    auto op = barrier_op();
    bed.group().engine(rank).submit(op);
    CHECK(op->wait_for(90).kind == OutcomeKind::kFault);
    CHECK(now_s() - begin < 10);
  }
}

TEST_CASE("a rank that is destroyed in the middle of an operation is lost at once") {
  FaultBed bystander;
  for (const int victim : {0, 3}) {
    FaultBed bed;  // heartbeats would take kLong: the news must travel by itself
    REQUIRE(bed.is_warm());
    bed.stall(victim, "push");
    const Ops ops = bed.make(OpKind::kDispatch);
    const Ops after = bed.barriers();
    bed.group().submit(ops);
    bed.group().submit(after);
    // The others are in the data phase, writing into the memory of the victim.
    REQUIRE(wait_until([&] { return bed.is_reached(); }));
    const double begin = now_s();
    bed.group().destroy(victim);
    const std::vector<Outcome> outcomes = EngineGroup::wait(after);
    for (int rank = 0; rank < 4; ++rank) {
      if (rank == victim) continue;
      REQUIRE(outcomes[size_t(rank)].kind == OutcomeKind::kFault);
      check_lost(outcomes[size_t(rank)].fault, victim);
    }
    CHECK(now_s() - begin < 10);
    CHECK(ops[size_t(victim)]->wait_for(0).kind == OutcomeKind::kFault);
    const OutcomeKind queued = outcomes[size_t(victim)].kind;  // a moment decides which
    CHECK((queued == OutcomeKind::kRejected || queued == OutcomeKind::kFault));
    for (int rank = 0; rank < 4; ++rank) {
      if (rank == victim) continue;
      const Outcome outcome = bed.group().engine(rank).close();
      CHECK(outcome.kind == OutcomeKind::kDone);  // idempotent; the fault has been told already
    }
    CHECK(now_s() - begin < 20);
  }
  check_bystander(bystander);
}

TEST_CASE("closing when a peer has gone does not hang") {
  FaultBed bed;
  REQUIRE(bed.is_warm());
  bed.group().destroy(1);
  const double begin = now_s();
  for (int rank : {0, 2, 3}) bed.group().engine(rank).close();
  CHECK(now_s() - begin < 20);
  for (int rank : {0, 2, 3}) {
    CHECK(bed.group().engine(rank).has_fault());
    CHECK(bed.group().engine(rank).fault().peer == 1);
  }
}

TEST_CASE("a slow rank that beats is not lost") {
  FaultBed bed(with_heartbeat());
  REQUIRE(bed.is_warm());
  bed.stall(1, nullptr);
  const Ops ops = bed.make(OpKind::kDispatch);
  const double begin = now_s();
  bed.group().submit(ops);
  REQUIRE(wait_until([&] { return now_s() - begin > 3 * kHeartbeat; }));
  for (const auto& op : ops) CHECK(!op->is_finished());
  for (int rank = 0; rank < 4; ++rank) CHECK(!bed.group().engine(rank).has_fault());
  bed.go_on();
  CHECK(all_are(EngineGroup::wait(ops), OutcomeKind::kDone));
  CHECK(all_are(bed.group().run_ops(bed.make(OpKind::kCombine)), OutcomeKind::kDone));
  for (const Outcome& outcome : bed.group().close()) CHECK(outcome.kind == OutcomeKind::kDone);
}

TEST_CASE("uneven nodes: the news reaches ranks that the victim never talks to") {
  FaultBedOptions options = with_heartbeat();
  options.node_of_rank = {0, 0, 0, 1, 2, 2};
  FaultBed bed(options);
  REQUIRE(bed.is_warm());
  bed.group().engine(5).proxy().set_frozen(true);
  for (int rank = 0; rank < 5; ++rank) {
    REQUIRE(wait_until([&] { return bed.group().engine(rank).has_fault(); }));
    check_lost(bed.group().engine(rank).fault(), 5);
  }
}

TEST_CASE("destructors do not wait for queued operations, with and without helper threads") {
  for (const int num_threads : {1, 2, 3})
    for (const char* role : {static_cast<const char*>(nullptr), "push", "forward"}) {
      FaultBedOptions options;
      options.num_threads = num_threads;
      std::vector<Ops> queue;
      double begin = 0;
      {
        FaultBed bed(options);
        REQUIRE(bed.is_warm());
        for (int rank = 0; rank < 4; ++rank) bed.stall(rank, role);
        for (int i = 0; i < 4; ++i) {
          queue.push_back(bed.make(OpKind::kDispatch));
          bed.group().submit(queue.back());
        }
        begin = now_s();
      }
      CHECK(now_s() - begin < 20);
      for (const Ops& ops : queue)
        for (const auto& op : ops) {
          const OutcomeKind kind = op->wait_for(0).kind;
          CHECK((kind == OutcomeKind::kFault || kind == OutcomeKind::kRejected));
        }
    }
}

TEST_CASE("an idle engine with helper threads can be destroyed") {
  for (int repeat = 0; repeat < 20; ++repeat) {
    EngineConfig config = small_config({0, 0}, 2, 1, 16);
    config.num_threads = 3;
    EngineGroup group(config);
    if (repeat % 2 == 0) group.run_ops({barrier_op(), barrier_op()});
  }
}
