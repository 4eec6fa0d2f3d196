#include "cpu/routing_plan.hpp"

#include <cmath>

namespace commlib {
namespace {

std::string slot_text(int rank, int64_t token, int k) {
  return " at token " + std::to_string(token) + ", slot " + std::to_string(k) + " on rank " +
         std::to_string(rank);
}

// Marks who has been seen by the current token without clearing between tokens.
class Stamps {
 public:
  explicit Stamps(int size) : stamps_(size_t(size), -1) {}
  bool is_first(int index, int64_t token) {
    if (stamps_[size_t(index)] == token) return false;
    stamps_[size_t(index)] = token;
    return true;
  }

 private:
  std::vector<int64_t> stamps_;
};

}  // namespace

std::string count_tokens(const Group& group, const DispatchCall& call, int num_topk,
                         OwnCounts* counts) {
  counts->per_expert.assign(size_t(group.num_experts()), 0);
  counts->per_rank.assign(size_t(group.num_ranks()), 0);
  counts->per_node.assign(size_t(group.num_nodes()), 0);
  counts->records.assign(size_t(call.num_tokens) * record_bytes(num_topk), 0);
  Stamps experts(group.num_experts()), ranks(group.num_ranks()), nodes(group.num_nodes());
  for (int64_t t = 0; t < call.num_tokens; ++t) {
    uint8_t* record = counts->records.data() + size_t(t) * record_bytes(num_topk);
    RecordEntry* entries = record_entries(record);
    for (int k = 0; k < num_topk; ++k) {
      const int64_t expert = call.topk_idx[t * num_topk + k];
      entries[k] = {-1, -1, 0.0f};
      if (expert == -1) continue;
      if (expert < 0 || expert >= group.num_experts())
        return "expert id " + std::to_string(expert) + slot_text(group.rank(), t, k) +
               " is not -1 or in 0.." + std::to_string(group.num_experts() - 1);
      if (!experts.is_first(int(expert), t))
        return "expert " + std::to_string(expert) + " occurs twice" + slot_text(group.rank(), t, k);
      const float weight =
          call.topk_weights == nullptr ? 1.0f : call.topk_weights[t * num_topk + k];
      if (!std::isfinite(weight))
        return "weight " + std::to_string(weight) + slot_text(group.rank(), t, k) +
               " is not finite";
      entries[k] = {int32_t(expert), -1, weight};
      ++counts->per_expert[size_t(expert)];
      const int rank = group.expert_rank(int(expert));
      if (ranks.is_first(rank, t)) ++counts->per_rank[size_t(rank)];
      if (nodes.is_first(group.node_of(rank), t)) ++counts->per_node[size_t(group.node_of(rank))];
    }
  }
  return {};
}

namespace {

// First row of this rank's tokens for each expert, or for each rank in the rows layout.
std::vector<uint64_t> first_rows(const Group& group, const HandleData& handle) {
  const RoutingCounts& counts = handle.counts;
  std::vector<uint64_t> first;
  if (handle.layout == Layout::kRows) {
    for (int r = 0; r < group.num_ranks(); ++r)
      first.push_back(counts.record_base(group.rank(), r));
    return first;
  }
  uint64_t offset = 0;
  for (int e = 0; e < group.num_experts(); ++e) {
    if (e % group.experts_per_rank() == 0) offset = 0;
    uint64_t total = 0;
    uint64_t before = 0;
    for (int s = 0; s < group.num_ranks(); ++s) {
      if (s == group.rank()) before = total;
      total += counts.expert(s, e);
    }
    first.push_back(offset + before);
    offset = align_up(offset + total, handle.alignment);
  }
  return first;
}

void fill_own_rows(const Group& group, HandleData* handle) {
  const int num_topk = handle->num_topk;
  std::vector<uint64_t> next = first_rows(group, *handle);
  handle->tokens_to_node.assign(size_t(group.num_nodes()), {});
  Stamps ranks(group.num_ranks()), nodes(group.num_nodes());
  for (int64_t t = 0; t < handle->num_tokens; ++t) {
    uint8_t* record = handle->own_records.data() + size_t(t) * record_bytes(num_topk);
    *reinterpret_cast<RecordHeader*>(record) = {group.rank(), int32_t(t), num_topk,
                                                uint32_t(handle->epoch)};
    RecordEntry* entries = record_entries(record);
    for (int k = 0; k < num_topk; ++k) {
      const int expert = entries[k].expert;
      if (expert == -1) continue;
      const int rank = group.expert_rank(expert);
      const int node = group.node_of(rank);
      const bool is_first = ranks.is_first(rank, t);
      uint64_t row;
      if (handle->layout == Layout::kRows) {
        row = is_first ? next[size_t(rank)]++ : next[size_t(rank)] - 1;
      } else {
        row = next[size_t(expert)]++;
      }
      entries[k].row = int32_t(row);
      if (node != group.node() && nodes.is_first(node, t))
        handle->tokens_to_node[size_t(node)].push_back(uint32_t(t));
    }
  }
}

}  // namespace

void build_plan(const Group& group, HandleData* handle) {
  const RoutingCounts& counts = handle->counts;
  fill_own_rows(group, handle);
  handle->record_base.assign(1, 0);
  for (int s = 0; s < group.num_ranks(); ++s)
    handle->record_base.push_back(handle->record_base.back() + counts.rank(s, group.rank()));
  handle->rows_per_expert.clear();
  handle->expert_offset.assign(1, 0);
  for (int i = 0; i < group.experts_per_rank(); ++i) {
    const int e = group.rank() * group.experts_per_rank() + i;
    uint64_t total = 0;
    for (int s = 0; s < group.num_ranks(); ++s) total += counts.expert(s, e);
    handle->rows_per_expert.push_back(total);
    handle->expert_offset.push_back(
        align_up(handle->expert_offset.back() + total, handle->alignment));
  }
  handle->num_rows = count_rows(group, counts, handle->layout, handle->alignment, group.rank());
  handle->forward_records.assign(size_t(group.num_ranks()), {});
  for (int s : group.in_sources(group.rank()))
    handle->forward_records[size_t(s)].resize(size_t(counts.node(s, group.node())) *
                                              record_bytes(handle->num_topk));
}

uint64_t count_rows(const Group& group, const RoutingCounts& counts, Layout layout,
                    size_t alignment, int rank) {
  if (layout == Layout::kRows) return counts.record_base(group.num_ranks(), rank);
  uint64_t rows = 0;
  for (int i = 0; i < group.experts_per_rank(); ++i) {
    uint64_t total = 0;
    for (int s = 0; s < group.num_ranks(); ++s)
      total += counts.expert(s, rank * group.experts_per_rank() + i);
    rows = align_up(rows + total, alignment);
  }
  return rows;
}

DispatchLanding dispatch_landing(const Group& group, const RoutingCounts& counts,
                                 const LandingShape& shape, int rank) {
  DispatchLanding landing;
  landing.num_rows = count_rows(group, counts, shape.layout, shape.alignment, rank);
  landing.num_records = counts.record_base(group.num_ranks(), rank);
  size_t offset = 0;
  const auto take = [&offset](size_t bytes) {
    const size_t at = offset;
    offset = align_up(offset + bytes, Heap::kAlignment);
    return at;
  };
  landing.rows_offset = take(landing.num_rows * shape.row_bytes);
  landing.scales_offset = take(landing.num_rows * shape.scales_bytes);
  if (shape.is_fresh) {
    const size_t slots = landing.num_records * size_t(shape.num_topk);
    const bool is_rows = shape.layout == Layout::kRows;
    landing.weights_offset = take((is_rows ? slots : landing.num_rows) * sizeof(float));
    landing.topk_idx_offset = take(is_rows ? slots * sizeof(int64_t) : 0);
  }
  landing.output_bytes = offset;
  landing.records_offset = offset;
  if (shape.is_fresh) take(landing.num_records * record_bytes(shape.num_topk));
  landing.total_bytes = offset;
  return landing;
}

CombineLanding::CombineLanding(const Group& group, const RoutingCounts& counts, size_t slot_bytes,
                               int collector)
    : num_ranks_(size_t(group.num_ranks())), offsets_(num_ranks_ * num_ranks_, 0) {
  std::vector<int> sources = group.in_sources(collector);
  sources.insert(sources.begin(), collector);
  for (int source : sources) {
    for (int writer : group.ranks_of_node(group.node_of(collector))) {
      offsets_[size_t(source) * num_ranks_ + size_t(writer)] = total_bytes_;
      total_bytes_ =
          align_up(total_bytes_ + counts.rank(source, writer) * slot_bytes, Heap::kAlignment);
    }
  }
}

}  // namespace commlib
