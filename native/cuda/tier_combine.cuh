// Combine between nodes, the way home: a node's partial rows of a token become one row
// (forward_reduce), and rows that come home are taken in (receive).
#pragma once

#include "cuda/reduce.cuh"

namespace commlib::cuda {

// One token of another node: waits for the partial rows of this node's ranks, adds them, ranks
// ascending. `first_partial`: of lane's rank, where the source's partial rows from there start.
template <typename Sum>
__device__ bool forward_sum(const Mesh& mesh, const CombineCall& call, const uint32_t* record,
                            WarpMemory& own, Sum& sum, int source, uint64_t first_partial,
                            uint8_t* slot) {
  const int lane = lane_id();
  const uint32_t words = 4 + 3 * uint32_t(mesh.num_topk);
  int rank = -1;
  uint32_t number = 0;
  if (lane < mesh.num_topk) {
    const int expert = int(record[4 + 3 * lane]);
    number = record[words + uint32_t(lane)];
    rank = expert < 0 ? -1 : expert / mesh.experts_per_rank;
    if (rank >= 0 && mesh.base[rank] == nullptr) rank = -1;
  }
  const uint32_t same = __match_any_sync(0xffffffffu, rank >= 0 ? rank : -1 - lane);
  const bool is_first = rank >= 0 && __ffs(int(same)) - 1 == lane;
  bool has_come = true;
  if (is_first) {
    const uint32_t* flag = at<uint32_t>(mesh, mesh.rank, mesh.partial_arrived) +
                           partial_flag(mesh, source, rank) + number;
    has_come = wait_arrived(mesh, flag, mesh.workspace->plan.epoch, kForwardReduce, rank);
  }
  if (!__all_sync(0xffffffffu, has_come)) return false;
  fence_async_global();  // what the acquire made visible, before the bulk loads
  __syncwarp();
  const uint64_t partial = __shfl_sync(0xffffffffu, first_partial, rank >= 0 ? rank : 0) +
                           uint64_t(number) * call.slot_bytes;
  if (call.weight_grads != nullptr && lane < mesh.num_topk) {
    const float* grads = reinterpret_cast<const float*>(partial + call.row_bytes);
    reinterpret_cast<float*>(slot + call.row_bytes)[lane] = rank >= 0 ? grads[lane] : 0.0f;
  }
  int from = 0;
  const int count = order_lanes(is_first ? rank : kNothing, &from);
  sum_rows(0, call.row_bytes, own, sum, slot, __shfl_sync(0xffffffffu, partial, from), 1.0f, count);
  return true;
}

// Role of block `number` of `blocks`.
template <typename T>
__device__ void forward_reduce(const Mesh& mesh, const CombineCall& call, const TierCall& tier,
                               const uint32_t* rank_counts, WarpMemory& own, uint32_t number,
                               uint32_t blocks) {
  DeviceFabric& fabric = *mesh.fabric;
  const Plan& plan = mesh.workspace->plan;
  const BlockRings rings =
      rings_of(kTokensOfOthers, number, blocks, uint32_t(fabric.num_in_sources));
  const Outgoing side{mesh,
                      fabric.combine_send,
                      fabric.state.combine_sent,
                      tier.node_counts + fabric.node,
                      uint32_t(fabric.num_nodes),
                      fabric.in_sources,
                      1 + int(tier.out_blocks + rings.first),
                      tier.slot_bytes,
                      true};
  Summer<T, false> sum(own.is_last, own.weights);
  int last_source = -1;
  uint64_t first_partial = 0;
  serve_rings(
      mesh, side, rings,
      [&](int ring, uint32_t slot) {
        const int source = fabric.in_sources[ring];
        if (source != last_source) {
          last_source = source;
          first_partial = reinterpret_cast<uint64_t>(plan.forward_in[source]);
          for (int rank = 0; rank < min(lane_id(), mesh.num_ranks); ++rank)
            if (mesh.base[rank] != nullptr)
              first_partial += align_heap(rank_counts[source * mesh.num_ranks + rank] *
                                          uint64_t(call.slot_bytes));
        }
        const uint64_t index = uint64_t(ring) * mesh.max_tokens + slot;
        const uint32_t* record = reinterpret_cast<const uint32_t*>(tier.forward_records) +
                                 index * (4 + 4 * uint64_t(mesh.num_topk));
        return forward_sum(mesh, call, record, own, sum, source, first_partial,
                           side.slot(uint32_t(ring), slot));
      },
      [&] { own.pipe.drain(sum); });
}

// Role of block `number` of `blocks`.
__device__ inline void receive(const Mesh& mesh, const TierCall& tier, WarpMemory& own,
                               uint32_t number, uint32_t blocks) {
  DeviceFabric& fabric = *mesh.fabric;
  const Plan& plan = mesh.workspace->plan;
  const BlockRings rings =
      rings_of(kOwnTokens, number, blocks, uint32_t(fabric.num_nodes - 1));
  const Incoming side{mesh,
                      fabric.combine_recv,
                      fabric.state.combine_received,
                      tier.node_counts + mesh.rank * fabric.num_nodes,
                      1,
                      fabric.remote_nodes,
                      1 + int(rings.first),
                      tier.slot_bytes,
                      false,
                      kHomecoming};
  const Flags flags{mesh.home_arrived, 0};  // places are [node][slot]
  NoTransform as_it_is;
  serve_rings(
      mesh, side, rings,
      [&](int ring, uint32_t slot) {
        const int node = fabric.remote_nodes[ring];
        const uint8_t* from = side.slot(uint32_t(ring), slot);
        uint8_t* to = plan.home_in[node] + uint64_t(slot) * tier.slot_bytes;
        fence_async_global();  // what thread 0 has acquired, before the bulk loads
        __syncwarp();
        for (uint32_t begin = 0; begin < tier.slot_bytes; begin += own.pipe.piece_bytes) {
          own.pipe.make_room(as_it_is);
          own.pipe.put(from + begin, min(own.pipe.piece_bytes, tier.slot_bytes - begin),
                       lane_id() == 0 ? reinterpret_cast<uint64_t>(to + begin) : 0);
        }
        own.announcer.add(
            Tellers::place(mesh.rank, int(uint32_t(node) * uint32_t(mesh.max_tokens) + slot)),
            own.pipe.loaded);
        own.announcer.tell(mesh, flags, plan.epoch, own.pipe);
        return true;
      },
      [&] {
        own.pipe.drain(as_it_is);
        own.announcer.tell_all(mesh, flags, plan.epoch);
      });
}

}  // namespace commlib::cuda
