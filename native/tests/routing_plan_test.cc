// The plan: from topk_idx to counts, rows, and where things land.
#include "cpu/routing_plan.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <limits>
#include <map>
#include <random>
#include <set>
#include <tuple>

#include "tests/random_nodes.hpp"

using namespace commlib;
using namespace commlib::testing;

namespace {

struct Routing {
  std::vector<int> node_of_rank;
  int num_experts = 0;
  int num_topk = 0;
  std::vector<std::vector<int64_t>> topk_idx;  // [rank]
  std::vector<std::vector<float>> weights;
  std::vector<int64_t> num_tokens;

  int num_ranks() const { return int(node_of_rank.size()); }
  int per_rank() const { return num_experts / num_ranks(); }
  Group group(int rank) const { return Group(rank, node_of_rank, num_experts); }
  DispatchCall call(int rank, Layout layout, size_t alignment) const {
    DispatchCall call;
    call.topk_idx = topk_idx[size_t(rank)].data();
    call.topk_weights = weights[size_t(rank)].data();
    call.num_tokens = num_tokens[size_t(rank)];
    call.layout = layout;
    call.alignment = alignment;
    return call;
  }
};

Routing random_routing(std::mt19937& random) {
  Routing routing;
  routing.node_of_rank = random_nodes(random, 7);
  routing.num_experts = routing.num_ranks() * (int(random() % 3) + 1);
  routing.num_topk = int(random() % unsigned(routing.num_experts)) + 1;
  for (int rank = 0; rank < routing.num_ranks(); ++rank) {
    const int64_t tokens = random() % 4 == 0 ? 0 : int64_t(random() % 20);
    routing.num_tokens.push_back(tokens);
    routing.topk_idx.emplace_back();
    routing.weights.emplace_back();
    std::vector<int64_t> experts(static_cast<size_t>(routing.num_experts));
    for (int e = 0; e < routing.num_experts; ++e) experts[size_t(e)] = e;
    for (int64_t t = 0; t < tokens; ++t) {
      std::shuffle(experts.begin(), experts.end(), random);
      for (int k = 0; k < routing.num_topk; ++k) {
        routing.topk_idx.back().push_back(random() % 5 == 0 ? -1 : experts[size_t(k)]);
        routing.weights.back().push_back(float(random() % 1000) / 999);
      }
    }
  }
  return routing;
}

// The counts as the exchange gives them to every rank.
RoutingCounts all_counts(const Routing& routing) {
  RoutingCounts all;
  const Group group = routing.group(0);
  all.num_ranks = group.num_ranks();
  all.num_nodes = group.num_nodes();
  all.num_experts = group.num_experts();
  for (int rank = 0; rank < routing.num_ranks(); ++rank) {
    OwnCounts own;
    REQUIRE(count_tokens(routing.group(rank), routing.call(rank, Layout::kGrouped, 1),
                         routing.num_topk, &own) == "");
    all.per_expert.insert(all.per_expert.end(), own.per_expert.begin(), own.per_expert.end());
    all.per_rank.insert(all.per_rank.end(), own.per_rank.begin(), own.per_rank.end());
    all.per_node.insert(all.per_node.end(), own.per_node.begin(), own.per_node.end());
  }
  return all;
}

HandleData plan_of(const Routing& routing, const RoutingCounts& counts, int rank, Layout layout,
                   size_t alignment) {
  HandleData handle;
  handle.epoch = 7;
  handle.layout = layout;
  handle.num_topk = routing.num_topk;
  handle.alignment = alignment;
  handle.num_tokens = routing.num_tokens[size_t(rank)];
  handle.counts = counts;
  OwnCounts own;
  REQUIRE(count_tokens(routing.group(rank), routing.call(rank, layout, alignment), routing.num_topk,
                       &own) == "");
  handle.own_records = std::move(own.records);
  build_plan(routing.group(rank), &handle);
  return handle;
}

using RowKey = std::tuple<int, int64_t, int>;  // source, token, expert (-1 in the rows layout)

// Rows of `rank` by the definition: experts ascending, then (source, token) ascending; each expert
// ends at a multiple of the alignment. Rows layout: (source, token) ascending.
std::map<uint64_t, RowKey> expected_rows(const Routing& routing, int rank, Layout layout,
                                         size_t alignment, uint64_t* num_rows) {
  std::map<uint64_t, RowKey> rows;
  uint64_t next = 0;
  const int first = rank * routing.per_rank();
  const auto has_expert = [&](int s, int64_t t, int low, int high) {
    for (int k = 0; k < routing.num_topk; ++k) {
      const int64_t e = routing.topk_idx[size_t(s)][size_t(t * routing.num_topk + k)];
      if (e >= low && e < high) return true;
    }
    return false;
  };
  const bool is_rows = layout == Layout::kRows;
  for (int i = 0; i < (is_rows ? 1 : routing.per_rank()); ++i) {
    const int low = first + i;
    const int high = is_rows ? first + routing.per_rank() : low + 1;
    for (int s = 0; s < routing.num_ranks(); ++s)
      for (int64_t t = 0; t < routing.num_tokens[size_t(s)]; ++t)
        if (has_expert(s, t, low, high)) rows[next++] = {s, t, is_rows ? -1 : low};
    if (!is_rows) next = (next + alignment - 1) / alignment * alignment;
  }
  *num_rows = next;
  return rows;
}

void check_plan(const Routing& routing, Layout layout, size_t alignment) {
  const RoutingCounts counts = all_counts(routing);
  std::vector<std::map<uint64_t, RowKey>> planned(size_t(routing.num_ranks()));
  bool has_conflict = false;
  for (int source = 0; source < routing.num_ranks(); ++source) {
    const HandleData handle = plan_of(routing, counts, source, layout, alignment);
    for (int64_t t = 0; t < handle.num_tokens; ++t) {
      const uint8_t* record = handle.own_record(size_t(t));
      const auto* header = reinterpret_cast<const RecordHeader*>(record);
      CHECK(header->source_rank == source);
      CHECK(header->token == t);
      CHECK(header->num_topk == routing.num_topk);
      CHECK(header->epoch == 7);
      for (int k = 0; k < routing.num_topk; ++k) {
        const size_t at = size_t(t * routing.num_topk + k);
        const RecordEntry entry = record_entries(record)[k];
        const int64_t expert = routing.topk_idx[size_t(source)][at];
        REQUIRE(entry.expert == expert);
        if (expert < 0) {
          CHECK(entry.row == -1);
          continue;
        }
        CHECK(entry.weight == routing.weights[size_t(source)][at]);
        const RowKey key = {source, t, layout == Layout::kRows ? -1 : int(expert)};
        auto& rows = planned[size_t(expert / routing.per_rank())];
        const auto [slot, is_new] = rows.emplace(uint64_t(entry.row), key);
        has_conflict |= !is_new && (layout == Layout::kGrouped || slot->second != key);
      }
    }
  }
  CHECK(!has_conflict);
  for (int rank = 0; rank < routing.num_ranks(); ++rank) {
    uint64_t num_rows = 0;
    CHECK(planned[size_t(rank)] == expected_rows(routing, rank, layout, alignment, &num_rows));
    for (int asker = 0; asker < routing.num_ranks(); ++asker)
      CHECK(count_rows(routing.group(asker), counts, layout, alignment, rank) == num_rows);
    CHECK(plan_of(routing, counts, rank, layout, alignment).num_rows == num_rows);
  }
}

std::string error_of(std::vector<int64_t> topk_idx, std::vector<float> weights, int num_topk) {
  DispatchCall call;
  call.topk_idx = topk_idx.data();
  call.topk_weights = weights.empty() ? nullptr : weights.data();
  call.num_tokens = int64_t(topk_idx.size()) / num_topk;
  OwnCounts counts;
  return count_tokens(Group(1, {0, 0}, 8), call, num_topk, &counts);
}

}  // namespace

