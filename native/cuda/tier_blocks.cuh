// Which blocks serve the network in this call, from what the exchange has said.
#pragma once

#include "channel/role_blocks.hpp"
#include "cuda/wait.cuh"

namespace commlib::cuda {

// Blocks below `own` serve the own tokens (scale_out_send, receive), the next `others` those of
// other nodes (forward, forward_reduce). All blocks find the same numbers.
struct TierBlocks {
  uint32_t own, others;
};

__device__ inline TierBlocks tier_blocks(const Mesh& mesh, const TierCall& tier,
                                         const uint32_t* rank_counts) {
  const DeviceFabric& fabric = *mesh.fabric;
  const int lane = lane_id(), nodes = fabric.num_nodes;
  uint32_t own = 0, rows = 0, copies = 0;
  if (lane < nodes && lane != fabric.node) own = tier.node_counts[mesh.rank * nodes + lane];
  if (lane < fabric.num_in_sources) {
    const int source = fabric.in_sources[lane];
    rows = tier.node_counts[source * nodes + fabric.node];
    for (int rank = 0; rank < mesh.num_ranks; ++rank)
      if (mesh.base[rank] != nullptr) copies += rank_counts[source * mesh.num_ranks + rank];
  }
  constexpr uint32_t kAll = 0xffffffffu;
  return {__any_sync(kAll, own != 0) ? tier.out_blocks : 0,
          role_blocks(__reduce_add_sync(kAll, rows), __reduce_add_sync(kAll, copies),
                      tier.in_per_copy, tier.most_in_blocks)};
}

}  // namespace commlib::cuda
