#include "cpu/combine_roles.hpp"

#include <algorithm>
#include <bit>
#include <cstring>

#include "channel/counter.hpp"

namespace commlib {
namespace {

class Reduce : public Role {
 public:
  Reduce(const CombineContext& context, int source)
      : Role("reduce"),
        context_(context),
        group_(context.group()),
        num_records_(context.handle->counts.rank(source, group_.rank())),
        base_(context.handle->record_base[size_t(source)]) {
    const int collector = group_.is_local(source) ? source : group_.rail(source, group_.node());
    slots_ = context.landing_slots(collector, source, group_.rank());
    arrived_ = context.mesh->arena_word(
        collector,
        context.mesh->control().combine_arrived_of(source, group_.local_rank_of(group_.rank())));
  }

  bool step() override {
    const uint64_t end = std::min(num_records_, done_ + uint64_t(context_.chunk_tokens));
    if (done_ == end) return false;
    for (; done_ < end; ++done_) reduce(done_);
    // Partner: the acquire loads in Arrivals. Publishes partial rows and weight gradients.
    store_release(arrived_, make_ticket(context_.epoch, done_));
    return true;
  }
  bool is_done() const override { return done_ == num_records_; }
  Wait waits_for() const override { return {}; }

 private:
  void reduce(uint64_t index) {
    const HandleData& handle = *context_.handle;
    const RecordEntry* entries = record_entries(handle.record(base_ + index));
    // Local experts in ascending order: the order of summation.
    RecordEntry here[kMaxTopk];
    int count = 0;
    for (int k = 0; k < handle.num_topk; ++k) {
      if (entries[k].expert < 0 || group_.expert_rank(entries[k].expert) != group_.rank()) continue;
      int at = count++;
      for (; at > 0 && here[at - 1].expert > entries[k].expert; --at) here[at] = here[at - 1];
      here[at] = entries[k];
    }
    if (handle.layout == Layout::kRows) count = 1;  // the caller has reduced the row already
    const void* rows[kMaxTopk];
    float weights[kMaxTopk];
    for (int i = 0; i < count; ++i) {
      rows[i] = static_cast<const uint8_t*>(context_.call.y) +
                size_t(here[i].row) * context_.slot.row_bytes;
      if (context_.call.row_weights != nullptr) weights[i] = context_.call.row_weights[here[i].row];
    }
    uint8_t* slot = slots_ + index * context_.slot.slot_bytes;
    const bool has_weights = context_.call.row_weights != nullptr;
    if (count == 1 && !has_weights) {
      std::memcpy(slot, rows[0], context_.slot.row_bytes);
    } else {
      row_kernels().reduce({slot, rows, has_weights ? weights : nullptr, &count, 1, context_.hidden,
                            context_.call.dtype});
    }
    if (context_.has_weight_grads()) write_weight_grads(slot, entries);
    ++counters_.rows;
    counters_.bytes_read += uint64_t(count) * context_.slot.row_bytes;
    counters_.bytes_written += context_.slot.row_bytes;
  }

  void write_weight_grads(uint8_t* slot, const RecordEntry* entries) const {
    const HandleData& handle = *context_.handle;
    float* grads = reinterpret_cast<float*>(slot + context_.slot.tail_offset);
    for (int k = 0; k < handle.num_topk; ++k) {
      const bool is_here =
          entries[k].expert >= 0 && group_.expert_rank(entries[k].expert) == group_.rank();
      const size_t row = is_here ? size_t(entries[k].row) : 0;
      const size_t at =
          handle.layout == Layout::kRows ? row * size_t(handle.num_topk) + size_t(k) : row;
      grads[k] = is_here ? context_.call.weight_grads[at] : 0.0f;
    }
  }

