// Carries every token to the ranks of its experts: push (own rows out), zero_padding and expand
// (rows that came, to their other slots). Push waits for nobody, so every expand is served.
#include "cuda/bulk.cuh"
#include "cuda/cast.cuh"
#include "layout/record.hpp"

namespace commlib::cuda {
namespace {

constexpr int kStages = 4;
constexpr int kExpandBatch = 4;  // records whose loads are under way together
constexpr uint32_t kNoRecord = ~0u;

using Pipe = RowPipe<kStages, 32>;
using Tellers = Announcer<32, 2, 2>;

struct WarpMemory {
  Pipe pipe;
  Tellers announcer;
  uint64_t* scale_targets;  // [stage][lane], casts only
  float* scales;            // [scales of a piece], casts only
};

// Shared memory: the same for every warp. commlib/cuda/launch.py computes the total.
__device__ WarpMemory carve(const DispatchCall& call, uint8_t* memory) {
  constexpr uint32_t kTargets = kStages * 32 * 8;
  const uint32_t pipe_bytes =
      kStages * call.piece_bytes + uint32_t(align_up(Pipe::kTableBytes, 16));
  const uint32_t cast_bytes =
      call.cast == kNoCast ? 0 : kTargets + uint32_t(align_up(call.piece_bytes / 64, 16));
  const uint32_t warp_bytes =
      uint32_t(align_up(pipe_bytes + Tellers::kBytes + cast_bytes, Pipe::kAlignment));
  uint32_t given;
  asm("mov.u32 %0, %dynamic_smem_size;" : "=r"(given));
  if (blockDim.x / 32 * warp_bytes > given) __trap();
  uint8_t* mine = memory + uint32_t(warp_id()) * warp_bytes;
  WarpMemory own;
  own.pipe.init(mine, call.piece_bytes);
  own.announcer.init(mine + pipe_bytes);
  own.scale_targets = reinterpret_cast<uint64_t*>(mine + pipe_bytes + Tellers::kBytes);
  own.scales = reinterpret_cast<float*>(mine + pipe_bytes + Tellers::kBytes + kTargets);
  return own;
}

__device__ Route make_route(const Mesh& mesh, const DispatchCall& call, uint32_t token) {
  Route route{-1, -1, -1, -1};
  const int lane = lane_id();
  if (lane >= mesh.num_topk || token >= call.num_tokens) return route;
  const uint64_t index = uint64_t(token) * mesh.num_topk + lane;
  if (call.topk_idx == nullptr) return call.routes[index];
  const int64_t expert = call.topk_idx[index];
  if (expert >= 0) {
    const uint2 slot = call.slots[index];
    const uint32_t* base =
        call.block_base + token / call.tokens_per_block * (mesh.num_experts + mesh.num_ranks);
    route.expert = int(expert);
    route.rank = route.expert / mesh.experts_per_rank;
    route.record = int(base[mesh.num_experts + route.rank] + slot.y);
    route.row = call.layout == kRows
                    ? int(mesh.workspace->plan.peer[route.rank].record_base) + route.record
                    : int(base[expert] + slot.x);
  }
  call.routes[index] = route;
  return route;
}

// The record goes to each rank once, from lanes in parallel: header, then 3 words per slot.
__device__ void write_records(const Mesh& mesh, const DispatchCall& call, uint32_t token,
                              const Route& route, uint32_t first_lanes) {
  const int lane = lane_id(), num_topk = mesh.num_topk;
  const Plan& plan = mesh.workspace->plan;
  float weight = 0.0f;
  if (route.rank >= 0)
    weight =
        call.topk_weights == nullptr ? 1.0f : call.topk_weights[uint64_t(token) * num_topk + lane];
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

// Casts a loaded piece and sends its scales; without a cast it leaves everything as it is.
struct Caster {
  const DispatchCall& call;
  const WarpMemory& own;

  __device__ uint32_t operator()(uint8_t* piece, uint32_t bytes, int stage) const {
    if (call.cast == kNoCast) return bytes;
    const uint32_t cast_bytes = cast_piece(piece, bytes, call.dtype, call.cast, own.scales);
    const uint32_t count = cast_bytes / uint32_t(kScaleBlock);
    const uint64_t mine = own.scale_targets[stage * 32 + lane_id()];
    for (uint32_t lanes = __ballot_sync(0xffffffffu, mine != 0); lanes != 0; lanes &= lanes - 1) {
      float* to = reinterpret_cast<float*>(__shfl_sync(0xffffffffu, mine, __ffs(int(lanes)) - 1));
      for (uint32_t i = lane_id(); i < count; i += 32) to[i] = own.scales[i];
    }
    fence_async_shared();  // the cast columns before the bulk store that reads them
    __syncwarp();
    return cast_bytes;
  }
};

// Role: each own row to each destination rank once, on the own rank to all its slots.
__device__ void push(const Mesh& mesh, const DispatchCall& call, WarpMemory& own) {
  const int lane = lane_id();
  const Plan& plan = mesh.workspace->plan;
  const uint32_t pieces = (call.in_row_bytes + call.piece_bytes - 1) / call.piece_bytes;
  const Caster caster{call, own};
  const uint32_t shrink = call.in_row_bytes / call.row_bytes;
  Tickets tickets(&mesh.workspace->next_push);
  uint32_t next_token = tickets.take();
  Route next_route = make_route(mesh, call, next_token);
  while (next_token < call.num_tokens) {
    const uint32_t token = next_token;
    const Route route = next_route;
    next_token = tickets.take();
    next_route = make_route(mesh, call, next_token);
    const uint32_t same = __match_any_sync(0xffffffffu, route.rank >= 0 ? route.rank : -1 - lane);
    const bool is_first = route.rank >= 0 && __ffs(int(same)) - 1 == lane;
    const uint32_t first_lanes = __ballot_sync(0xffffffffu, is_first);
    if (first_lanes == 0) continue;
    if (call.topk_idx != nullptr) write_records(mesh, call, token, route, first_lanes);

    const bool is_own_slot = route.rank == mesh.rank && call.layout == kGrouped;
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
    own.announcer.tell(mesh, mesh.dispatch_arrived, plan.epoch, own.pipe);
  }
  own.pipe.drain(caster);
  own.announcer.tell_all(mesh, mesh.dispatch_arrived, plan.epoch);
}

// Role: rows between an expert's last token and its aligned end; grouped weight-gradient GEMMs read
// them. Worker `first` of `warps`. The warp's stages, all zeros, are the source.
__device__ void zero_padding(const Mesh& mesh, const DispatchCall& call, WarpMemory& own_memory,
                             uint32_t first, uint32_t warps) {
  const uint32_t zero_bytes = kStages * call.piece_bytes;
  uint8_t* zeros = own_memory.pipe.stages;
  for (uint32_t i = lane_id() * 16; i < zero_bytes; i += 512)
    *reinterpret_cast<uint4*>(zeros + i) = make_uint4(0, 0, 0, 0);
  fence_async_shared();  // the zeros before the bulk stores
  __syncwarp();

  const Plan& plan = mesh.workspace->plan;
  const PeerPlan& own = plan.peer[mesh.rank];
  const uint32_t tasks = uint32_t(mesh.experts_per_rank) * call.alignment;
  for (uint32_t task = first; task < tasks; task += warps) {
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

// A lane's slot of one record; expert -1 where the lane has none on this rank.
__device__ RecordEntry local_entry(const Mesh& mesh, const uint8_t* record) {
  RecordEntry entry{-1, -1, 0.0f};
  if (lane_id() < mesh.num_topk) entry = record_entries(record)[lane_id()];
  const int per_rank = mesh.experts_per_rank;
  if (entry.expert < 0 || entry.expert / per_rank != mesh.rank) return {-1, -1, 0.0f};
  entry.expert -= mesh.rank * per_rank;
  return entry;
}

// One record that came: weights to the caller, the row to its other slots.
__device__ void expand_record(const Mesh& mesh, const DispatchCall& call, WarpMemory& own,
                              bool is_own, uint64_t index, const RecordEntry& entry) {
  const int lane = lane_id();
  const Plan& plan = mesh.workspace->plan;
  const bool is_fresh = call.topk_idx != nullptr;
  if (call.layout == kRows) {
    if (!is_fresh || lane >= mesh.num_topk) return;
    plan.topk_idx[index * mesh.num_topk + lane] = entry.expert;
    plan.weights[index * mesh.num_topk + lane] = entry.weight;
    return;
  }
  const bool is_here = entry.expert >= 0;
  if (is_fresh && is_here) plan.weights[entry.row] = entry.weight;
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

// Role: every record that comes, in the order of the sources' tokens, sources taking turns. It also
// keeps the kernel alive until every row is here.
__device__ void expand(const Mesh& mesh, const DispatchCall& call, WarpMemory& own) {
  const int lane = lane_id();
  const uint32_t ranks = uint32_t(mesh.num_ranks);
  const Plan& plan = mesh.workspace->plan;
  const uint8_t* records = call.records != nullptr ? call.records : plan.records;
  const uint32_t most =
      __reduce_max_sync(0xffffffffu, lane < mesh.num_ranks ? plan.peer[lane].num_from : 0u);
  Tickets tickets(&mesh.workspace->next_expand, kExpandBatch);
  for (uint32_t ticket = tickets.take(); ticket < most * ranks; ticket = tickets.take()) {
    uint32_t source = (uint32_t(mesh.rank) + ticket + uint32_t(lane)) % ranks;
    const uint32_t number = (ticket + uint32_t(lane)) / ranks;
    const bool is_there = lane < kExpandBatch && number < plan.peer[source].num_from;
    bool has_come = true;
    if (is_there)
      has_come = wait_arrived(mesh,
                              at<uint32_t>(mesh, mesh.rank, mesh.dispatch_arrived) +
                                  uint64_t(source) * mesh.max_tokens + number,
                              plan.epoch, kExpand, int(source));
    if (!__all_sync(0xffffffffu, has_come)) break;
    fence_async_global();  // what the acquire made visible, before the bulk loads below
    __syncwarp();
    uint32_t index = is_there ? plan.peer[source].first_from + number : kNoRecord;
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
      if (indices[i] != kNoRecord) expand_record(mesh, call, own, is_own, indices[i], entries[i]);
    }
  }
  NoTransform as_it_is;
  own.pipe.drain(as_it_is);
}

}  // namespace

extern "C" __global__ void __launch_bounds__(512, 1)
    dispatch(const __grid_constant__ Mesh mesh, const __grid_constant__ DispatchCall call) {
  extern __shared__ __align__(128) uint8_t memory[];
  if (mesh.workspace->plan.go == 0) return;
  WarpMemory own = carve(call, memory);
  // Every block does some of each role: what binds is how much one multiprocessor can store.
  const uint32_t warp = uint32_t(warp_id()), warps = blockDim.x / 32;
  if (warp < call.push_warps) push(mesh, call, own);
  const uint32_t skip = call.push_warps < warps ? call.push_warps : 0;
  if (call.layout == kGrouped && warp >= skip)
    zero_padding(mesh, call, own, blockIdx.x + gridDim.x * (warp - skip),
                 gridDim.x * (warps - skip));
  expand(mesh, call, own);
}

}  // namespace commlib::cuda
