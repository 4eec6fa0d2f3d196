#include "cpu/dispatch_roles.hpp"

#include <cstring>

#include "channel/counter.hpp"

namespace commlib {

RowSource::RowSource(const DispatchContext& context) : context_(context) {
  if (context.call.cast != Cast::kNone) {
    cast_row_.resize(context.shape.row_bytes);
    cast_scales_.resize(context.shape.scales_bytes / sizeof(float));
  }
}

RowSource::Row RowSource::fetch(size_t token) {
  const DispatchCall& call = context_.call;
  const uint8_t* row = static_cast<const uint8_t*>(call.x) + token * context_.in_row_bytes;
  if (call.cast == Cast::kNone) {
    const size_t num_scales = context_.shape.scales_bytes / sizeof(float);
    return {row, call.scales == nullptr ? nullptr : call.scales + token * num_scales};
  }
  row_kernels().cast(cast_row_.data(), cast_scales_.data(), row, call.dtype, context_.hidden,
                     call.cast);
  return {cast_row_.data(), cast_scales_.data()};
}

LocalScatter::LocalScatter(const DispatchContext& context, int source) : context_(context) {
  const Group& group = context.group();
  for (int rank : group.peers()) {
    const DispatchLanding& landing = context.landing[size_t(rank)];
    targets_.push_back(
        {context.landing_part(rank, landing.rows_offset),
         context.landing_part(rank, landing.scales_offset),
         context.landing_part(rank, landing.records_offset),
         context.mesh->arena_word(rank, context.mesh->control().dispatch_arrived_of(source)),
         context.handle->counts.record_base(source, rank)});
  }
}

bool LocalScatter::wants(const uint8_t* record) const {
  const Group& group = context_.group();
  const RecordEntry* entries = record_entries(record);
  for (int k = 0; k < context_.shape.num_topk; ++k)
    if (entries[k].expert >= 0 && group.is_local(group.expert_rank(entries[k].expert))) return true;
  return false;
}

void LocalScatter::write_row(Target& target, int32_t row, const void* data, const float* scales) {
  const LandingShape& shape = context_.shape;
  std::memcpy(target.rows + size_t(row) * shape.row_bytes, data, shape.row_bytes);
  if (shape.scales_bytes > 0)
    std::memcpy(target.scales + size_t(row) * shape.scales_bytes, scales, shape.scales_bytes);
}

int LocalScatter::write(const uint8_t* record, const void* row, const float* scales) {
  const Group& group = context_.group();
  const RecordEntry* entries = record_entries(record);
  const size_t bytes = record_bytes(context_.shape.num_topk);
  uint64_t seen = 0;  // local ranks that have this row already
  int copies = 0;
  for (int k = 0; k < context_.shape.num_topk; ++k) {
    if (entries[k].expert < 0) continue;
    const int rank = group.expert_rank(entries[k].expert);
    if (!group.is_local(rank)) continue;
    const int local = group.local_rank_of(rank);
    Target& target = targets_[size_t(local)];
    const bool is_first = (seen >> local & 1) == 0;
    seen |= 1ull << local;
    // Peers copy further slots themselves (expand); on the own rank every slot is written here. In
    // the rows layout a rank has one slot.
    const bool is_own_slot = rank == group.rank() && context_.shape.layout == Layout::kGrouped;
    if (!is_first && !is_own_slot) continue;
    write_row(target, entries[k].row, row, scales);
    ++copies;
    if (is_first) {
      if (context_.is_fresh)
        std::memcpy(target.records + (target.base + target.written) * bytes, record, bytes);
      ++target.written;
    }
  }
  return copies;
}

void LocalScatter::publish() {
  for (Target& target : targets_) {
    if (target.written == target.published) continue;
    target.published = target.written;
    // Partner: the acquire load in Expand. Publishes rows, scales and records.
    store_release(target.arrived, make_ticket(context_.epoch, target.written));
  }
}

namespace {

class Push : public Role {
 public:
  explicit Push(const DispatchContext& context)
      : Role("push"),
        context_(context),
        source_(context),
        scatter_(context, context.group().rank()) {}

