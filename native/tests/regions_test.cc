// The region tables: nothing overlaps, both ends agree, sizes follow from the partners alone.
#include "memory/regions.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <random>
#include <string>
#include <vector>

#include "channel/command.hpp"
#include "tests/random_nodes.hpp"

using namespace commlib;
using namespace commlib::testing;

namespace {

constexpr size_t kPage = 4096;

struct Range {
  size_t begin;
  size_t bytes;
  std::string name;
};

void check_disjoint(std::vector<Range> ranges, size_t total_bytes, size_t alignment) {
  std::sort(ranges.begin(), ranges.end(),
            [](const Range& a, const Range& b) { return a.begin < b.begin; });
  for (size_t i = 0; i < ranges.size(); ++i) {
    CHECK(ranges[i].begin % alignment == 0);
    const size_t end = i + 1 < ranges.size() ? ranges[i + 1].begin : total_bytes;
    CHECK_MESSAGE(ranges[i].begin + ranges[i].bytes <= end,
                  ranges[i].name << " runs into "
                                 << (i + 1 < ranges.size() ? ranges[i + 1].name : "the end"));
  }
}

std::vector<Range> control_ranges(const Group& group, const ControlRegion& c, size_t row_bytes) {
  std::vector<Range> ranges = {{c.heartbeat, 8, "heartbeat"}};
  for (int r = 0; r < group.num_ranks(); ++r) {
    ranges.push_back({c.fault_count_of(r), kLine, "fault_count"});
    ranges.push_back({c.fault_record_of(r), sizeof(FaultRecord), "fault_record"});
    ranges.push_back({c.exchange_epoch_of(r), kLine, "exchange_epoch"});
    for (uint64_t epoch : {4, 5})
      ranges.push_back({c.exchange_row_of(epoch, r), row_bytes, "exchange_row"});
    ranges.push_back({c.dispatch_arrived_of(r), kLine, "dispatch_arrived"});
    for (int local = 0; local < group.max_local_ranks(); ++local)
      ranges.push_back({c.combine_arrived_of(r, local), kLine, "combine_arrived"});
  }
  return ranges;
}

std::vector<Range> registered_ranges(const Group& group, int rank, const RegisteredRegion& g,
                                     const MemoryConfig& config) {
  const auto line = [](size_t base, int i) { return RegisteredRegion::line(base, i); };
  std::vector<Range> ranges = {{g.heartbeat_out, 8, "heartbeat_out"},
                               {g.fault_record_out, sizeof(FaultRecord), "fault_record_out"}};
  for (uint64_t epoch : {4, 5})
    ranges.push_back({g.exchange_row_out_of(epoch), config.exchange_row_bytes, "row_out"});
  for (int r = 0; r < group.num_ranks(); ++r) {
    ranges.push_back({line(g.heartbeat_in, r), kLine, "heartbeat_in"});
    ranges.push_back({line(g.fault_count_in, r), kLine, "fault_count_in"});
    ranges.push_back({g.fault_record_in_of(r), sizeof(FaultRecord), "fault_record_in"});
    ranges.push_back({line(g.exchange_count_in, r), kLine, "exchange_count_in"});
    ranges.push_back({line(g.dispatch_count_in, r), kLine, "dispatch_count_in"});
    ranges.push_back({line(g.combine_credit_in, r), kLine, "combine_credit_in"});
    ranges.push_back({line(g.first_put_in, r), kLine, "first_put_in"});
    for (uint64_t epoch : {4, 5})
      ranges.push_back({g.exchange_row_in_of(epoch, r), config.exchange_row_bytes, "row_in"});
  }
  for (int n = 0; n < group.num_nodes(); ++n) {
    ranges.push_back({line(g.dispatch_credit_in, n), kLine, "dispatch_credit_in"});
    ranges.push_back({line(g.combine_count_in, n), kLine, "combine_count_in"});
  }
  for (int source : group.in_sources(rank)) {
    ranges.push_back({g.dispatch_recv_ring_of(source), config.ring_bytes, "dispatch_recv_ring"});
    ranges.push_back({g.combine_send_ring_of(source), config.ring_bytes, "combine_send_ring"});
  }
  for (int node : group.remote_nodes(rank)) {
    ranges.push_back({g.dispatch_send_ring_of(node), config.ring_bytes, "dispatch_send_ring"});
    ranges.push_back({g.combine_recv_ring_of(node), config.ring_bytes, "combine_recv_ring"});
  }
  return ranges;
}

}  // namespace

TEST_CASE("regions never overlap") {
  std::mt19937 random(17);
  for (int round = 0; round < 40; ++round) {
    const std::vector<int> nodes = random_nodes(random, 9);
    const int ranks = int(nodes.size());
    const MemoryConfig config{(random() % 20 + 1) * kLine, (random() % 50 + 1) * 1000};
    for (int rank = 0; rank < ranks; ++rank) {
      const Group group(rank, nodes, ranks);
      const ControlRegion control(group, config);
      check_disjoint(control_ranges(group, control, config.exchange_row_bytes), control.total_bytes,
                     8);
      const RegisteredRegion own(group, rank, config);
      check_disjoint(registered_ranges(group, rank, own, config), own.total_bytes, 8);
      CHECK(own.total_bytes % kPage == 0);
      CHECK(own.control_bytes % kPage == 0);
      CHECK(own.control_bytes + own.ring_memory_bytes() == own.total_bytes);
      // Rings lie behind the border, words and rows before it.
      for (const Range& range : registered_ranges(group, rank, own, config)) {
        const bool is_ring = range.name.ends_with("_ring");
        CHECK_MESSAGE((range.begin >= own.control_bytes) == is_ring, range.name);
        if (!is_ring) CHECK(range.begin + range.bytes <= own.control_bytes);
      }
      CHECK(control.total_bytes % kPage == 0);
      // Puts are addressed in units.
      for (int source : group.in_sources(rank)) {
        CHECK(own.dispatch_recv_ring_of(source) % kCommandUnit == 0);
        CHECK(own.combine_send_ring_of(source) % kCommandUnit == 0);
      }
      // A peer that works out our offsets finds the same ones.
      const Group other((rank + 1) % ranks, nodes, ranks);
      const RegisteredRegion seen(other, rank, config);
      CHECK(seen.total_bytes == own.total_bytes);
      for (int source : group.in_sources(rank))
        CHECK(seen.dispatch_recv_ring_of(source) == own.dispatch_recv_ring_of(source));
      for (int node : group.remote_nodes(rank))
        CHECK(seen.combine_recv_ring_of(node) == own.combine_recv_ring_of(node));
    }
  }
}

TEST_CASE("the registered region is four rings per partner and some lines") {
  for (const std::vector<int>& nodes :
       std::vector<std::vector<int>>{{0, 0, 1, 1}, {0, 1, 2, 3}, {0, 0, 0, 1}, {0, 0}}) {
    const int ranks = int(nodes.size());
    for (int rank = 0; rank < ranks; ++rank) {
      const Group group(rank, nodes, ranks);
      const size_t rings = 2 * group.in_sources(rank).size() + 2 * group.remote_nodes(rank).size();
      const size_t small = RegisteredRegion(group, rank, {256, 1 << 20}).total_bytes;
      const size_t large = RegisteredRegion(group, rank, {256, 4 << 20}).total_bytes;
      CHECK(large - small == rings * (3 << 20));
      CHECK(small - rings * (1 << 20) < 16 * kPage);
    }
  }
}
