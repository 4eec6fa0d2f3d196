#include "cpu/exchange.hpp"

#include <cstring>

#include "common/atomics.hpp"

namespace commlib {

uint64_t hash_text(const char* text) {  // FNV-1a
  uint64_t hash = 14695981039346656037ull;
  for (; *text != '\0'; ++text) hash = (hash ^ uint8_t(*text)) * 1099511628211ull;
  return hash;
}

Exchange::Exchange(const Mesh& mesh, const Proxy& proxy, CommandWriter& writer, uint64_t epoch,
                   const ExchangeHeader& header, const OwnCounts* counts)
    : mesh_(mesh),
      proxy_(proxy),
      writer_(writer),
      epoch_(epoch),
      row_bytes_(exchange_row_bytes(mesh.group())),
      row_(row_bytes_),
      in_sources_(mesh.group().in_sources(mesh.group().rank())),
      remote_nodes_(mesh.group().remote_nodes(mesh.group().rank())),
      is_relayed_(in_sources_.size()) {
  ExchangeHeader own = header;
  own.epoch = epoch;
  own.has_counts = counts != nullptr;
  std::memcpy(row_.data(), &own, sizeof own);
  if (counts == nullptr) return;
  uint8_t* at = row_.data() + sizeof own;
  for (const auto* list : {&counts->per_expert, &counts->per_rank, &counts->per_node}) {
    std::memcpy(at, list->data(), list->size() * sizeof(uint32_t));
    at += list->size() * sizeof(uint32_t);
  }
}

bool Exchange::step() {
  const bool has_published = publish();
  const bool has_relayed = relay();
  return gather() || has_published || has_relayed;
}

// Copies a row into the arenas of the whole node.
void Exchange::deliver(int source, const uint8_t* row) const {
  for (int peer : mesh_.group().peers()) {
    std::memcpy(mesh_.arena_base(peer) + mesh_.control().exchange_row_of(epoch_, source), row,
                row_bytes_);
    // Partner: the acquire load in gather() at the peer.
    store_release(mesh_.arena_word(peer, mesh_.control().exchange_epoch_of(source)), epoch_);
  }
}

bool Exchange::publish() {
  if (is_published_) return false;
  const int me = mesh_.group().rank();
  const bool is_first = !is_delivered_;
  const size_t out = mesh_.registered().exchange_row_out_of(epoch_);
  if (is_first) {
    // The staging of two epochs ago is long consumed, but its put must have completed locally too.
    for (int node : remote_nodes_) {
      const uint32_t channel = proxy_.channels().to_node(ChannelPurpose::kExchange, node);
      if (proxy_.completed(channel) + 2 < epoch_) return false;
    }
    deliver(me, row_.data());
    std::memcpy(mesh_.memory().base() + out, row_.data(), row_bytes_);
    is_delivered_ = true;
  }
  for (; num_posted_ < remote_nodes_.size(); ++num_posted_) {
    const int node = remote_nodes_[num_posted_];
    const RegisteredRegion& there = mesh_.registered_of(mesh_.group().rail(me, node));
    const uint32_t channel = proxy_.channels().to_node(ChannelPurpose::kExchange, node);
    if (!writer_.push(encode({CommandKind::kPut, channel, 1, uint32_t(row_bytes_), out,
                              there.exchange_row_in_of(epoch_, me)})))
      return is_first;
  }
  is_published_ = true;
  return true;
}

bool Exchange::relay() {
  bool has_moved = false;
  for (size_t i = 0; i < in_sources_.size(); ++i) {
    if (is_relayed_[i]) continue;
    const int source = in_sources_[i];
    const uint64_t* count =
        mesh_.registered_word(RegisteredRegion::line(mesh_.registered().exchange_count_in, source));
    // Rows arrive one per epoch, from epoch 1. Partner: the put_signal of the source's proxy.
    if (load_acquire(count) < epoch_) continue;
    deliver(source, mesh_.memory().base() + mesh_.registered().exchange_row_in_of(epoch_, source));
    is_relayed_[i] = true;
    ++num_relayed_;
    has_moved = true;
  }
  return has_moved;
}

bool Exchange::gather() {
  if (is_gathered_) return false;
  const Group& group = mesh_.group();
  for (int source = 0; source < group.num_ranks(); ++source) {
    const uint64_t* word =
        mesh_.arena_word(group.rank(), mesh_.control().exchange_epoch_of(source));
    if (load_acquire(word) < epoch_) return false;  // partner: the release in deliver()
  }
  is_gathered_ = true;
  return true;
}

Wait Exchange::waits_for() const {
  const Group& group = mesh_.group();
  // Ranks of the own node first: one of them that stands still also holds back what it relays, and
  // the sources it relays for would be blamed in its place.
  for (const bool is_local : {true, false}) {
    for (int source = 0; source < group.num_ranks(); ++source) {
      const uint64_t seen =
          load_acquire(mesh_.arena_word(group.rank(), mesh_.control().exchange_epoch_of(source)));
      if (group.is_local(source) == is_local && seen < epoch_)
        return {source, source, epoch_, seen};
    }
  }
  return {};
}

ExchangeTable Exchange::table() const {
  const Group& group = mesh_.group();
  ExchangeTable table;
  RoutingCounts& counts = table.counts;
  counts.num_ranks = group.num_ranks();
  counts.num_nodes = group.num_nodes();
  counts.num_experts = group.num_experts();
  for (int source = 0; source < group.num_ranks(); ++source) {
    const uint8_t* row =
        mesh_.arena_base(group.rank()) + mesh_.control().exchange_row_of(epoch_, source);
    ExchangeHeader header;
    std::memcpy(static_cast<void*>(&header), row, sizeof header);
    header.text[sizeof header.text - 1] = '\0';
    table.headers.push_back(header);
    const uint32_t* at = reinterpret_cast<const uint32_t*>(row + sizeof header);
    const auto append = [&at](std::vector<uint32_t>* list, int size) {
      list->insert(list->end(), at, at + size);
      at += size;
    };
    append(&counts.per_expert, group.num_experts());
    append(&counts.per_rank, group.num_ranks());
    append(&counts.per_node, group.num_nodes());
  }
  return table;
}

}  // namespace commlib
