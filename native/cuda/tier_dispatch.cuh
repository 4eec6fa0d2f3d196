// Dispatch between nodes: the own rows once to each other node (scale_out_send), and rows that
// other nodes sent on to the ranks of this one (forward).
#pragma once

#include "cuda/push.cuh"
#include "cuda/tier_ring.cuh"

namespace commlib::cuda {

// A block: which token is in which slot to the nodes it serves, in token order.
__device__ inline void list_slots(const Mesh& mesh, const TierCall& tier, int node) {
  __shared__ uint32_t of_warp[32];
  const uint32_t warps = blockDim.x / 32, nodes = uint32_t(mesh.fabric->num_nodes);
  uint32_t base = 0;
  for (uint32_t begin = 0; begin < tier.num_tokens; begin += blockDim.x) {
    const uint32_t token = begin + threadIdx.x;
    const bool is_wanted = token < tier.num_tokens && (tier.node_masks[token] >> node & 1) != 0;
    const uint32_t wanted = __ballot_sync(0xffffffffu, is_wanted);
    if (lane_id() == 0) of_warp[warp_id()] = uint32_t(__popc(wanted));
    __syncthreads();
    uint32_t slot = base + uint32_t(__popc(wanted & ((1u << lane_id()) - 1)));
    for (uint32_t w = 0; w < warps; ++w) {
      if (w < uint32_t(warp_id())) slot += of_warp[w];
      base += of_warp[w];
    }
    if (is_wanted) {
      tier.slot_tokens[uint64_t(node) * tier.num_tokens + slot] = token;
      tier.token_slots[uint64_t(token) * nodes + uint32_t(node)] = slot;
    }
    __syncthreads();
  }
}

// Record and record numbers of a token, by lanes in parallel, to a slot.
__device__ inline void write_slot_record(const Mesh& mesh, uint32_t token, const Route& route,
                                         float weight, uint32_t* to) {
  const int lane = lane_id();
  const uint32_t num_topk = uint32_t(mesh.num_topk);
  if (lane < int(num_topk)) {
    uint32_t* entry = to + 4 + 3 * lane;
    entry[0] = uint32_t(route.expert);
    entry[1] = uint32_t(route.row);
    entry[2] = __float_as_uint(route.rank < 0 ? 0.0f : weight);
    to[4 + 3 * num_topk + uint32_t(lane)] = uint32_t(route.record);
  }
  if (lane == 0) {
    to[0] = uint32_t(mesh.rank), to[1] = token;
    to[2] = num_topk, to[3] = mesh.workspace->plan.epoch;
  }
}

// One row into its slot of a ring.
__device__ inline void fill_slot(const Mesh& mesh, const DispatchCall& call, const TierCall& tier,
                                 WarpMemory& own, const Caster& caster, uint32_t token,
                                 uint8_t* slot) {
  const int lane = lane_id();
  const uint32_t shrink = call.in_row_bytes / call.row_bytes;
  const Pick pick = pick_token(mesh, call, token);
  // The routes for the handle are push's to write.
  const Route route = make_route(mesh, call, pick, locate(mesh, call, pick), kSelf);
  if (tier.is_fresh != 0)
    write_slot_record(mesh, token, route, pick.weight,
                      reinterpret_cast<uint32_t*>(slot + tier.record_offset));
  float* scales = reinterpret_cast<float*>(slot + tier.scales_offset);
  if (call.scales != nullptr)
    for (uint32_t i = uint32_t(lane); i < call.num_scales; i += 32)
      scales[i] = call.scales[uint64_t(token) * call.num_scales + i];
  const uint8_t* row = call.x + uint64_t(token) * call.in_row_bytes;
  for (uint32_t begin = 0; begin < call.in_row_bytes; begin += call.piece_bytes) {
    const uint32_t bytes = min(call.piece_bytes, call.in_row_bytes - begin);
    own.pipe.make_room(caster);
    if (call.cast != kNoCast)
      own.scale_targets[own.pipe.loaded % kStages * 32 + uint32_t(lane)] =
          lane == 0 ? reinterpret_cast<uint64_t>(scales + begin / shrink / kScaleBlock) : 0;
    own.pipe.put(row + begin, bytes,
                 lane == 0 ? reinterpret_cast<uint64_t>(slot + begin / shrink) : 0);
  }
}

// Role of block `number` of `blocks`: each own row once to each other node that wants it.
__device__ inline void scale_out_send(const Mesh& mesh, const DispatchCall& call,
                                      const TierCall& tier, WarpMemory& own, uint32_t number,
                                      uint32_t blocks) {
  DeviceFabric& fabric = *mesh.fabric;
  const BlockRings rings =
      rings_of(kOwnTokens, number, blocks, uint32_t(fabric.num_nodes - 1));
  if (tier.is_fresh != 0 && rings.member == 0)
    for (uint32_t i = rings.first; i < rings.count; i += rings.step)
      list_slots(mesh, tier, fabric.remote_nodes[i]);
  const Outgoing side{mesh,
                      fabric.dispatch_send,
                      fabric.state.dispatch_sent,
                      tier.node_counts + mesh.rank * fabric.num_nodes,
                      1,
                      fabric.remote_nodes,
                      1 + int(rings.first),
                      tier.slot_bytes,
                      false};
  const Caster caster(call, own);
  serve_rings(
      mesh, side, rings,
      [&](int ring, uint32_t slot) {
        const int node = fabric.remote_nodes[ring];
        const uint32_t token = tier.slot_tokens[uint64_t(node) * tier.num_tokens + slot];
        fill_slot(mesh, call, tier, own, caster, token, side.slot(uint32_t(ring), slot));
        return true;
      },
      [&] { own.pipe.drain(caster); });
}

// What the handle keeps of a token that was forwarded.
__device__ inline uint32_t* forward_record(const Mesh& mesh, const TierCall& tier, int source,
                                           uint32_t slot) {
  const uint64_t words = 4 + 4 * uint64_t(mesh.num_topk);
  const uint64_t index = uint64_t(mesh.fabric->source_index[source]) * mesh.max_tokens + slot;
  return reinterpret_cast<uint32_t*>(tier.forward_records) + index * words;
}

// One row that came, to every rank of this node that wants it, at the slot of its first local
// expert there; expand does the rest. `first_record`: of lane's rank, the source's first record.
__device__ inline void forward_slot(const Mesh& mesh, const DispatchCall& call,
                                    const TierCall& tier, WarpMemory& own, int source,
                                    uint32_t number, const uint8_t* slot, uint32_t first_record) {
  const int lane = lane_id();
  const uint32_t num_topk = uint32_t(mesh.num_topk);
  const Plan& plan = mesh.workspace->plan;
  const uint32_t* record = forward_record(mesh, tier, source, number);
  const uint32_t words = uint32_t(record_bytes(mesh.num_topk) / 4);
  if (tier.is_fresh != 0) {
    const uint32_t* from = reinterpret_cast<const uint32_t*>(slot + tier.record_offset);
    for (uint32_t i = uint32_t(lane); i < words + num_topk; i += 32)
      const_cast<uint32_t*>(record)[i] = from[i];
    __syncwarp();
  }
  int rank = -1;
  uint32_t row = 0, own_number = 0;
  if (lane < int(num_topk)) {
    const int expert = int(record[4 + 3 * lane]);
    row = record[5 + 3 * lane];
    own_number = record[words + uint32_t(lane)];
    rank = expert < 0 ? -1 : expert / mesh.experts_per_rank;
    if (!is_near(mesh, rank)) rank = -1;
  }
  const uint32_t same = __match_any_sync(0xffffffffu, rank >= 0 ? rank : -1 - lane);
  const bool is_first = rank >= 0 && __ffs(int(same)) - 1 == lane;
  const uint32_t first_lanes = __ballot_sync(0xffffffffu, is_first);
  const uint32_t base = __shfl_sync(0xffffffffu, first_record, rank >= 0 ? rank : 0);
  for (uint32_t lanes = first_lanes; lanes != 0; lanes &= lanes - 1) {
    const int from = __ffs(int(lanes)) - 1;
    const PeerPlan& peer = plan.peer[__shfl_sync(0xffffffffu, rank, from)];
    const uint64_t to_row = __shfl_sync(0xffffffffu, row, from);
    const uint64_t to_record = __shfl_sync(0xffffffffu, base + own_number, from);
    if (tier.is_fresh != 0) {
      // peer.records counts from this rank's own first record there.
      uint32_t* to = reinterpret_cast<uint32_t*>(peer.records) +
                     (int64_t(to_record) - int64_t(peer.record_base)) * int64_t(words);
      for (uint32_t i = uint32_t(lane); i < words; i += 32) to[i] = record[i];
    }
    const float* scales = reinterpret_cast<const float*>(slot + tier.scales_offset);
    for (uint32_t i = uint32_t(lane); i < call.num_scales; i += 32)
      peer.scales[to_row * call.num_scales + i] = scales[i];
  }
  uint64_t target = 0;
  if (is_first)
    target = reinterpret_cast<uint64_t>(plan.peer[rank].rows + uint64_t(row) * call.row_bytes);
  NoTransform as_it_is;
  for (uint32_t begin = 0; begin < call.row_bytes; begin += call.piece_bytes) {
    own.pipe.make_room(as_it_is);
    own.pipe.put(slot + begin, min(call.piece_bytes, call.row_bytes - begin),
                 is_first ? target + begin : 0);
  }
  const uint32_t flag = uint32_t(source) * uint32_t(mesh.max_tokens) + own_number;
  own.announcer.add(is_first ? Tellers::place(rank, int(flag)) : Tellers::kNobody, own.pipe.loaded);
}

// Role of block `number` of `blocks`: rows from other nodes go on to the ranks here.
__device__ inline void forward(const Mesh& mesh, const DispatchCall& call, const TierCall& tier,
                               WarpMemory& own, uint32_t number, uint32_t blocks) {
  DeviceFabric& fabric = *mesh.fabric;
  const BlockRings rings =
      rings_of(kTokensOfOthers, number, blocks, uint32_t(fabric.num_in_sources));
  const Incoming side{mesh,
                      fabric.dispatch_recv,
                      fabric.state.dispatch_received,
                      tier.node_counts + fabric.node,
                      uint32_t(fabric.num_nodes),
                      fabric.in_sources,
                      1 + int(tier.out_blocks + rings.first),
                      tier.slot_bytes,
                      true,
                      kForward};
  const Flags flags{mesh.dispatch_arrived, 0};  // places are [source][record]
  const uint32_t epoch = mesh.workspace->plan.epoch;
  NoTransform as_it_is;
  int last_source = -1;
  uint32_t first_record = 0;
  serve_rings(
      mesh, side, rings,
      [&](int ring, uint32_t slot) {
        const int source = fabric.in_sources[ring];
        if (source != last_source) {
          last_source = source;
          first_record = 0;
          if (lane_id() < mesh.num_ranks)
            for (int below = 0; below < source; ++below)
              first_record += call.tables.rank_counts[below * mesh.num_ranks + lane_id()];
        }
        fence_async_global();  // what thread 0 has acquired, before the bulk loads
        __syncwarp();
        forward_slot(mesh, call, tier, own, source, slot, side.slot(uint32_t(ring), slot),
                     first_record);
        own.announcer.tell(mesh, flags, epoch, own.pipe);
        return true;
      },
      [&] {
        own.pipe.drain(as_it_is);
        own.announcer.tell_all(mesh, flags, epoch);
      });
}

}  // namespace commlib::cuda