  bool step() override {
    const size_t end =
        std::min(size_t(context_.call.num_tokens), token_ + size_t(context_.chunk_tokens));
    const bool has_moved = token_ < end;
    for (; token_ < end; ++token_) {
      const uint8_t* record = context_.handle->own_record(token_);
      if (!scatter_.wants(record)) continue;
      const RowSource::Row row = source_.fetch(token_);
      const int copies = scatter_.write(record, row.data, row.scales);
      ++counters_.rows;
      counters_.bytes_read += context_.in_row_bytes;
      counters_.bytes_written += uint64_t(copies) * context_.shape.row_bytes;
    }
    scatter_.publish();
    return has_moved;
  }
  bool is_done() const override { return token_ == size_t(context_.call.num_tokens); }
  Wait waits_for() const override { return {}; }

 private:
  const DispatchContext& context_;
  RowSource source_;
  LocalScatter scatter_;
  size_t token_ = 0;
};

class ScaleOutSend : public Role {
 public:
  ScaleOutSend(const DispatchContext& context, int node, CommandWriter& writer)
      : Role("scale_out_send", Urgency::kUrgent),
        context_(context),
        node_(node),
        source_(context),
        slot_(context.slot()),
        tokens_(context.handle->tokens_to_node[size_t(node)]),
        ring_(context.ring(tokens_.size()), tokens_.size(), place(context, node), *context.proxy,
              writer) {}

  bool step() override {
    bool has_moved = ring_.flush();
    for (int i = 0; i < context_.chunk_tokens && !ring_.is_done(); ++i) {
      uint8_t* slot = ring_.next_slot();
      if (slot == nullptr) break;
      const size_t token = tokens_[ring_.written()];
      const RowSource::Row row = source_.fetch(token);
      std::memcpy(slot, row.data, slot_.row_bytes);
      if (slot_.scales_bytes > 0)
        std::memcpy(slot + slot_.scales_offset, row.scales, slot_.scales_bytes);
      if (slot_.tail_bytes > 0)
        std::memcpy(slot + slot_.tail_offset, context_.handle->own_record(token), slot_.tail_bytes);
      ring_.commit();
      has_moved = true;
      ++counters_.rows;
      counters_.bytes_read += context_.in_row_bytes;
      counters_.bytes_written += slot_.row_bytes + slot_.scales_bytes;
    }
    return has_moved;
  }
  bool is_done() const override { return ring_.is_done(); }
  Wait waits_for() const override {
    return {context_.group().rail(context_.group().rank(), node_), context_.group().rank(),
            ring_.total(), ring_.credits()};
  }

 private:
  static SendRing::Place place(const DispatchContext& context, int node) {
    const Mesh& mesh = *context.mesh;
    const Group& group = mesh.group();
    const int peer = group.rail(group.rank(), node);
    const size_t local = mesh.registered().dispatch_send_ring_of(node);
    return {
        mesh.ring(local),
        local,
        mesh.registered_of(peer).dispatch_recv_ring_of(group.rank()),
        mesh.registered_word(RegisteredRegion::line(mesh.registered().dispatch_credit_in, node)),
        context.proxy->channels().to_node(ChannelPurpose::kDispatchData, node),
        &context.totals->dispatch_sent[size_t(node)]};
  }

  const DispatchContext& context_;
  int node_;
  RowSource source_;
  SlotLayout slot_;
  const std::vector<uint32_t>& tokens_;
  SendRing ring_;
};

class Forward : public Role {
 public:
  Forward(const DispatchContext& context, int source, CommandWriter& writer)
      : Role("forward", Urgency::kUrgent),
        context_(context),
        source_(source),
        slot_(context.slot()),
        scatter_(context, source),
        num_slots_(context.handle->counts.node(source, context.group().node())),
        ring_(context.ring(num_slots_), num_slots_, place(context, source), writer) {}

