// Rings of ranks in mappings of their own, in place of a device's memory.
#pragma once

#include <memory>
#include <vector>

#include "memory/regions.hpp"
#include "tests/transport_stream.hpp"

namespace commlib::testing {

class OtherRings {
 public:
  // Once for each rank; stays as long as this object.
  DeviceRegion make(int rank, const std::vector<int>& node_of_rank, size_t ring_bytes) {
    const Group group(rank, node_of_rank, int(node_of_rank.size()));
    const size_t bytes = RegisteredRegion(group, rank, {64, ring_bytes}).ring_memory_bytes();
    mappings_.push_back(std::make_unique<Mapping>(bytes));
    return {mappings_.back()->base(), bytes, -1, 0};
  }

 private:
  std::vector<std::unique_ptr<Mapping>> mappings_;
};

}  // namespace commlib::testing
