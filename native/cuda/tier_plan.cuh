// Combine between nodes: what a rank's landing holds. First the partial rows of its own tokens
// from the other ranks of its node, then the rows of its tokens that other nodes send, then the
// partial rows of tokens for whose sources it is the rail.
#pragma once

#include "cuda/agree.cuh"

namespace commlib::cuda {

constexpr uint64_t kHeapAlignment = 256;

__device__ inline uint64_t align_heap(uint64_t bytes) { return align_up(bytes, kHeapAlignment); }

struct PartialLanding {
  const Mesh& mesh;
  const DeviceFabric& fabric;
  const uint32_t* counts;       // [source][rank]
  const uint32_t* node_counts;  // [source][node]
  uint64_t slot_bytes;

  // Partial rows of `source` from other ranks below `end` of `node`.
  __device__ uint64_t from_ranks(int source, int node, int end) const {
    uint64_t bytes = 0;
    for (int rank = 0; rank < end; ++rank)
      if (fabric.node_of[rank] == node && rank != source)
        bytes += align_heap(counts[source * mesh.num_ranks + rank] * slot_bytes);
    return bytes;
  }
  // Rows of `source` from nodes below `end` other than its own.
  __device__ uint64_t from_nodes(int source, int end) const {
    uint64_t bytes = 0;
    for (int node = 0; node < end; ++node)
      if (node != fabric.node_of[source])
        bytes += align_heap(node_counts[source * fabric.num_nodes + node] * slot_bytes);
    return bytes;
  }
  __device__ uint64_t own(int collector) const {
    return from_ranks(collector, fabric.node_of[collector], mesh.num_ranks) +
           from_nodes(collector, fabric.num_nodes);
  }
  // Partial rows of sources below `end` for which `collector` is the rail.
  __device__ uint64_t forwarded(int collector, int end) const {
    const int node = fabric.node_of[collector];
    uint64_t bytes = 0;
    for (int source = 0; source < end; ++source)
      if (fabric.node_of[source] != node && fabric.rail[source][node] == collector)
        bytes += from_ranks(source, node, mesh.num_ranks);
    return bytes;
  }
};

// A lane per peer. Returns the bytes that the peer's landing needs.
__device__ inline uint64_t place_partials(const Mesh& mesh, const ExchangeCall& call,
                                          const Ledger& ledger, int peer, PeerPlan& own) {
  const DeviceFabric& fabric = *mesh.fabric;
  const int me = mesh.rank, ranks = mesh.num_ranks;
  const PartialLanding landing{mesh, fabric, ledger.rank_counts, call.tables.node_counts,
                               call.slot_bytes};
  const auto grant = [&](int rank) { return mesh.heap[rank] + ledger.header(rank).grant_offset; };
  Plan& plan = mesh.workspace->plan;
  if (peer < fabric.num_nodes)
    plan.home_in[peer] =
        grant(me) + landing.from_ranks(me, fabric.node, ranks) + landing.from_nodes(me, peer);
  if (fabric.node_of[peer] == fabric.node) {
    own.partial_out = grant(peer) + landing.from_ranks(peer, fabric.node, me);
    own.partial_in = grant(me) + landing.from_ranks(me, fabric.node, peer);
  } else {
    const int collector = fabric.rail[peer][fabric.node];
    const uint64_t first = landing.own(collector) + landing.forwarded(collector, peer);
    own.partial_out = grant(collector) + first + landing.from_ranks(peer, fabric.node, me);
    plan.forward_in[peer] = grant(collector) + first;
  }
  return landing.own(peer) + landing.forwarded(peer, ranks);
}

}  // namespace commlib::cuda
