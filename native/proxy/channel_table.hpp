// Numbering of this rank's outgoing scale-out channels: the only place that maps a purpose to the
// channel id inside a command.
#pragma once

#include <vector>

#include "channel/command.hpp"
#include "memory/regions.hpp"

namespace commlib {

enum class ChannelPurpose {
  kExchange,
  kDispatchData,
  kCombineCredit,
  kCombineData,
  kDispatchCredit
};

struct ChannelSpec {
  ChannelPurpose purpose;
  int peer;
  size_t remote_signal_offset;
};

class ChannelTable {
 public:
  // `region_of(peer)` gives the peer's RegisteredRegion.
  template <typename RegionOf>
  ChannelTable(const Group& group, RegionOf region_of)
      : by_node_(size_t(group.num_nodes()) * 3), by_source_(size_t(group.num_ranks()) * 2) {
    const int me = group.rank();
    for (int node : group.remote_nodes(me)) {
      const int peer = group.rail(me, node);
      const RegisteredRegion& there = region_of(peer);
      const auto at = [](size_t base, int index) { return RegisteredRegion::line(base, index); };
      add_by_node(node, {ChannelPurpose::kExchange, peer, at(there.exchange_count_in, me)});
      add_by_node(node, {ChannelPurpose::kDispatchData, peer, at(there.dispatch_count_in, me)});
      add_by_node(node, {ChannelPurpose::kCombineCredit, peer, at(there.combine_credit_in, me)});
    }
    for (int source : group.in_sources(me)) {
      const RegisteredRegion& there = region_of(source);
      add_by_source(source, {ChannelPurpose::kCombineData, source,
                             RegisteredRegion::line(there.combine_count_in, group.node())});
      add_by_source(source, {ChannelPurpose::kDispatchCredit, source,
                             RegisteredRegion::line(there.dispatch_credit_in, group.node())});
    }
    if (specs_.size() > kMaxChannels) throw ConfigException("more scale-out channels than 65536");
  }

  const std::vector<ChannelSpec>& specs() const { return specs_; }

  // kExchange, kDispatchData, kCombineCredit: towards the rail on `node`.
  uint32_t to_node(ChannelPurpose purpose, int node) const {
    return by_node_[size_t(node) * 3 + size_t(purpose)];
  }
  // kCombineData, kDispatchCredit: towards in_source `source`.
  uint32_t to_source(ChannelPurpose purpose, int source) const {
    return by_source_[size_t(source) * 2 + (size_t(purpose) - 3)];
  }

 private:
  void add_by_node(int node, const ChannelSpec& spec) {
    by_node_[size_t(node) * 3 + size_t(spec.purpose)] = uint32_t(specs_.size());
    specs_.push_back(spec);
  }
  void add_by_source(int source, const ChannelSpec& spec) {
    by_source_[size_t(source) * 2 + (size_t(spec.purpose) - 3)] = uint32_t(specs_.size());
    specs_.push_back(spec);
  }

  std::vector<ChannelSpec> specs_;
  std::vector<uint32_t> by_node_;
  std::vector<uint32_t> by_source_;
};

}  // namespace commlib
