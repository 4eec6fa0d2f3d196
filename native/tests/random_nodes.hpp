// Random topologies: any number of nodes of any sizes, in any order.
#pragma once

#include <algorithm>
#include <random>
#include <vector>

namespace commlib::testing {

inline std::vector<int> random_nodes(std::mt19937& random, unsigned max_ranks) {
  const int ranks = int(random() % max_ranks) + 1;
  std::vector<int> nodes;
  int num_nodes = 0;
  for (int r = 0; r < ranks; ++r) {
    const int node = int(random() % unsigned(num_nodes + 1));
    num_nodes = std::max(num_nodes, node + 1);
    nodes.push_back(node);
  }
  return nodes;
}

}  // namespace commlib::testing
