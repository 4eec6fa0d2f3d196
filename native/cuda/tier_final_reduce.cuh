// Combine between nodes, the source: one sum for every own token, of its own node's partial rows
// and of one row per other node.
#pragma once

#include "cuda/final_reduce.cuh"
#include "cuda/tier_ring.cuh"

namespace commlib::cuda {

// Adds pieces like Summer, but the own node's partial rows first among themselves: the sum so far
// is put aside meanwhile.
constexpr uint32_t kEnd = 1, kPutAside = 2, kTakeBack = 4;  // bits of WarpMemory::is_last

template <typename T>
struct GroupSummer {
  Summer<T, false> sum;
  float* aside;  // as many columns as a piece has

  __device__ uint32_t operator()(uint8_t* piece, uint32_t bytes, int stage) {
    const uint32_t marks = sum.is_last[stage];
    if ((marks & (kPutAside | kTakeBack)) == 0) return sum(piece, bytes, stage);
    const uint32_t end = marks & kEnd;
    if ((marks & kPutAside) != 0) {
      each([](float& now, float& kept) { kept = now; });
      sum.clear();
    }
    const uint4* own = reinterpret_cast<const uint4*>(piece + lane_id() * 16);
    const int num_vectors = int((bytes - min(bytes, uint32_t(lane_id() * 16)) + 511) / 512);
    sum.template add<false>(own, 1.0f, num_vectors);
    if ((marks & kTakeBack) != 0) each([](float& now, float& kept) { now = __fadd_rn(kept, now); });
    if (end != 0) {
      sum.template put<false>(reinterpret_cast<uint4*>(piece + lane_id() * 16), num_vectors);
      sum.clear();
      fence_async_shared();  // the sum before the bulk store that reads it
    }
    __syncwarp();
    return bytes;
  }

