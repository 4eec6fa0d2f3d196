// Dispatch, the sender: own rows out, once to each rank that wants them.
#pragma once

#include "cuda/carrier.cuh"
#include "layout/record.hpp"

namespace commlib::cuda {

// A token on its way to being pushed: what a lane's slot says, then where that leads. Each step
// only uses what the one before has loaded, a turn earlier, so that a warp waits for no load.
struct Pick {
  uint32_t token;
  int4 words;  // fresh: expert (64 bits), place among its block's tokens; by handle: the route
  float weight;
};

struct Place {
  int rank;
  uint32_t row, record;  // first of the token's block
};

__device__ inline Pick pick_token(const Mesh& mesh, const DispatchCall& call, uint32_t token) {
  Pick pick{token, {-1, -1, -1, -1}, 1.0f};
  const int lane = lane_id();
  if (lane >= mesh.num_topk || token >= call.num_tokens) return pick;
  const uint64_t index = uint64_t(token) * mesh.num_topk + lane;
  if (call.topk_idx == nullptr) {
    pick.words = reinterpret_cast<const int4*>(call.routes)[index];
    return pick;
  }
  const int2 expert = reinterpret_cast<const int2*>(call.topk_idx)[index];
  const uint2 slot = call.slots[index];
  pick.words = make_int4(expert.x, expert.y, int(slot.x), int(slot.y));
  if (call.topk_weights != nullptr) pick.weight = call.topk_weights[index];
  return pick;
}

__device__ inline Place locate(const Mesh& mesh, const DispatchCall& call, const Pick& pick) {
  const int expert = pick.words.x;
  if (call.topk_idx == nullptr || expert < 0) return {-1, 0, 0};
  const uint32_t block = pick.token / call.tokens_per_block;
  const uint32_t* base = call.block_base + block * uint32_t(mesh.num_experts + mesh.num_ranks);
  const int rank = expert / mesh.experts_per_rank;
  const uint32_t row =
      call.layout == kRows ? mesh.workspace->plan.peer[rank].record_base : base[expert];
  return {rank, row, base[mesh.num_experts + rank]};
}

// To which ranks a pass over the own tokens pushes. Where there are blocks for local work only,
// those that push do the others first, and the own rank is everybody's work.
enum Reach : uint32_t { kEverybody, kOthers, kSelf };

__device__ inline Route make_route(const Mesh& mesh, const DispatchCall& call, const Pick& pick,
                                   const Place& place, Reach reach) {
  if (call.topk_idx == nullptr) return {pick.words.x, pick.words.y, pick.words.z, pick.words.w};
  Route route{-1, -1, -1, -1};
  if (place.rank >= 0) {
    const uint32_t record = place.record + uint32_t(pick.words.w);
    route.expert = pick.words.x;
    route.rank = place.rank;
    route.record = int(record);
    route.row = int(place.row + (call.layout == kRows ? record : uint32_t(pick.words.z)));
  }
  if (lane_id() < mesh.num_topk && reach != kSelf)
    call.routes[uint64_t(pick.token) * mesh.num_topk + lane_id()] = route;
  return route;
}

// The record goes to each rank once, from lanes in parallel: header, then 3 words per slot.
__device__ inline void write_records(const Mesh& mesh, const DispatchCall& call, uint32_t token,
                                     const Route& route, float own_weight, uint32_t first_lanes) {
  const int lane = lane_id(), num_topk = mesh.num_topk;
  const Plan& plan = mesh.workspace->plan;
  const float weight = route.rank >= 0 ? own_weight : 0.0f;
  const uint32_t bytes = uint32_t(record_bytes(num_topk));
  const uint32_t header[4] = {uint32_t(mesh.rank), token, uint32_t(num_topk), plan.epoch};
  for (uint32_t first = 0; first < bytes / 4; first += 32) {
    const uint32_t word = first + uint32_t(lane);
    const uint32_t entry = word < 4 ? 0 : (word - 4) / 3, field = word < 4 ? 0 : (word - 4) % 3;
    const int from = int(entry) & 31;
    const int32_t expert = __shfl_sync(0xffffffffu, route.expert, from);
    const int32_t row = __shfl_sync(0xffffffffu, route.row, from);
    const float value = __shfl_sync(0xffffffffu, weight, from);
    uint32_t data = field == 0   ? uint32_t(expert)
                    : field == 1 ? uint32_t(row)
                                 : __float_as_uint(value);
    if (word < 4)
      data = word == 0 ? header[0] : word == 1 ? header[1] : word == 2 ? header[2] : header[3];
    for (uint32_t lanes = first_lanes; lanes != 0; lanes &= lanes - 1) {
      const int to = __ffs(int(lanes)) - 1;
      const int rank = __shfl_sync(0xffffffffu, route.rank, to);
      const int record = __shfl_sync(0xffffffffu, route.record, to);
      uint8_t* at_peer = plan.peer[rank].records + uint64_t(record) * bytes;
      if (word < bytes / 4) reinterpret_cast<uint32_t*>(at_peer)[word] = data;
    }
  }
}

// Whether this rank's kernels write there themselves. Other nodes get rows from their rails.
__device__ inline bool is_near(const Mesh& mesh, int rank) {
  return rank >= 0 && mesh.base[rank] != nullptr;
}

// Role: each own row to each destination rank once, on the own rank to all its slots.
__device__ inline void push(const Mesh& mesh, const DispatchCall& call, WarpMemory& own,
                            Reach reach) {
  const int lane = lane_id();
  const Plan& plan = mesh.workspace->plan;
  const uint32_t pieces = (call.in_row_bytes + call.piece_bytes - 1) / call.piece_bytes;
  const Caster caster(call, own);
  const uint32_t shrink = call.in_row_bytes / call.row_bytes;
  const Flags flags{mesh.dispatch_arrived, uint32_t(mesh.max_tokens)};
  Tickets tickets(reach == kSelf ? &mesh.workspace->next_own : &mesh.workspace->next_push);
  Pick pick = pick_token(mesh, call, tickets.take());
  Pick next = pick_token(mesh, call, tickets.take()), after;
  Place place = locate(mesh, call, pick), next_place;
  for (; pick.token < call.num_tokens; pick = next, next = after, place = next_place) {
    after = pick_token(mesh, call, tickets.take());
    next_place = locate(mesh, call, next);
    const uint32_t token = pick.token;
    const Route route = make_route(mesh, call, pick, place, reach);
    const bool is_reached =
        is_near(mesh, route.rank) &&
        (reach == kEverybody || (route.rank == mesh.rank) == (reach == kSelf));
    const uint32_t same = __match_any_sync(0xffffffffu, is_reached ? route.rank : -1 - lane);
    const bool is_first = is_reached && __ffs(int(same)) - 1 == lane;
    const uint32_t first_lanes = __ballot_sync(0xffffffffu, is_first);
    if (first_lanes == 0) continue;
    if (call.topk_idx != nullptr) write_records(mesh, call, token, route, pick.weight, first_lanes);

    const bool is_own_slot = is_reached && route.rank == mesh.rank && call.layout == kGrouped;
    const bool is_target = is_first || is_own_slot;
    uint64_t target = 0, scale_target = 0;
    if (is_target) {
      const PeerPlan& peer = plan.peer[route.rank];
      target = reinterpret_cast<uint64_t>(peer.rows + uint64_t(route.row) * call.row_bytes);
      scale_target =
          reinterpret_cast<uint64_t>(peer.scales + uint64_t(route.row) * call.num_scales);
    }
    if (call.scales != nullptr) {
      const float* scales = call.scales + uint64_t(token) * call.num_scales;
      for (uint32_t lanes = __ballot_sync(0xffffffffu, is_target); lanes != 0; lanes &= lanes - 1) {
        float* to =
            reinterpret_cast<float*>(__shfl_sync(0xffffffffu, scale_target, __ffs(int(lanes)) - 1));
        for (uint32_t i = lane; i < call.num_scales; i += 32) to[i] = scales[i];
      }
    }
    const uint8_t* row = call.x + uint64_t(token) * call.in_row_bytes;
    for (uint32_t p = 0; p < pieces; ++p) {
      const uint32_t begin = p * call.piece_bytes;
      const uint32_t bytes = min(call.piece_bytes, call.in_row_bytes - begin);
      own.pipe.make_room(caster);
      if (call.cast != kNoCast)
        own.scale_targets[own.pipe.loaded % kStages * 32 + lane] =
            is_target ? scale_target + begin / shrink / kScaleBlock * 4 : 0;
      own.pipe.put(row + begin, bytes, is_target ? target + begin / shrink : 0);
    }
    own.announcer.add(is_first ? Tellers::place(route.rank, route.record) : Tellers::kNobody,
                      own.pipe.loaded);
    own.announcer.tell(mesh, flags, plan.epoch, own.pipe);
  }
  own.pipe.drain(caster);
  own.announcer.tell_all(mesh, flags, plan.epoch);
}

// What a block pushes. Blocks that push do some of each role: what binds is how much one
// multiprocessor can store.
__device__ inline void push_share(const Mesh& mesh, const DispatchCall& call, WarpMemory& own) {
  const bool has_helpers = gridDim.x > call.push_blocks, is_helper = blockIdx.x >= call.push_blocks;
  if (!is_helper && uint32_t(warp_id()) >= call.push_warps) return;
  Reach reach = is_helper ? kSelf : has_helpers ? kOthers : kEverybody;
  for (;; reach = kSelf) {
    push(mesh, call, own, reach);
    if (reach != kOthers) break;
  }
}

}  // namespace commlib::cuda
