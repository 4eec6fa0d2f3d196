// Records, slots, groups and rails.
#include <doctest/doctest.h>

#include <algorithm>
#include <random>
#include <set>
#include <string>

#include "common/group.hpp"
#include "layout/slot.hpp"
#include "tests/random_nodes.hpp"

using namespace commlib;
using namespace commlib::testing;

TEST_CASE("slots: parts in order, aligned, without overlap") {
  for (size_t row_bytes = 1; row_bytes < 70; ++row_bytes)
    for (size_t scales : {0, 4, 12})
      for (size_t tail : {size_t(0), record_bytes(1), record_bytes(8), size_t(20)}) {
        const SlotLayout slot = make_slot(row_bytes, scales, tail);
        CHECK(slot.scales_offset >= row_bytes);
        CHECK(slot.scales_offset % 4 == 0);
        CHECK(slot.tail_offset == slot.scales_offset + scales);
        CHECK(slot.tail_offset % alignof(RecordHeader) == 0);
        CHECK(slot.slot_bytes >= slot.tail_offset + tail);
        CHECK(slot.slot_bytes < slot.tail_offset + tail + 16);
        CHECK(slot.slot_bytes % 16 == 0);
      }
}

TEST_CASE("records: entries follow the header") {
  CHECK(record_bytes(1) == 28);
  CHECK(record_bytes(8) == 112);
  std::vector<uint8_t> record(record_bytes(3));
  CHECK(reinterpret_cast<uint8_t*>(record_entries(record.data()) + 3) ==
        record.data() + record.size());
}

TEST_CASE("group: one rail per source and node, in_sources is its inverse") {
  std::mt19937 random(2);
  for (int round = 0; round < 200; ++round) {
    const std::vector<int> nodes = random_nodes(random, 12);
    const int ranks = int(nodes.size());
    const Group group(0, nodes, ranks);
    std::set<std::pair<int, int>> from_sources;
    for (int r = 0; r < ranks; ++r) {
      const std::vector<int> sources = group.in_sources(r);
      CHECK(std::is_sorted(sources.begin(), sources.end()));
      for (int s : sources) {
        CHECK(group.node_of(s) != group.node_of(r));
        // Every (source, node) turns up once, at its rail.
        CHECK(from_sources.emplace(s, group.node_of(r)).second);
        CHECK(group.rail(s, group.node_of(r)) == r);
      }
    }
    CHECK(from_sources.size() == size_t(ranks) * size_t(group.num_nodes() - 1));
    for (int s = 0; s < ranks; ++s) {
      for (int n = 0; n < group.num_nodes(); ++n) CHECK(group.node_of(group.rail(s, n)) == n);
      CHECK(group.rail(s, group.node_of(s)) == s);
      for (int r = 0; r < ranks; ++r) {
        const int writer = group.writer(s, r);
        CHECK(group.node_of(writer) == group.node_of(r));
        if (group.node_of(s) == group.node_of(r)) CHECK(writer == s);
        // Heartbeats go both ways.
        const auto peers = group.scale_out_peers(s);
        const auto back = group.scale_out_peers(r);
        CHECK(std::count(peers.begin(), peers.end(), r) == std::count(back.begin(), back.end(), s));
      }
    }
  }
}

TEST_CASE("group: what cannot be is refused, with the values") {
  const auto message = [](int rank, std::vector<int> nodes, int experts) -> std::string {
    try {
      Group group(rank, std::move(nodes), experts);
      return "";
    } catch (const ConfigException& error) {
      return error.what();
    }
  };
  CHECK(message(0, {0, 0, 1}, 6) == "");
  CHECK(message(3, {0, 0, 1}, 6).find("rank=3") != std::string::npos);
  CHECK(message(-1, {0}, 1).find("rank=-1") != std::string::npos);
  CHECK(message(0, {}, 4) != "");
  CHECK(message(0, {0, 0, 1}, 7) == "num_experts=7 is not divisible by num_ranks=3");
  CHECK(message(0, {0, 0}, 0) != "");
  CHECK(message(0, {1, 0}, 2).find("rank 0 has node 1") != std::string::npos);
  CHECK(message(0, {0, 2}, 2).find("rank 1 has node 2") != std::string::npos);
  CHECK(message(0, std::vector<int>(65, 0), 65).find("65 ranks") != std::string::npos);
  CHECK(message(0, std::vector<int>(64, 0), 64) == "");
}