TEST_CASE("count_tokens: what is wrong, where, and the value") {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const float inf = std::numeric_limits<float>::infinity();
  CHECK(error_of({0, 1, 2, 3}, {}, 2) == "");
  CHECK(error_of({-1, -1, 7, 0}, {1, 1, 1, 1}, 2) == "");
  CHECK(error_of({0, 1, 2, 8}, {}, 2) ==
        "expert id 8 at token 1, slot 1 on rank 1 is not -1 or in 0..7");
  CHECK(error_of({-2, 1}, {}, 2).find("expert id -2 at token 0, slot 0") != std::string::npos);
  CHECK(error_of({1ll << 40, 1}, {}, 2).find("1099511627776") != std::string::npos);
  CHECK(error_of({0, 1, 5, 5}, {}, 2) == "expert 5 occurs twice at token 1, slot 1 on rank 1");
  CHECK(error_of({5, 1, 5, 2}, {}, 2) == "");  // in two tokens is no duplicate
  CHECK(error_of({0, 1, 2, 3}, {1, 1, nan, 1}, 2) ==
        "weight nan at token 1, slot 0 on rank 1 is not finite");
  CHECK(error_of({0, 1}, {1, -inf}, 2).find("weight -inf") != std::string::npos);
  CHECK(error_of({0, -1}, {1, nan}, 2) == "");  // nobody reads the weight of a masked slot
}