  bool step() override {
    const uint64_t end = std::min(ring_.available(), consumed_ + uint64_t(context_.chunk_tokens));
    const bool has_moved = consumed_ < end;
    for (; consumed_ < end; ++consumed_) {
      const uint8_t* slot = ring_.slot(consumed_);
      const uint8_t* record = keep_record(slot);
      const int copies =
          scatter_.write(record, slot, reinterpret_cast<const float*>(slot + slot_.scales_offset));
      ++counters_.rows;
      counters_.bytes_read += slot_.row_bytes;
      counters_.bytes_written += uint64_t(copies) * slot_.row_bytes;
    }
    scatter_.publish();
    ring_.release(consumed_);
    return has_moved;
  }
  bool is_done() const override { return consumed_ == num_slots_ && ring_.is_drained(); }
  Wait waits_for() const override { return {source_, source_, consumed_ + 1, consumed_}; }

 private:
  // The record of the slot's token in the handle: copied from the slot, or there already.
  const uint8_t* keep_record(const uint8_t* slot) {
    const size_t bytes = record_bytes(context_.shape.num_topk);
    uint8_t* kept = context_.handle->forward_records[size_t(source_)].data() + consumed_ * bytes;
    if (context_.is_fresh) {
      std::memcpy(kept, slot + slot_.tail_offset, bytes);
      // A slot of another epoch here would be a broken protocol, not an input error.
      if (reinterpret_cast<const RecordHeader*>(kept)->epoch != uint32_t(context_.epoch))
        std::abort();
    }
    return kept;
  }
  static RecvRing::Place place(const DispatchContext& context, int source) {
    const Mesh& mesh = *context.mesh;
    return {
        mesh.ring(mesh.registered().dispatch_recv_ring_of(source)),
        mesh.registered_word(RegisteredRegion::line(mesh.registered().dispatch_count_in, source)),
        context.proxy->channels().to_source(ChannelPurpose::kDispatchCredit, source),
        &context.totals->dispatch_received[size_t(source)]};
  }

  const DispatchContext& context_;
  int source_;
  SlotLayout slot_;
  LocalScatter scatter_;
  uint64_t num_slots_;
  RecvRing ring_;
  uint64_t consumed_ = 0;
};

class Expand : public Role {
 public:
  Expand(const DispatchContext& context, int source)
      : Role("expand"),
        context_(context),
        source_(source),
        group_(context.group()),
        num_records_(context.handle->counts.rank(source, group_.rank())),
        base_(context.handle->record_base[size_t(source)]),
        is_own_writer_(group_.writer(source, group_.rank()) == group_.rank()),
        arrived_word_(context.mesh->arena_word(
            group_.rank(), context.mesh->control().dispatch_arrived_of(source))) {
    const DispatchLanding& landing = context.landing[size_t(group_.rank())];
    rows_ = context.landing_part(group_.rank(), landing.rows_offset);
    scales_ = context.landing_part(group_.rank(), landing.scales_offset);
    weights_ =
        reinterpret_cast<float*>(context.landing_part(group_.rank(), landing.weights_offset));
    topk_idx_ =
        reinterpret_cast<int64_t*>(context.landing_part(group_.rank(), landing.topk_idx_offset));
    records_ = context.is_fresh ? context.landing_part(group_.rank(), landing.records_offset)
                                : context.handle->records->data();
  }

  bool step() override {
    // Partner: the release in LocalScatter::publish at the writer.
    const uint64_t arrived = arrived_in(load_acquire(arrived_word_), context_.epoch, num_records_);
    const uint64_t end = std::min(arrived, done_ + uint64_t(context_.chunk_tokens));
    const bool has_moved = done_ < end;
    for (; done_ < end; ++done_) expand(base_ + done_);
    return has_moved;
  }
  bool is_done() const override { return done_ == num_records_; }
  Wait waits_for() const override {
    return {group_.writer(source_, group_.rank()), source_, num_records_, done_};
  }