  template <typename Act>
  __device__ void each(Act act) {
    constexpr int kColumns = Vector<T>::kColumns;
#pragma unroll
    for (int v = 0; v < kVectors; ++v)
#pragma unroll
      for (int c = 0; c < kColumns; ++c)
        act(sum.acc[v][c], aside[(v * kColumns + c) * 32 + lane_id()]);
  }
};

// Behind what carve_sums hands out. commlib/cuda/launch.py computes the total.
template <typename T>
__device__ float* carve_aside(uint8_t* memory) {
  constexpr uint32_t kBytes = kVectors * Vector<T>::kColumns * 32 * 4;
  const uint32_t warps = blockDim.x / 32;
  const uint32_t given = dynamic_shared_bytes();
  return reinterpret_cast<float*>(memory + given - (warps - uint32_t(warp_id())) * kBytes);
}

// Like sum_rows; lane i also holds the marks of term i.
template <typename Sum>
__device__ void sum_groups(uint32_t end, WarpMemory& own, Sum& sum, uint8_t* to, uint64_t term,
                           uint32_t mark, int num_terms) {
  const uint32_t piece_bytes = own.pipe.piece_bytes;
  for (uint32_t begin = 0; begin < end; begin += piece_bytes) {
    const uint32_t bytes = min(piece_bytes, end - begin);
    for (int i = 0; i < num_terms; ++i) {
      const uint8_t* from = reinterpret_cast<const uint8_t*>(__shfl_sync(0xffffffffu, term, i));
      const uint32_t marks = __shfl_sync(0xffffffffu, mark, i) | (i == num_terms - 1 ? kEnd : 0);
      own.pipe.make_room(sum);
      if (lane_id() == 0) own.is_last[own.pipe.loaded % kStages] = marks;
      const bool is_target = i == num_terms - 1 && lane_id() == 0;
      own.pipe.put(from + begin, bytes, is_target ? reinterpret_cast<uint64_t>(to + begin) : 0);
    }
  }
}

// Where the part of a sum that holds lane's slot lies, and the flag that tells of it.
struct Part {
  const uint8_t* row;
  const float* grads;
  bool has_grads;        // reduce has written them where they belong
  const uint32_t* flag;  // nullptr: it is there
  int node;
  int key;  // parts are added in this order; equal keys: the same part
  int peer;
};

__device__ inline Part part_of(const Mesh& mesh, const CombineCall& call, const TierCall& tier,
                               uint32_t token, const Route& route) {
  Part part{nullptr, nullptr, false, nullptr, -1, -1, -1};
  if (route.rank < 0) return part;
  const DeviceFabric& fabric = *mesh.fabric;
  const Plan& plan = mesh.workspace->plan;
  const int node = fabric.node_of[route.rank];
  part.node = node;
  part.key = node * 2 * kMaxRanks;
  if (node != fabric.node) {
    const uint32_t slot = tier.token_slots[uint64_t(token) * uint32_t(fabric.num_nodes) + node];
    part.row = plan.home_in[node] + uint64_t(slot) * call.slot_bytes;
    part.flag =
        at<uint32_t>(mesh, mesh.rank, mesh.home_arrived) + uint64_t(node) * mesh.max_tokens + slot;
    part.peer = fabric.rail[mesh.rank][node];
  } else {
    part.key += route.rank;
    part.peer = route.rank;
    const bool is_own = route.rank == mesh.rank;
    if (is_own && is_own_row_partial(call)) {
      part.row = call.y + uint64_t(route.row) * call.row_bytes;
      if (call.weight_grads != nullptr)
        part.grads = call.weight_grads + uint64_t(route.row) * uint64_t(mesh.num_topk);
      return part;
    }
    part.flag = at<uint32_t>(mesh, mesh.rank, mesh.partial_arrived) +
                partial_flag(mesh, mesh.rank, route.rank) + uint32_t(route.record);
    if (is_own) {
      part.row = call.out + uint64_t(token) * call.row_bytes;
      part.has_grads = true;
      return part;
    }
    part.row = plan.peer[route.rank].partial_in + uint64_t(route.record) * call.slot_bytes;
  }
  part.grads = reinterpret_cast<const float*>(part.row + call.row_bytes);
  return part;
}

// The own node's rows are added among themselves before they meet the sum of the nodes below. If
// that is one row, or none, they can simply come first.
__device__ inline uint32_t mark_group(const Mesh& mesh, bool is_first, Part& part) {
  const int node = mesh.fabric->node;
  const bool is_member = is_first && part.node == node;
  const uint32_t below = __ballot_sync(0xffffffffu, is_first && part.node < node);
  const uint32_t group = __ballot_sync(0xffffffffu, is_member);
  if (__popc(group) < 2 || below == 0) return 0;
  if (__popc(below) == 1) {
    if (is_member) part.key -= (node + 1) * 2 * kMaxRanks;
    return 0;
  }
  const int least = __reduce_min_sync(0xffffffffu, is_member ? part.key : kNothing);
  const int most = __reduce_max_sync(0xffffffffu, is_member ? part.key : -1);
  if (!is_member) return 0;
  return (part.key == least ? kPutAside : 0) | (part.key == most ? kTakeBack : 0);
}

// Role: the own tokens, each as soon as its parts are here; nodes, on the own one ranks, ascending.
template <typename T>
__device__ void tier_final_reduce(const Mesh& mesh, const CombineCall& call, const TierCall& tier,
                                  WarpMemory& own, float* aside) {
  const int lane = lane_id();
  const uint32_t epoch = mesh.workspace->plan.epoch;
  GroupSummer<T> sum{Summer<T, false>(own.is_last, own.weights), aside};
  Tickets tickets(&mesh.workspace->next_final);
  uint32_t token = tickets.take();
  while (token < call.num_tokens) {
    const uint32_t next_token = tickets.take();
    Part part = part_of(mesh, call, tier, token, load_route(mesh, call, token));
    const uint32_t same = __match_any_sync(0xffffffffu, part.row != nullptr ? part.key : -1 - lane);
    const bool is_first = part.row != nullptr && __ffs(int(same)) - 1 == lane;
    bool has_come = true;
    if (is_first && part.flag != nullptr)
      has_come = wait_arrived(mesh, part.flag, epoch, kFinalReduce, part.peer);
    if (!__all_sync(0xffffffffu, has_come)) break;
    fence_async_global();  // what the acquire made visible, before the bulk loads
    __syncwarp();
    if (call.out_weight_grads != nullptr && lane < mesh.num_topk && !part.has_grads)
      call.out_weight_grads[uint64_t(token) * mesh.num_topk + lane] =
          part.grads == nullptr ? 0.0f : part.grads[lane];
    const uint32_t marks = mark_group(mesh, is_first, part);
    int from = 0;
    const int count = order_lanes(is_first ? part.key : kNothing, &from);
    const uint64_t term = __shfl_sync(0xffffffffu, reinterpret_cast<uint64_t>(part.row), from);
    const uint32_t mark = __shfl_sync(0xffffffffu, marks, from);
    uint8_t* out = call.out + uint64_t(token) * call.row_bytes;
    for (uint32_t i = lane * 16; count == 0 && i < call.row_bytes; i += 512)
      *reinterpret_cast<uint4*>(out + i) = make_uint4(0, 0, 0, 0);
    sum_groups(call.row_bytes, own, sum, out, term, mark, count);
    token = next_token;
  }
  own.pipe.drain(sum);
}

}  // namespace commlib::cuda