TEST_CASE("count_tokens: distinct tokens per rank and node") {
  std::mt19937 random(9);
  for (int round = 0; round < 60; ++round) {
    const Routing routing = random_routing(random);
    for (int rank = 0; rank < routing.num_ranks(); ++rank) {
      const Group group = routing.group(rank);
      OwnCounts counts;
      REQUIRE(count_tokens(group, routing.call(rank, Layout::kGrouped, 1), routing.num_topk,
                           &counts) == "");
      std::set<std::pair<int64_t, int>> ranks, nodes;
      std::vector<uint32_t> experts(size_t(routing.num_experts), 0);
      for (size_t i = 0; i < routing.topk_idx[size_t(rank)].size(); ++i) {
        const int64_t e = routing.topk_idx[size_t(rank)][i];
        if (e < 0) continue;
        const int64_t token = int64_t(i) / routing.num_topk;
        ++experts[size_t(e)];
        ranks.emplace(token, group.expert_rank(int(e)));
        nodes.emplace(token, group.node_of(group.expert_rank(int(e))));
      }
      CHECK(counts.per_expert == experts);
      for (int r = 0; r < group.num_ranks(); ++r)
        CHECK(counts.per_rank[size_t(r)] ==
              std::count_if(ranks.begin(), ranks.end(), [r](auto& p) { return p.second == r; }));
      for (int n = 0; n < group.num_nodes(); ++n)
        CHECK(counts.per_node[size_t(n)] ==
              std::count_if(nodes.begin(), nodes.end(), [n](auto& p) { return p.second == n; }));
    }
  }
}

TEST_CASE("plan: the sources' rows fill the expected positions of all ranks, each once") {
  std::mt19937 random(4);
  for (int round = 0; round < 60; ++round) {
    const Routing routing = random_routing(random);
    CAPTURE(round);
    for (size_t alignment : {1, 4, 16}) check_plan(routing, Layout::kGrouped, alignment);
    check_plan(routing, Layout::kRows, 1);
  }
}

TEST_CASE("plan: what goes to each node and what each rail keeps") {
  std::mt19937 random(8);
  for (int round = 0; round < 40; ++round) {
    const Routing routing = random_routing(random);
    const RoutingCounts counts = all_counts(routing);
    for (int rank = 0; rank < routing.num_ranks(); ++rank) {
      const Group group = routing.group(rank);
      const HandleData handle = plan_of(routing, counts, rank, Layout::kGrouped, 1);
      for (int node : group.remote_nodes(rank)) {
        const auto& tokens = handle.tokens_to_node[size_t(node)];
        CHECK(tokens.size() == counts.node(rank, node));
        CHECK(std::is_sorted(tokens.begin(), tokens.end()));
        CHECK(std::adjacent_find(tokens.begin(), tokens.end()) == tokens.end());
      }
      CHECK(handle.tokens_to_node[size_t(group.node())].empty());
      for (int s : group.in_sources(rank))
        CHECK(handle.forward_records[size_t(s)].size() ==
              counts.node(s, group.node()) * record_bytes(routing.num_topk));
      CHECK(handle.num_records() == counts.record_base(routing.num_ranks(), rank));
      CHECK(handle.expert_offset.size() == size_t(routing.per_rank()) + 1);
    }
  }
}

