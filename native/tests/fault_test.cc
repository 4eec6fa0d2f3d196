// Roles that stand still, one by one: who notices, what the record says, and what comes after.
#include <doctest/doctest.h>

#include <future>

#include "tests/fault_bed.hpp"
#include "tests/wait_until.hpp"

using namespace commlib;
using namespace commlib::testing;

namespace {

struct Case {
  OpKind op;
  const char* role;  // which `victim` does not step
  int victim;
  int observer;  // the one with the short deadline
  // What its record must say. peer -1: left open (a role that never steps knows nothing).
  int peer;
  int channel;
  const char* phase;
};

constexpr OpKind kDispatch = OpKind::kDispatch;
constexpr OpKind kCombine = OpKind::kCombine;

// Nodes {0, 1} and {2, 3}. Rails: 0 and 2 for each other, 1 and 3 for each other.
const Case kCases[] = {
    // A neighbour; a remote rank; a rank that also misses what the victim should relay; the victim.
    {kDispatch, "exchange", 1, 0, 1, 1, "dispatch/exchange"},
    {kDispatch, "exchange", 1, 3, 1, 1, "dispatch/exchange"},
    {kDispatch, "exchange", 3, 2, 3, 3, "dispatch/exchange"},
    {kCombine, "exchange", 2, 2, 2, 2, "combine/exchange"},
    {kDispatch, "push", 1, 0, 1, 1, "dispatch/expand"},
    {kDispatch, "push", 1, 1, 1, 1, "dispatch/expand"},
    // Its rail; a rank behind that rail; the victim.
    {kDispatch, "scale_out_send", 1, 3, 1, 1, "dispatch/forward"},
    {kDispatch, "scale_out_send", 1, 2, 3, 1, "dispatch/expand"},
    {kDispatch, "scale_out_send", 1, 1, 3, 1, "dispatch/scale_out_send"},
    // The source, whose ring stays full; a rank behind the rail; the victim.
    {kDispatch, "forward", 3, 1, 3, 1, "dispatch/scale_out_send"},
    {kDispatch, "forward", 3, 2, 3, 1, "dispatch/expand"},
    {kDispatch, "forward", 3, 3, 1, 1, "dispatch/forward"},
    // Nobody waits for these two within the operation.
    {kDispatch, "expand", 1, 0, 1, 1, "barrier/exchange"},
    {kDispatch, "expand", 1, 1, -1, 0, "dispatch/expand"},
    {kDispatch, "zero_padding", 1, 2, 1, 1, "barrier/exchange"},
    {kDispatch, "zero_padding", 1, 1, 1, -1, "dispatch/zero_padding"},
    // The other rail of its node; those that send to sources which consume nothing; the victim.
    {kCombine, "reduce", 1, 0, 1, 2, "combine/forward_reduce"},
    {kCombine, "reduce", 1, 3, 1, 1, "combine/forward_reduce"},
    {kCombine, "reduce", 1, 2, 0, 0, "combine/forward_reduce"},
    {kCombine, "reduce", 1, 1, 1, 3, "combine/forward_reduce"},
    // The source it sends to; the victim.
    {kCombine, "forward_reduce", 3, 1, 3, 1, "combine/final_reduce"},
    {kCombine, "forward_reduce", 3, 3, -1, 1, "combine/forward_reduce"},
    // The rail, whose ring stays full; a rank that goes on to the next operation.
    {kCombine, "final_reduce", 1, 3, 1, 1, "combine/forward_reduce"},
    {kCombine, "final_reduce", 1, 0, 1, 1, "barrier/exchange"},
    {kCombine, "final_reduce", 1, 1, -1, 1, "combine/final_reduce"},
};

// Every rank's first operation that failed; the operations before it are complete.
std::vector<Outcome> first_faults(const Ops& ops, const Ops& after) {
  std::vector<Outcome> outcomes = EngineGroup::wait(ops);
  const std::vector<Outcome> later = EngineGroup::wait(after);
  for (size_t rank = 0; rank < outcomes.size(); ++rank)
    if (outcomes[rank].kind == OutcomeKind::kDone) outcomes[rank] = later[rank];
  return outcomes;
}

// The fault stays, whatever is called next, and does not hold anybody up.
void check_terminal(FaultBed& bed) {
  EngineGroup& group = bed.group();
  std::vector<FaultRecord> faults;
  for (int rank = 0; rank < group.size(); ++rank) {
    CHECK(group.engine(rank).has_fault());
    faults.push_back(group.engine(rank).fault());
  }
  const double begin = now_s();
  for (const OpKind kind : {kDispatch, kCombine}) {
    const std::vector<Outcome> outcomes = group.run_ops(bed.make(kind));
    for (size_t rank = 0; rank < outcomes.size(); ++rank) {
      CHECK(outcomes[rank].kind == OutcomeKind::kFault);
      CHECK(is_same_fault(outcomes[rank].fault, faults[rank]));
    }
  }
  group.close();
  CHECK(now_s() - begin < 10);  // kLong would be a wait for the peers
}

void run_case(const Case& c, int num_threads) {
  CAPTURE(c.role);
  CAPTURE(c.victim);
  CAPTURE(c.observer);
  FaultBedOptions options;
  options.num_threads = num_threads;
  options.impatient = c.observer;
  FaultBed bed(options);
  REQUIRE(bed.is_warm());
  bed.stall(c.victim, c.role);
  const Ops ops = bed.make(c.op);
  const Ops after = bed.barriers();
  const double begin = now_s();
  bed.group().submit(ops);
  bed.group().submit(after);
  const std::vector<Outcome> outcomes = first_faults(ops, after);
  CHECK(now_s() - begin >= kTimeout);
  for (int rank = 0; rank < 4; ++rank) {
    const Outcome& outcome = outcomes[size_t(rank)];
    CAPTURE(rank);
    REQUIRE(outcome.kind == OutcomeKind::kFault);
    const FaultRecord& record = outcome.fault;
    const std::string text = describe(record);
    CAPTURE(text);
    CHECK(record.kind == FaultKind::kTimeout);
    CHECK(record.rank == c.observer);
    if (c.peer >= 0) CHECK(record.peer == c.peer);
    if (num_threads == 1) {  // more threads watch over different roles
      CHECK(record.channel == c.channel);
      CHECK(std::string(record.phase) == c.phase);
    }
    CHECK(record.tag >= 3);
    CHECK(std::string(record.detail).find("no progress for") == 0);
    CHECK(is_same_fault(record, outcomes[0].fault));  // one record, known to all
    CHECK(!outcome.waited_phase.empty());
  }
  check_terminal(bed);
}

}  // namespace

