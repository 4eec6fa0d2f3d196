// From topk_idx to counts (before the exchange) and from all counts to final rows (after it).
#pragma once

#include <string>

#include "cpu/op.hpp"

namespace commlib {

struct OwnCounts {
  std::vector<uint32_t> per_expert;
  std::vector<uint32_t> per_rank;
  std::vector<uint32_t> per_node;
  // [num_tokens] records with experts and weights. The caller's arrays are read once, here: what
  // the ranks agree about is what moves, whatever the caller does to the arrays meanwhile.
  std::vector<uint8_t> records;
};

// Counts the own tokens. Returns what is wrong with the input, or an empty string.
std::string count_tokens(const Group& group, const DispatchCall& call, int num_topk,
                         OwnCounts* counts);

// Fills everything of the handle that follows from the counts: rows in the records of the own
// tokens, lists, prefix sums. handle.own_records (from count_tokens), counts, epoch, layout,
// num_topk, alignment and num_tokens are set.
void build_plan(const Group& group, HandleData* handle);

// Rows and records that `rank` receives: the same on every rank that asks.
uint64_t count_rows(const Group& group, const RoutingCounts& counts, Layout layout,
                    size_t alignment, int rank);

struct LandingShape {
  size_t row_bytes = 0;
  size_t scales_bytes = 0;  // per row
  int num_topk = 0;
  Layout layout = Layout::kGrouped;
  size_t alignment = 1;
  bool is_fresh = true;  // false: by handle, rows and scales only
};

DispatchLanding dispatch_landing(const Group& group, const RoutingCounts& counts,
                                 const LandingShape& shape, int rank);

// Landing of partial rows during a combine: offset of (source, writer) in the grant of the rank
// that collects source's rows on the node of `collector`; total = offset past the end.
class CombineLanding {
 public:
  CombineLanding(const Group& group, const RoutingCounts& counts, size_t slot_bytes, int collector);
  size_t offset(int source, int writer) const {
    return offsets_[size_t(source) * num_ranks_ + size_t(writer)];
  }
  size_t total_bytes() const { return total_bytes_; }

 private:
  size_t num_ranks_;
  size_t total_bytes_ = 0;
  std::vector<size_t> offsets_;
};

}  // namespace commlib
