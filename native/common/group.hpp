// Ranks, nodes, rails and experts of one Runtime (host side; see docs/design.md section 2).
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "common/error.hpp"
#include "common/types.hpp"

namespace commlib {

class Group {
 public:
  Group(int rank, std::vector<int> node_of_rank, int num_experts)
      : rank_(rank), num_experts_(num_experts), node_of_rank_(std::move(node_of_rank)) {
    const int ranks = num_ranks();
    if (ranks < 1 || rank < 0 || rank >= ranks)
      throw ConfigException("rank=" + std::to_string(rank) + " is not in 0.." +
                            std::to_string(ranks - 1));
    if (num_experts < 1 || num_experts % ranks != 0)
      throw ConfigException("num_experts=" + std::to_string(num_experts) +
                            " is not divisible by num_ranks=" + std::to_string(ranks));
    for (int r = 0; r < ranks; ++r) {
      const int n = node_of_rank_[r];
      if (n < 0 || n > static_cast<int>(ranks_of_node_.size()))
        throw ConfigException("nodes are not numbered by first appearance: rank " +
                              std::to_string(r) + " has node " + std::to_string(n));
      if (n == static_cast<int>(ranks_of_node_.size())) ranks_of_node_.emplace_back();
      local_rank_.push_back(static_cast<int>(ranks_of_node_[n].size()));
      ranks_of_node_[n].push_back(r);
    }
    for (const auto& ranks_here : ranks_of_node_) {
      max_local_ranks_ = std::max(max_local_ranks_, static_cast<int>(ranks_here.size()));
      if (ranks_here.size() > 64)
        throw ConfigException("a node has " + std::to_string(ranks_here.size()) +
                              " ranks, more than 64");
    }
  }

  int rank() const { return rank_; }
  int node() const { return node_of_rank_[rank_]; }
  int num_ranks() const { return static_cast<int>(node_of_rank_.size()); }
  int num_nodes() const { return static_cast<int>(ranks_of_node_.size()); }
  int num_experts() const { return num_experts_; }
  int experts_per_rank() const { return num_experts_ / num_ranks(); }
  int max_local_ranks() const { return max_local_ranks_; }

  int node_of(int rank) const { return node_of_rank_[rank]; }
  int local_rank_of(int rank) const { return local_rank_[rank]; }
  const std::vector<int>& node_of_rank() const { return node_of_rank_; }
  const std::vector<int>& ranks_of_node(int node) const { return ranks_of_node_[node]; }
  const std::vector<int>& peers() const { return ranks_of_node_[node()]; }  // own rank included
  bool is_local(int rank) const { return node_of_rank_[rank] == node(); }
  int expert_rank(int expert) const { return expert / experts_per_rank(); }

  // The rank of `node` that takes in what `source` sends there.
  int rail(int source, int node) const {
    const auto& ranks = ranks_of_node_[node];
    return ranks[static_cast<size_t>(local_rank_[source]) % ranks.size()];
  }

  // Off-node ranks whose rail on `rank`'s node is `rank`, ascending.
  std::vector<int> in_sources(int rank) const {
    std::vector<int> sources;
    for (int s = 0; s < num_ranks(); ++s)
      if (node_of(s) != node_of(rank) && rail(s, node_of(rank)) == rank) sources.push_back(s);
    return sources;
  }

  std::vector<int> remote_nodes(int rank) const {
    std::vector<int> nodes;
    for (int n = 0; n < num_nodes(); ++n)
      if (n != node_of(rank)) nodes.push_back(n);
    return nodes;
  }

  // Every rank `rank` exchanges puts with: its rails elsewhere and its in_sources.
  std::vector<int> scale_out_peers(int rank) const {
    std::vector<int> peers = in_sources(rank);
    for (int n : remote_nodes(rank)) peers.push_back(rail(rank, n));
    std::sort(peers.begin(), peers.end());
    peers.erase(std::unique(peers.begin(), peers.end()), peers.end());
    return peers;
  }

  // Who writes source's rows into the memory of `rank`: the source, or its rail there.
  int writer(int source, int rank) const {
    return node_of(source) == node_of(rank) ? source : rail(source, node_of(rank));
  }

 private:
  int rank_;
  int num_experts_;
  int max_local_ranks_ = 0;
  std::vector<int> node_of_rank_;
  std::vector<int> local_rank_;
  std::vector<std::vector<int>> ranks_of_node_;
};

}  // namespace commlib