TEST_CASE("landing of a dispatch: parts in order, aligned, without overlap") {
  std::mt19937 random(6);
  for (int round = 0; round < 60; ++round) {
    const Routing routing = random_routing(random);
    const RoutingCounts counts = all_counts(routing);
    for (int rank = 0; rank < routing.num_ranks(); ++rank)
      for (const Layout layout : {Layout::kGrouped, Layout::kRows})
        for (const bool is_fresh : {true, false}) {
          const LandingShape shape = {40, 12, routing.num_topk, layout, 8, is_fresh};
          const DispatchLanding at = dispatch_landing(routing.group(0), counts, shape, rank);
          const size_t slots = at.num_records * size_t(routing.num_topk);
          const bool is_rows = layout == Layout::kRows;
          const size_t weights = !is_fresh ? 0 : (is_rows ? slots : at.num_rows) * 4;
          CHECK(at.rows_offset + at.num_rows * 40 <= at.scales_offset);
          if (is_fresh) {
            CHECK(at.scales_offset + at.num_rows * 12 <= at.weights_offset);
            CHECK(at.weights_offset + weights <= at.topk_idx_offset);
            CHECK(at.topk_idx_offset + (is_rows ? slots * 8 : 0) <= at.output_bytes);
            CHECK(at.records_offset + at.num_records * record_bytes(routing.num_topk) <=
                  at.total_bytes);
          } else {
            CHECK(at.scales_offset + at.num_rows * 12 <= at.output_bytes);
            CHECK(at.total_bytes == at.output_bytes);
          }
          CHECK(at.output_bytes <= at.records_offset);
          for (size_t offset : {at.rows_offset, at.scales_offset, at.weights_offset,
                                at.topk_idx_offset, at.records_offset, at.total_bytes})
            CHECK(offset % Heap::kAlignment == 0);
        }
  }
}

TEST_CASE("landing of a combine: streams never overlap and all have their place") {
  std::mt19937 random(10);
  constexpr size_t kSlotBytes = 48;
  for (int round = 0; round < 60; ++round) {
    const Routing routing = random_routing(random);
    const RoutingCounts counts = all_counts(routing);
    std::set<std::pair<int, int>> streams;  // (source, writer)
    for (int collector = 0; collector < routing.num_ranks(); ++collector) {
      const Group group = routing.group(collector);
      const CombineLanding landing(group, counts, kSlotBytes, collector);
      std::vector<std::pair<size_t, size_t>> ranges;
      std::vector<int> sources = group.in_sources(collector);
      sources.push_back(collector);
      for (int source : sources)
        for (int writer : group.peers()) {
          CHECK(streams.emplace(source, writer).second);
          const size_t bytes = counts.rank(source, writer) * kSlotBytes;
          if (bytes > 0) ranges.emplace_back(landing.offset(source, writer), bytes);
        }
      std::sort(ranges.begin(), ranges.end());
      size_t end = 0;
      for (const auto& [offset, bytes] : ranges) {
        CHECK(offset >= end);
        CHECK(offset % Heap::kAlignment == 0);
        end = offset + bytes;
      }
      CHECK(end <= landing.total_bytes());
      CHECK(landing.total_bytes() < end + Heap::kAlignment);
    }
    // Each (source, writer) stream has exactly one collector.
    CHECK(streams.size() == size_t(routing.num_ranks()) * size_t(routing.num_ranks()));
  }
}
