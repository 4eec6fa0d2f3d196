// Dispatch, the receiver: rows that came go to their other slots, rows that nobody sends are zeros.
#pragma once

#include "cuda/push.cuh"

namespace commlib::cuda {

constexpr int kExpandBatch = 4;  // records whose loads are under way together
constexpr uint32_t kNoRecord = ~0u;

// Which part of work that is dealt out in advance a warp does. Warps that push get none, if there
// are others.
struct Share {
  bool has_part;
  uint32_t first, step;
};

__device__ inline Share share_of_padding(const DispatchCall& call) {
  const uint32_t warps = blockDim.x / 32, warp = uint32_t(warp_id());
  const uint32_t push_warps = call.push_warps < warps ? call.push_warps : 0;
  const uint32_t per_push_block = warps - push_warps,
                 of_push_blocks = call.push_blocks * per_push_block;
  const uint32_t total = of_push_blocks + (gridDim.x - call.push_blocks) * warps;
  if (blockIdx.x >= call.push_blocks)
    return {true,
            of_push_blocks + blockIdx.x - call.push_blocks + (gridDim.x - call.push_blocks) * warp,
            total};
  return {warp >= push_warps, blockIdx.x + call.push_blocks * (warp - push_warps), total};
}

// Role: rows between an expert's last token and its aligned end; grouped weight-gradient GEMMs read
// them. The warp's stages, all zeros, are the source.
__device__ inline void zero_padding(const Mesh& mesh, const DispatchCall& call,
                                    WarpMemory& own_memory, const Share& share) {
  const uint32_t zero_bytes = kStages * call.piece_bytes;
  uint8_t* zeros = own_memory.pipe.stages;
  for (uint32_t i = lane_id() * 16; i < zero_bytes; i += 512)
    *reinterpret_cast<uint4*>(zeros + i) = make_uint4(0, 0, 0, 0);
  fence_async_shared();  // the zeros before the bulk stores
  __syncwarp();

  const Plan& plan = mesh.workspace->plan;
  const PeerPlan& own = plan.peer[mesh.rank];
  const uint32_t tasks = uint32_t(mesh.experts_per_rank) * call.alignment;
  for (uint32_t task = share.first; task < tasks; task += share.step) {
    const uint32_t expert = task / call.alignment;
    const uint64_t row = call.tables.expert_offset[expert] + call.tables.rows_per_expert[expert] +
                         task % call.alignment;
    if (row >= call.tables.expert_offset[expert + 1]) continue;
    if (lane_id() == 0)
      for (uint32_t begin = 0; begin < call.row_bytes; begin += zero_bytes)
        bulk_store(own.rows + row * call.row_bytes + begin, zeros,
                   min(zero_bytes, call.row_bytes - begin));
    for (uint32_t i = lane_id(); i < call.num_scales; i += 32)
      own.scales[row * call.num_scales + i] = 0.0f;
    if (lane_id() == 0 && call.topk_idx != nullptr) plan.weights[row] = 0.0f;
  }
  bulk_commit();
  bulk_wait_read<0>();
  __syncwarp();  // the stages are free
}

// Role: rows that no token takes, behind the last one, when the output has a fixed number of rows.
__device__ inline void clear_tail(const Mesh& mesh, const DispatchCall& call) {
  const Plan& plan = mesh.workspace->plan;
  const uint64_t num_topk = call.layout == kRows ? uint64_t(mesh.num_topk) : 1;
  const uint64_t end = call.capacity * num_topk;
  uint64_t i = call.tables.num_rows[mesh.rank] * num_topk + blockIdx.x * blockDim.x + threadIdx.x;
  for (; i < end; i += gridDim.x * blockDim.x) {
    plan.weights[i] = 0.0f;
    if (call.layout == kRows) plan.topk_idx[i] = -1;
  }
}

// Without what belongs to other ranks; expert ids become local.
__device__ inline RecordEntry localize(const Mesh& mesh, RecordEntry entry) {
  if (entry.expert < 0 || entry.expert / mesh.experts_per_rank != mesh.rank) return {-1, -1, 0.0f};
  entry.expert -= mesh.rank * mesh.experts_per_rank;
  return entry;
}

// A lane's slot of one record; expert -1 where the lane has none on this rank.
__device__ inline RecordEntry local_entry(const Mesh& mesh, const uint8_t* record) {
  if (lane_id() >= mesh.num_topk) return {-1, -1, 0.0f};
  return localize(mesh, record_entries(record)[lane_id()]);
}

// Which record a lane of a ticket has: sources take turns, this rank first. kNoRecord: it has none.
// False: it has not come, and the Runtime is faulty.
__device__ inline bool wait_record(const Mesh& mesh, uint32_t ticket, bool is_used,
                                   uint32_t* source, uint32_t* index) {
  const uint32_t ranks = uint32_t(mesh.num_ranks), number = (ticket + uint32_t(lane_id())) / ranks;
  *source = (uint32_t(mesh.rank) + ticket + uint32_t(lane_id())) % ranks;
  const Plan& plan = mesh.workspace->plan;
  const PeerPlan& peer = plan.peer[*source];
  *index = kNoRecord;
  if (!is_used || number >= peer.num_from) return true;
  *index = peer.first_from + number;
  const uint32_t* flag = at<uint32_t>(mesh, mesh.rank, mesh.dispatch_arrived) +
                         uint64_t(*source) * mesh.max_tokens + number;
  return wait_arrived(mesh, flag, plan.epoch, kExpand, int(*source));
}

__device__ inline uint32_t num_tickets(const Mesh& mesh) {
  const Plan& plan = mesh.workspace->plan;
  const int lane = lane_id();
  return uint32_t(mesh.num_ranks) *
         __reduce_max_sync(0xffffffffu, lane < mesh.num_ranks ? plan.peer[lane].num_from : 0u);
}

// Role, layout "rows": the experts and weights of every record that comes, a record a lane. It also
// keeps the kernel alive until every row is here.
__device__ inline void list_experts(const Mesh& mesh, const DispatchCall& call) {
  const Plan& plan = mesh.workspace->plan;
  const uint8_t* records = call.records != nullptr ? call.records : plan.records;
  const uint32_t num_topk = uint32_t(mesh.num_topk), end = num_tickets(mesh);
  Tickets tickets(&mesh.workspace->next_expand, 32);
  for (uint32_t ticket = tickets.take(); ticket < end; ticket = tickets.take()) {
    uint32_t source, index;
    if (!__all_sync(0xffffffffu, wait_record(mesh, ticket, true, &source, &index))) return;
    if (call.topk_idx == nullptr) continue;
#pragma unroll 4
    for (uint32_t i = uint32_t(lane_id()); i < 32 * num_topk; i += 32) {
      const uint32_t record = __shfl_sync(0xffffffffu, index, int(i / num_topk)),
                     slot = i % num_topk;
      if (record == kNoRecord) continue;
      const uint8_t* from = records + uint64_t(record) * record_bytes(mesh.num_topk);
      const RecordEntry entry = localize(mesh, record_entries(from)[slot]);
      plan.topk_idx[uint64_t(record) * num_topk + slot] = entry.expert;
      plan.weights[uint64_t(record) * num_topk + slot] = entry.weight;
    }
  }
}

// One record that came: weights to the caller, the row to its other slots.
__device__ inline void expand_record(const Mesh& mesh, const DispatchCall& call, WarpMemory& own,
                                     bool is_own, const RecordEntry& entry) {
  const int lane = lane_id();
  const Plan& plan = mesh.workspace->plan;
  const bool is_here = entry.expert >= 0;
  if (call.topk_idx != nullptr && is_here) plan.weights[entry.row] = entry.weight;
  const uint32_t here = __ballot_sync(0xffffffffu, is_here);
  if (is_own || __popc(here) < 2) return;  // push wrote all slots of own rows
  const int first = __ffs(int(here)) - 1;
  const uint64_t from_row = uint64_t(__shfl_sync(0xffffffffu, entry.row, first));
  const bool is_target = is_here && lane != first;
  const PeerPlan& landing = plan.peer[mesh.rank];
  const uint64_t target =
      is_target ? reinterpret_cast<uint64_t>(landing.rows + uint64_t(entry.row) * call.row_bytes)
                : 0;
  NoTransform as_it_is;
  for (uint32_t begin = 0; begin < call.row_bytes; begin += call.piece_bytes) {
    own.pipe.make_room(as_it_is);
    own.pipe.put(landing.rows + from_row * call.row_bytes + begin,
                 min(call.piece_bytes, call.row_bytes - begin), is_target ? target + begin : 0);
  }
  for (uint32_t lanes = call.num_scales ? here & (here - 1) : 0; lanes != 0; lanes &= lanes - 1) {
    const uint64_t to = uint64_t(__shfl_sync(0xffffffffu, entry.row, __ffs(int(lanes)) - 1));
    for (uint32_t i = lane; i < call.num_scales; i += 32)
      landing.scales[to * call.num_scales + i] = landing.scales[from_row * call.num_scales + i];
  }
}

// Role, layout "grouped": every record that comes, in the order of the sources' tokens. It also
// keeps the kernel alive until every row is here.
__device__ inline void expand(const Mesh& mesh, const DispatchCall& call, WarpMemory& own) {
  const Plan& plan = mesh.workspace->plan;
  const uint8_t* records = call.records != nullptr ? call.records : plan.records;
  const uint32_t end = num_tickets(mesh);
  Tickets tickets(&mesh.workspace->next_expand, kExpandBatch);
  for (uint32_t ticket = tickets.take(); ticket < end; ticket = tickets.take()) {
    uint32_t source, index;
    const bool has_come = wait_record(mesh, ticket, lane_id() < kExpandBatch, &source, &index);
    if (!__all_sync(0xffffffffu, has_come)) break;
    fence_async_global();  // what the acquire made visible, before the bulk loads below
    __syncwarp();
    RecordEntry entries[kExpandBatch];
    uint32_t indices[kExpandBatch];
#pragma unroll
    for (int i = 0; i < kExpandBatch; ++i) {
      indices[i] = __shfl_sync(0xffffffffu, index, i);
      if (indices[i] != kNoRecord)
        entries[i] =
            local_entry(mesh, records + uint64_t(indices[i]) * record_bytes(mesh.num_topk));
    }
#pragma unroll
    for (int i = 0; i < kExpandBatch; ++i) {
      const bool is_own = int(__shfl_sync(0xffffffffu, source, i)) == mesh.rank;
      if (indices[i] != kNoRecord) expand_record(mesh, call, own, is_own, entries[i]);
    }
  }
  NoTransform as_it_is;
  own.pipe.drain(as_it_is);
}

}  // namespace commlib::cuda
