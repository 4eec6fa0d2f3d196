// Dispatch in the latency regime, the receiver: from all ranks' counts to places, rows to their
// places.
#pragma once

#include "cuda/carrier.cuh"
#include "cuda/latency.cuh"

namespace commlib::cuda {

// Where the rows of this rank go, in shared memory.
struct Places {
  uint32_t* counts;  // [source][expert]
  uint32_t* first;   // [source][local expert] row
  uint32_t* offset;  // [local expert + 1]
  uint32_t* total;   // [local expert]
  uint32_t* masks;   // [source] bits of the tokens that come
  uint32_t is_void;  // refused or overflowed: nothing is there
};

__device__ inline uint32_t scan_warp(uint32_t value) {
  for (int delta = 1; delta < 32; delta *= 2) {
    const uint32_t below = __shfl_up_sync(0xffffffffu, value, delta);
    if (lane_id() >= delta) value += below;
  }
  return value;
}

// A warp per rank: its rows in all; of this rank also where each expert's start.
__device__ inline bool place_rank(const Mesh& mesh, const LatencyDispatchCall& call,
                                  const Places& places, int rank) {
  const int per_rank = mesh.experts_per_rank;
  uint32_t offset = 0;
  for (int j = lane_id(); j - lane_id() < per_rank; j += 32) {
    uint32_t total = 0;
    for (int source = 0; source < mesh.num_ranks && j < per_rank; ++source)
      total += places.counts[source * mesh.num_experts + rank * per_rank + j];
    const uint32_t aligned = (total + call.alignment - 1) / call.alignment * call.alignment;
    const uint32_t end = offset + scan_warp(aligned);
    if (rank == mesh.rank && j < per_rank) {
      places.offset[j] = end - aligned;
      places.total[j] = total;
      if (j == per_rank - 1) places.offset[per_rank] = end;
      uint32_t row = end - aligned;
      for (int source = 0; source < mesh.num_ranks; ++source) {
        places.first[source * per_rank + j] = row;
        row += places.counts[source * mesh.num_experts + rank * per_rank + j];
      }
    }
    offset = __shfl_sync(0xffffffffu, end, 31);
  }
  return offset > call.capacity;
}

// The host looks for refusals when it comes by. One block.
__device__ inline void keep_latency_refusal(const Mesh& mesh, const LatencyRegions& regions,
                                            const LatencyDispatchCall& call, uint64_t epoch) {
  // The rank that refused its own input has raised already.
  if (threadIdx.x != 0 || call.refused == nullptr || load_acquire(&call.refused->ticket) != 0)
    return;
  for (int source = 0; source < mesh.num_ranks; ++source) {
    const LatencyMessage* head = message(mesh, regions, mesh.rank, epoch, source);
    ExchangeHeader& header = call.refused->headers[source];
    header.status = head->status != kOk           ? head->status
                    : head->agreed != call.agreed ? kDisagree
                                                  : 0;
    header.text[0] = 0;
    header.bad_index = head->bad_index;
    header.bad_value = head->bad_value;
  }
  fence_system();
  store_release(&call.refused->ticket, call.ticket);  // partner: the host's look
}

// Waits for the counts of all ranks; false: the Runtime is faulty.
__device__ inline bool find_places(const Mesh& mesh, const LatencyRegions& regions,
                                   const LatencyDispatchCall& call, uint32_t* memory,
                                   uint64_t epoch, Places* places) {
  const int ranks = mesh.num_ranks, experts = mesh.num_experts, per_rank = mesh.experts_per_rank;
  const uint32_t words = mask_words(regions);
  *places = {memory,
             memory + ranks * experts,
             memory + ranks * experts + experts,
             memory + ranks * experts + experts + per_rank + 1,
             memory + ranks * experts + experts + 2 * per_rank + 1,
             0};
  if (!wait_lines(mesh, regions.message_epoch, epoch, kTakeIn)) return false;
  bool is_bad = false;
  for (int i = int(threadIdx.x); i < ranks * experts; i += int(blockDim.x)) {
    LatencyMessage* head = message(mesh, regions, mesh.rank, epoch, i / experts);
    places->counts[i] = message_mask(head)[words + i % experts];
  }
  for (int i = int(threadIdx.x); i < ranks * int(words); i += int(blockDim.x)) {
    LatencyMessage* head = message(mesh, regions, mesh.rank, epoch, i / int(words));
    places->masks[i] = message_mask(head)[i % int(words)];
  }
  if (int(threadIdx.x) < ranks) {
    const LatencyMessage* head = message(mesh, regions, mesh.rank, epoch, int(threadIdx.x));
    is_bad = head->status != kOk || head->agreed != call.agreed;
  }
  is_bad = __syncthreads_or(is_bad) != 0;
  bool is_over = false;
  for (int rank = warp_id(); rank < ranks; rank += int(blockDim.x / 32))
    is_over |= place_rank(mesh, call, *places, rank);
  is_over = __syncthreads_or(is_over) != 0;
  places->is_void = is_bad || is_over;
  if (blockIdx.x != 0) return true;
  if (is_bad) keep_latency_refusal(mesh, regions, call, epoch);
  if (threadIdx.x == 0) {
    *call.state = places->is_void;
    if (is_over && !is_bad) mesh.workspace->overflowed = 1;
  }
  for (int j = int(threadIdx.x); j <= per_rank; j += int(blockDim.x)) {
    call.expert_offset[j] = places->is_void ? 0 : places->offset[j];
    if (j < per_rank) call.rows_per_expert[j] = places->is_void ? 0 : places->total[j];
  }
  return true;
}

// The record of a token in the handle: rows of this rank only. Without a row nothing came.
__device__ inline void keep_record(const Mesh& mesh, const LatencyRegions& regions,
                                   const LatencyDispatchCall& call, int source, uint32_t token,
                                   const RecordEntry& entry) {
  uint8_t* kept =
      call.records + (uint64_t(source) * regions.max_tokens + token) * record_bytes(mesh.num_topk);
  if (lane_id() < mesh.num_topk) record_entries(kept)[lane_id()] = entry;
}

// One row that came: to all its places, its record to the handle.
__device__ inline void take_in_row(const Mesh& mesh, const LatencyRegions& regions,
                                   const LatencyDispatchCall& call, const Places& places,
                                   WarpMemory& own, uint64_t epoch, int source, uint32_t token) {
  const int lane = lane_id(), per_rank = mesh.experts_per_rank;
  const uint8_t* slot = row_slot(mesh, regions, mesh.rank, epoch, source, token);
  RecordEntry entry{-1, -1, 0.0f};
  if (lane < mesh.num_topk) entry = record_entries(slot + regions.record_offset)[lane];
  const int local = entry.expert - mesh.rank * per_rank;
  const bool is_here = entry.expert >= 0 && local >= 0 && local < per_rank;
  const uint32_t row = is_here ? places.first[source * per_rank + local] + uint32_t(entry.row) : 0;
  const uint8_t* to = call.rows + uint64_t(row) * call.row_bytes;
  NoTransform as_it_is;
  for (uint32_t begin = 0; begin < call.row_bytes; begin += call.piece_bytes) {
    own.pipe.make_room(as_it_is);
    own.pipe.put(slot + begin, min(call.piece_bytes, call.row_bytes - begin),
                 is_here ? reinterpret_cast<uint64_t>(to + begin) : 0);
  }
  const float* scales = reinterpret_cast<const float*>(slot + regions.scales_offset);
  for (uint32_t lanes = call.num_scales ? __ballot_sync(0xffffffffu, is_here) : 0; lanes != 0;
       lanes &= lanes - 1) {
    const uint64_t target = __shfl_sync(0xffffffffu, row, __ffs(int(lanes)) - 1);
    for (uint32_t i = lane; i < call.num_scales; i += 32)
      call.scales[target * call.num_scales + i] = scales[i];
  }
  if (is_here) call.weights[row] = entry.weight;
  keep_record(mesh, regions, call, source, token,
              RecordEntry{is_here ? entry.expert : -1, is_here ? int32_t(row) : -1, entry.weight});
}

// Role: every row that comes, a warp per row.
__device__ inline void take_in(const Mesh& mesh, const LatencyRegions& regions,
                               const LatencyDispatchCall& call, const Places& places,
                               WarpMemory& own, uint64_t epoch) {
  const uint32_t ranks = uint32_t(mesh.num_ranks);
  const uint32_t parts = (call.in_row_bytes + call.piece_bytes - 1) / call.piece_bytes;
  const Flags flags = row_flags(regions);
  for (PartTasks tasks(ranks * regions.max_tokens, 1); tasks.has_one(); tasks.next()) {
    const int source = int(tasks.row() % ranks);
    const uint32_t token = tasks.row() / ranks;
    const uint32_t mask = places.masks[uint32_t(source) * mask_words(regions) + token / 32];
    if ((mask >> token % 32 & 1) == 0) {
      keep_record(mesh, regions, call, source, token, RecordEntry{-1, -1, 0.0f});
      continue;
    }
    bool has_come = true;
    if (uint32_t(lane_id()) < parts)
      has_come = wait_part(mesh, flags, source, token * kMaxParts + uint32_t(lane_id()),
                           uint32_t(epoch), kTakeIn);
    if (!__all_sync(0xffffffffu, has_come)) break;
    fence_async_global();  // what the acquire made visible, before the bulk loads
    __syncwarp();
    take_in_row(mesh, regions, call, places, own, epoch, source, token);
  }
  NoTransform as_it_is;
  own.pipe.drain(as_it_is);
}

// Rows between an expert's last and its aligned end are zeros, weights behind the last row, too.
__device__ inline void clear_rest(const Mesh& mesh, const LatencyDispatchCall& call,
                                  const Places& places) {
  const uint32_t threads = gridDim.x * blockDim.x, first = blockIdx.x * blockDim.x + threadIdx.x;
  for (uint32_t row = places.offset[mesh.experts_per_rank] + first; row < call.capacity;
       row += threads)
    call.weights[row] = 0.0f;
  if (call.alignment == 1) return;
  const uint32_t tasks = uint32_t(mesh.experts_per_rank) * (call.alignment - 1);
  for (uint32_t task = blockIdx.x + gridDim.x * uint32_t(warp_id()); task < tasks;
       task += gridDim.x * (blockDim.x / 32)) {
    const uint32_t expert = task / (call.alignment - 1);
    const uint64_t row = places.offset[expert] + places.total[expert] + task % (call.alignment - 1);
    if (row >= places.offset[expert + 1]) continue;
    uint4* to = reinterpret_cast<uint4*>(call.rows + row * call.row_bytes);
    for (uint32_t i = lane_id(); i < call.row_bytes / 16; i += 32) to[i] = make_uint4(0, 0, 0, 0);
    for (uint32_t i = lane_id(); i < call.num_scales; i += 32)
      call.scales[row * call.num_scales + i] = 0.0f;
    if (lane_id() == 0) call.weights[row] = 0.0f;
  }
}

}  // namespace commlib::cuda