  const CombineContext& context_;
  const Group& group_;
  uint64_t num_records_;
  uint64_t base_;
  uint8_t* slots_;
  uint64_t* arrived_;
  uint64_t done_ = 0;
};

// The partial rows of one source in the own landing: one stream per rank of the node.
class Arrivals {
 public:
  Arrivals(const CombineContext& context, int source) : context_(context), source_(source) {
    const Group& group = context.group();
    for (int writer : group.peers()) {
      streams_.push_back(
          {context.landing_slots(group.rank(), source, writer),
           context.mesh->arena_word(group.rank(), context.mesh->control().combine_arrived_of(
                                                      source, group.local_rank_of(writer))),
           context.handle->counts.rank(source, writer)});
    }
  }
  // Next slot of the writer with this local rank; nullptr if it has not arrived.
  const uint8_t* peek(int local) {
    Stream& stream = streams_[size_t(local)];
    if (stream.next >= stream.arrived) {
      // Partner: the release in Reduce::step at the writer.
      stream.arrived = arrived_in(load_acquire(stream.word), context_.epoch, stream.expected);
      if (stream.next >= stream.arrived) {
        blocked_ = local;
        return nullptr;
      }
    }
    return stream.slots + stream.next * context_.slot.slot_bytes;
  }
  void advance(int local) { ++streams_[size_t(local)].next; }
  Wait waits_for() const {
    const Stream& stream = streams_[size_t(blocked_)];
    return {context_.group().peers()[size_t(blocked_)], source_, stream.expected, stream.next};
  }

 private:
  struct Stream {
    const uint8_t* slots;
    const uint64_t* word;
    uint64_t expected;
    uint64_t next = 0;
    uint64_t arrived = 0;
  };
  const CombineContext& context_;
  int source_;
  int blocked_ = 0;
  std::vector<Stream> streams_;
};

// Local ranks (bit mask) of `node` that hold experts of the token.
uint64_t ranks_wanted(const Group& group, const RecordEntry* entries, int num_topk, int node) {
  uint64_t mask = 0;
  for (int k = 0; k < num_topk; ++k) {
    if (entries[k].expert < 0) continue;
    const int rank = group.expert_rank(entries[k].expert);
    if (group.node_of(rank) == node) mask |= 1ull << group.local_rank_of(rank);
  }
  return mask;
}

class ForwardReduce : public Role {
 public:
  ForwardReduce(const CombineContext& context, int source, CommandWriter& writer)
      : Role("forward_reduce", Urgency::kUrgent),
        context_(context),
        group_(context.group()),
        source_(source),
        num_slots_(context.handle->counts.node(source, group_.node())),
        arrivals_(context, source),
        ring_(context.ring(num_slots_), num_slots_, place(context, source), *context.proxy,
              writer) {}

  bool step() override {
    bool has_moved = ring_.flush();
    for (int i = 0; i < context_.chunk_tokens && !ring_.is_done(); ++i) {
      if (!reduce_next()) break;
      has_moved = true;
    }
    return has_moved;
  }
  bool is_done() const override { return ring_.is_done(); }
  Wait waits_for() const override {
    if (is_ring_full_) return {source_, source_, ring_.total(), ring_.credits()};
    return arrivals_.waits_for();
  }

 private:
  bool reduce_next() {
    const int num_topk = context_.handle->num_topk;
    const RecordEntry* entries =
        record_entries(context_.handle->forward_records[size_t(source_)].data() +
                       ring_.written() * record_bytes(num_topk));
    uint8_t* slot = ring_.next_slot();
    is_ring_full_ = slot == nullptr;
    if (is_ring_full_) return false;
    const uint64_t mask = ranks_wanted(group_, entries, num_topk, group_.node());
    const void* rows[kMaxTopk];
    int locals[kMaxTopk];
    int count = 0;
    for (uint64_t rest = mask; rest != 0; rest &= rest - 1) {
      const int local = std::countr_zero(rest);
      const uint8_t* row = arrivals_.peek(local);
      if (row == nullptr) return false;
      rows[count] = row;
      locals[count++] = local;
    }
    if (count == 1)
      std::memcpy(slot, rows[0], context_.slot.row_bytes);
    else
      row_kernels().reduce({slot, rows, nullptr, &count, 1, context_.hidden, context_.call.dtype});
    if (context_.has_weight_grads()) merge_weight_grads(slot, entries, rows, locals, count);
    for (int i = 0; i < count; ++i) arrivals_.advance(locals[i]);
    ring_.commit();
    ++counters_.rows;
    counters_.bytes_read += uint64_t(count) * context_.slot.row_bytes;
    counters_.bytes_written += context_.slot.row_bytes;
    return true;
  }