TEST_CASE("every role that can stand still is noticed and named on every rank") {
  // Three at a time: they mostly wait, and Runtimes of one process have nothing to do with each
  // other.
  std::atomic<size_t> next{0};
  std::vector<std::future<void>> lanes;
  for (int lane = 0; lane < 3; ++lane)
    lanes.push_back(std::async(std::launch::async, [&next] {
      for (size_t i = next++; i < std::size(kCases); i = next++) run_case(kCases[i], 1);
    }));
  for (auto& lane : lanes) lane.get();
}

TEST_CASE("with helper threads") {
  for (const Case& c :
       {Case{kDispatch, "push", 1, 0, 1, 1, ""}, Case{kDispatch, "forward", 3, 2, 3, 1, ""},
        Case{kCombine, "reduce", 1, 0, 1, 2, ""}})
    run_case(c, 2);
}

TEST_CASE("equal deadlines: whoever is first, all fail and somebody names the victim") {
  FaultBedOptions options;
  options.timeout_s = kTimeout;
  for (const OpKind kind : {kDispatch, kCombine}) {
    constexpr int kVictim = 1;
    FaultBed bed(options);
    REQUIRE(bed.is_warm());
    bed.stall(kVictim, kind == kDispatch ? "push" : "reduce");
    const Ops ops = bed.make(kind);
    const Ops after = bed.barriers();
    bed.group().submit(ops);
    bed.group().submit(after);
    bool is_named = false;
    for (const Outcome& outcome : first_faults(ops, after)) {
      REQUIRE(outcome.kind == OutcomeKind::kFault);
      CHECK(outcome.fault.kind == FaultKind::kTimeout);
      is_named |= outcome.fault.peer == kVictim || outcome.waited_peer == kVictim;
    }
    CHECK(is_named);
    check_terminal(bed);
  }
}

TEST_CASE("a rank that never calls is a timeout that names it") {
  FaultBedOptions options;
  options.impatient = 3;
  FaultBed bed(options);
  REQUIRE(bed.is_warm());
  Ops ops = bed.barriers();
  for (int rank : {0, 2, 3}) bed.group().engine(rank).submit(ops[size_t(rank)]);
  for (int rank : {0, 2, 3}) {
    const Outcome outcome = ops[size_t(rank)]->wait_for(90);
    CHECK(outcome.kind == OutcomeKind::kFault);
    CHECK(outcome.fault.rank == 3);
    CHECK(outcome.fault.peer == 1);
    CHECK(std::string(outcome.fault.phase) == "barrier/exchange");
  }
  // The absent rank finds out by itself.
  REQUIRE(wait_until([&] { return bed.group().engine(1).has_fault(); }));
  bed.group().engine(1).submit(ops[1]);
  const Outcome late = ops[1]->wait_for(90);
  CHECK(late.kind == OutcomeKind::kFault);
  CHECK(is_same_fault(late.fault, ops[0]->wait_for(0).fault));
  check_terminal(bed);
}
