// What a dispatch leaves behind for combine and for later dispatches by handle.
#pragma once

#include <memory>
#include <vector>

#include "common/group.hpp"
#include "layout/record.hpp"
#include "memory/arena.hpp"

namespace commlib {

enum class Layout : uint32_t { kGrouped = 0, kRows = 1 };

// All ranks' counts of one dispatch, as the exchange delivered them.
struct RoutingCounts {
  int num_ranks = 0;
  int num_nodes = 0;
  int num_experts = 0;
  std::vector<uint32_t> per_expert;  // [source][expert]
  std::vector<uint32_t> per_rank;    // [source][rank] distinct tokens
  std::vector<uint32_t> per_node;    // [source][node] distinct tokens

  uint32_t expert(int source, int e) const { return per_expert[index(source, num_experts, e)]; }
  uint32_t rank(int source, int r) const { return per_rank[index(source, num_ranks, r)]; }
  uint32_t node(int source, int n) const { return per_node[index(source, num_nodes, n)]; }

  // Records that `rank` receives from sources below `source`.
  uint64_t record_base(int source, int rank_idx) const {
    uint64_t base = 0;
    for (int s = 0; s < source; ++s) base += rank(s, rank_idx);
    return base;
  }

 private:
  static size_t index(int row, int width, int column) {
    return size_t(row) * size_t(width) + size_t(column);
  }
};

struct HandleData {
  uint64_t epoch = 0;
  Layout layout = Layout::kGrouped;
  int num_topk = 0;
  size_t alignment = 1;
  int64_t num_tokens = 0;
  RoutingCounts counts;

  // As source: the records of the own tokens, and which of them go to each remote node.
  std::vector<uint8_t> own_records;
  std::vector<std::vector<uint32_t>> tokens_to_node;
  // As expert rank: received records in (source rank, token) order, where each source begins.
  std::shared_ptr<Slab> records;
  std::vector<uint64_t> record_base;  // [source + 1]
  std::vector<uint64_t> rows_per_expert;
  std::vector<uint64_t> expert_offset;  // [local expert + 1], aligned
  uint64_t num_rows = 0;
  // As rail: records of the tokens that in_sources sent to this node.
  std::vector<std::vector<uint8_t>> forward_records;

  uint64_t num_records() const { return record_base.back(); }
  const uint8_t* own_record(size_t token) const {
    return own_records.data() + token * record_bytes(num_topk);
  }
  const uint8_t* record(uint64_t index) const {
    return records->data() + index * record_bytes(num_topk);
  }
};

}  // namespace commlib