  void merge_weight_grads(uint8_t* slot, const RecordEntry* entries, const void* const* rows,
                          const int* locals, int count) const {
    float* out = reinterpret_cast<float*>(slot + context_.slot.tail_offset);
    for (int k = 0; k < context_.handle->num_topk; ++k) {
      out[k] = 0.0f;
      if (entries[k].expert < 0) continue;
      const int rank = group_.expert_rank(entries[k].expert);
      if (!group_.is_local(rank)) continue;
      for (int i = 0; i < count; ++i)
        if (locals[i] == group_.local_rank_of(rank))
          out[k] = reinterpret_cast<const float*>(static_cast<const uint8_t*>(rows[i]) +
                                                  context_.slot.tail_offset)[k];
    }
  }

  static SendRing::Place place(const CombineContext& context, int source) {
    const Mesh& mesh = *context.mesh;
    const size_t local = mesh.registered().combine_send_ring_of(source);
    return {
        mesh.ring(local),
        local,
        mesh.registered_of(source).combine_recv_ring_of(mesh.group().node()),
        mesh.registered_word(RegisteredRegion::line(mesh.registered().combine_credit_in, source)),
        context.proxy->channels().to_source(ChannelPurpose::kCombineData, source),
        &context.totals->combine_sent[size_t(source)]};
  }

  const CombineContext& context_;
  const Group& group_;
  int source_;
  uint64_t num_slots_;
  Arrivals arrivals_;
  SendRing ring_;
  bool is_ring_full_ = false;
};

class FinalReduce : public Role {
 public:
  FinalReduce(const CombineContext& context, CommandWriter& writer)
      : Role("final_reduce", Urgency::kUrgent),
        context_(context),
        group_(context.group()),
        arrivals_(context, group_.rank()) {
    for (int node = 0; node < group_.num_nodes(); ++node) {
      const uint64_t num_slots =
          node == group_.node() ? 0 : context.handle->counts.node(group_.rank(), node);
      rings_.push_back(node == group_.node()
                           ? nullptr
                           : std::make_unique<RecvRing>(context.ring(num_slots), num_slots,
                                                        place(context, node), writer));
    }
    consumed_.assign(rings_.size(), 0);
    available_.assign(rings_.size(), 0);
  }

  bool step() override {
    bool has_moved = false;
    for (int i = 0; i < context_.chunk_tokens && token_ < num_tokens(); ++i) {
      if (!reduce_next()) break;
      ++token_;
      has_moved = true;
    }
    for (size_t node = 0; node < rings_.size(); ++node)
      if (rings_[node]) rings_[node]->release(consumed_[node]);
    return has_moved;
  }
  bool is_done() const override {
    if (token_ < num_tokens()) return false;
    for (const auto& ring : rings_)
      if (ring && !ring->is_drained()) return false;
    return true;
  }
  Wait waits_for() const override {
    if (blocked_node_ < 0) return arrivals_.waits_for();
    return {group_.rail(group_.rank(), blocked_node_), group_.rank(),
            consumed_[size_t(blocked_node_)] + 1, consumed_[size_t(blocked_node_)]};
  }

 private:
  // One contribution to a token: a partial row of the own node, or a node's row.
  struct Part {
    const uint8_t* slot;
    int node;
    int local;  // own node only
  };

  size_t num_tokens() const { return size_t(context_.handle->num_tokens); }

  bool reduce_next() {
    const HandleData& handle = *context_.handle;
    const RecordEntry* entries = record_entries(handle.own_record(token_));
    Part parts[2 * kMaxTopk];
    const void* rows[2 * kMaxTopk];
    int group_ends[kMaxTopk];
    int num_parts = 0;
    int num_groups = 0;
    for (int node : nodes_wanted(entries)) {
      if (!collect(entries, node, parts, &num_parts)) return false;
      group_ends[num_groups++] = num_parts;
    }
    for (int i = 0; i < num_parts; ++i) rows[i] = parts[i].slot;
    uint8_t* out = static_cast<uint8_t*>(context_.call.out) + token_ * context_.slot.row_bytes;
    if (num_parts == 0)
      std::memset(out, 0, context_.slot.row_bytes);
    else if (num_parts == 1)
      std::memcpy(out, rows[0], context_.slot.row_bytes);
    else
      row_kernels().reduce(
          {out, rows, nullptr, group_ends, num_groups, context_.hidden, context_.call.dtype});
    if (context_.has_weight_grads()) write_weight_grads(entries, parts, num_parts);
    for (int i = 0; i < num_parts; ++i) {
      if (parts[i].node == group_.node())
        arrivals_.advance(parts[i].local);
      else
        ++consumed_[size_t(parts[i].node)];
    }
    ++counters_.rows;
    counters_.bytes_read += uint64_t(num_parts) * context_.slot.row_bytes;
    counters_.bytes_written += context_.slot.row_bytes;
    return true;
  }