 private:
  void expand(uint64_t index) {
    const LandingShape& shape = context_.shape;
    const RecordEntry* entries = record_entries(records_ + index * record_bytes(shape.num_topk));
    const int first_expert = group_.rank() * group_.experts_per_rank();
    int32_t first_row = -1;
    for (int k = 0; k < shape.num_topk; ++k) {
      const int local_expert = entries[k].expert - first_expert;
      const bool is_here =
          entries[k].expert >= 0 && local_expert >= 0 && local_expert < group_.experts_per_rank();
      if (shape.layout == Layout::kRows) {
        if (!context_.is_fresh) continue;
        const size_t at = index * size_t(shape.num_topk) + size_t(k);
        topk_idx_[at] = is_here ? local_expert : -1;
        weights_[at] = is_here ? entries[k].weight : 0.0f;
        continue;
      }
      if (!is_here) continue;
      if (context_.is_fresh) weights_[entries[k].row] = entries[k].weight;
      if (first_row < 0)
        first_row = entries[k].row;
      else if (!is_own_writer_)
        copy_row(first_row, entries[k].row);
    }
  }

  void copy_row(int32_t from, int32_t to) {
    const LandingShape& shape = context_.shape;
    std::memcpy(rows_ + size_t(to) * shape.row_bytes, rows_ + size_t(from) * shape.row_bytes,
                shape.row_bytes);
    std::memcpy(scales_ + size_t(to) * shape.scales_bytes,
                scales_ + size_t(from) * shape.scales_bytes, shape.scales_bytes);
    ++counters_.rows;
    counters_.bytes_read += shape.row_bytes;
    counters_.bytes_written += shape.row_bytes;
  }

  const DispatchContext& context_;
  int source_;
  const Group& group_;
  uint64_t num_records_;
  uint64_t base_;
  bool is_own_writer_;
  const uint64_t* arrived_word_;
  uint8_t* rows_;
  uint8_t* scales_;
  float* weights_;
  int64_t* topk_idx_;
  const uint8_t* records_;
  uint64_t done_ = 0;
};

// Rows between an expert's last token and its aligned end: grouped weight-gradient GEMMs read them.
class ZeroPadding : public Role {
 public:
  explicit ZeroPadding(const DispatchContext& context) : Role("zero_padding"), context_(context) {}

  bool step() override {
    if (is_done_) return false;
    is_done_ = true;
    if (context_.shape.layout == Layout::kRows) return false;
    const HandleData& handle = *context_.handle;
    for (size_t e = 0; e < handle.rows_per_expert.size(); ++e)
      zero(handle.expert_offset[e] + handle.rows_per_expert[e], handle.expert_offset[e + 1]);
    return true;
  }
  bool is_done() const override { return is_done_; }
  Wait waits_for() const override { return {}; }

 private:
  void zero(size_t begin, size_t end) {
    const LandingShape& shape = context_.shape;
    const int me = context_.group().rank();
    const DispatchLanding& landing = context_.landing[size_t(me)];
    const size_t rows = end - begin;
    std::memset(context_.landing_part(me, landing.rows_offset) + begin * shape.row_bytes, 0,
                rows * shape.row_bytes);
    std::memset(context_.landing_part(me, landing.scales_offset) + begin * shape.scales_bytes, 0,
                rows * shape.scales_bytes);
    if (context_.is_fresh)
      std::memset(context_.landing_part(me, landing.weights_offset) + begin * sizeof(float), 0,
                  rows * sizeof(float));
    counters_.rows += rows;
    counters_.bytes_written += rows * shape.row_bytes;
  }

  const DispatchContext& context_;
  bool is_done_ = false;
};

}  // namespace

// Roles are dealt to threads in this order, so a channel's commands always come from one FIFO.
std::vector<std::unique_ptr<Role>> make_dispatch_roles(const DispatchContext& context,
                                                       std::vector<CommandWriter>& writers) {
  const Group& group = context.group();
  std::vector<std::unique_ptr<Role>> roles;
  const auto writer = [&]() -> CommandWriter& { return writers[roles.size() % writers.size()]; };
  for (int node : group.remote_nodes(group.rank()))
    roles.push_back(std::make_unique<ScaleOutSend>(context, node, writer()));
  for (int source : group.in_sources(group.rank()))
    roles.push_back(std::make_unique<Forward>(context, source, writer()));
  roles.push_back(std::make_unique<Push>(context));
  for (int source = 0; source < group.num_ranks(); ++source)
    roles.push_back(std::make_unique<Expand>(context, source));
  roles.push_back(std::make_unique<ZeroPadding>(context));
  return roles;
}

}  // namespace commlib