  // Nodes with experts of the token, ascending: the order of summation.
  const std::vector<int>& nodes_wanted(const RecordEntry* entries) {
    nodes_.clear();
    for (int k = 0; k < context_.handle->num_topk; ++k) {
      if (entries[k].expert < 0) continue;
      const int node = group_.node_of(group_.expert_rank(entries[k].expert));
      const auto at = std::lower_bound(nodes_.begin(), nodes_.end(), node);
      if (at == nodes_.end() || *at != node) nodes_.insert(at, node);
    }
    return nodes_;
  }

  bool collect(const RecordEntry* entries, int node, Part* parts, int* num_parts) {
    if (node != group_.node()) {
      uint64_t& available = available_[size_t(node)];
      const uint64_t next = consumed_[size_t(node)];
      if (next >= available) available = rings_[size_t(node)]->available();
      if (next >= available) {
        blocked_node_ = node;
        return false;
      }
      parts[(*num_parts)++] = {rings_[size_t(node)]->slot(next), node, -1};
      return true;
    }
    const uint64_t mask = ranks_wanted(group_, entries, context_.handle->num_topk, node);
    for (uint64_t rest = mask; rest != 0; rest &= rest - 1) {
      const int local = std::countr_zero(rest);
      const uint8_t* slot = arrivals_.peek(local);
      if (slot == nullptr) {
        blocked_node_ = -1;
        return false;
      }
      parts[(*num_parts)++] = {slot, node, local};
    }
    return true;
  }

  void write_weight_grads(const RecordEntry* entries, const Part* parts, int num_parts) const {
    const int num_topk = context_.handle->num_topk;
    float* out = context_.call.out_weight_grads + token_ * size_t(num_topk);
    for (int k = 0; k < num_topk; ++k) {
      out[k] = 0.0f;
      if (entries[k].expert < 0) continue;
      const int rank = group_.expert_rank(entries[k].expert);
      for (int i = 0; i < num_parts; ++i) {
        const bool is_owner = parts[i].node == group_.node_of(rank) &&
                              (parts[i].local < 0 || parts[i].local == group_.local_rank_of(rank));
        if (is_owner)
          out[k] = reinterpret_cast<const float*>(parts[i].slot + context_.slot.tail_offset)[k];
      }
    }
  }

  static RecvRing::Place place(const CombineContext& context, int node) {
    const Mesh& mesh = *context.mesh;
    return {mesh.ring(mesh.registered().combine_recv_ring_of(node)),
            mesh.registered_word(RegisteredRegion::line(mesh.registered().combine_count_in, node)),
            context.proxy->channels().to_node(ChannelPurpose::kCombineCredit, node),
            &context.totals->combine_received[size_t(node)]};
  }

  const CombineContext& context_;
  const Group& group_;
  Arrivals arrivals_;
  std::vector<std::unique_ptr<RecvRing>> rings_;  // [node], own node empty
  std::vector<uint64_t> consumed_;
  std::vector<uint64_t> available_;
  std::vector<int> nodes_;
  int blocked_node_ = -1;
  size_t token_ = 0;
};

}  // namespace

std::vector<std::unique_ptr<Role>> make_combine_roles(const CombineContext& context,
                                                      std::vector<CommandWriter>& writers) {
  const Group& group = context.group();
  std::vector<std::unique_ptr<Role>> roles;
  const auto writer = [&]() -> CommandWriter& { return writers[roles.size() % writers.size()]; };
  for (int source : group.in_sources(group.rank()))
    roles.push_back(std::make_unique<ForwardReduce>(context, source, writer()));
  roles.push_back(std::make_unique<FinalReduce>(context, writer()));
  // Rows with the longer way home first. Every rank begins with another source, so that all of them
  // finish at about the same time.
  for (const bool is_local : {false, true}) {
    for (int i = 0; i < group.num_ranks(); ++i) {
      const int source = (group.rank() + i) % group.num_ranks();
      if (group.is_local(source) == is_local)
        roles.push_back(std::make_unique<Reduce>(context, source));
    }
  }
  return roles;
}

}  // namespace commlib
