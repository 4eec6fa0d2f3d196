// Dispatch in the latency regime, the sender: own rows.
#pragma once

#include "cuda/latency_row.cuh"

namespace commlib::cuda {

// One part of an own row, a lane per choice of its token.
struct SendTask {
  uint32_t token, part;
  int64_t expert;
  float weight;
};

// Where it goes.
struct Targets {
  int rank;       // of the lane's expert, or negative
  bool is_first;  // of the lanes with that rank
  uint8_t* slot;  // there; first lanes only

  __device__ Targets(const Mesh& mesh, const LatencyRegions& regions, const SendTask& task,
                     uint64_t epoch)
      : slot(nullptr) {
    const bool is_valid = uint64_t(task.expert) < uint64_t(mesh.num_experts);  // else nothing goes
    rank = is_valid ? int(task.expert) / mesh.experts_per_rank : -1 - lane_id();
    const uint32_t same = __match_any_sync(0xffffffffu, rank);
    is_first = is_valid && __ffs(int(same)) - 1 == lane_id();
    if (is_first) slot = row_slot(mesh, regions, rank, epoch, mesh.rank, task.token);
  }
};

// Starts to load what a token chose: nothing here waits for it.
__device__ inline SendTask load_choices(const Mesh& mesh, const LatencyDispatchCall& call,
                                        const PartTasks& tasks) {
  SendTask task{tasks.row(), tasks.part(), -1, 1.0f};
  const uint32_t choice = task.token * uint32_t(mesh.num_topk) + uint32_t(lane_id());
  if (lane_id() >= mesh.num_topk) return task;
  task.expert = call.topk_idx[choice];
  if (call.topk_weights != nullptr) task.weight = call.topk_weights[choice];
  return task;
}

// Starts to load it.
__device__ inline void load_part(const LatencyDispatchCall& call, RowWarp& own,
                                 const PartTasks& tasks) {
  const RowPart part(call, tasks.part());
  own.pipe.load(call.x + uint64_t(tasks.row()) * call.in_row_bytes + part.in_begin, part.in_bytes);
}

// A loaded piece as packets to all ranks that get the token.
__device__ inline void send_packets(const LatencyDispatchCall& call, const RowPart& part,
                                    uint32_t number, const Targets& targets, const uint8_t* payload,
                                    uint64_t epoch) {
  constexpr uint32_t kTogether = 3;  // packets of a lane: a part of FP8 in one go
  const uint32_t* words = reinterpret_cast<const uint32_t*>(payload);
  const uint32_t firsts = __ballot_sync(0xffffffffu, targets.is_first), end = part.packets();
  const uint64_t to = reinterpret_cast<uint64_t>(targets.slot) + number * call.part_bytes;
#pragma unroll 1
  for (uint32_t first = lane_id(); first - lane_id() < end; first += 32 * kTogether) {
    Packet packets[kTogether];
#pragma unroll
    for (uint32_t k = 0; k < kTogether; ++k) {
      const uint32_t* from = words + 3 * min(first + 32 * k, end - 1);
      packets[k] = {{from[0], from[1], from[2]}, uint32_t(epoch)};
    }
    for (uint32_t lanes = firsts; lanes != 0; lanes &= lanes - 1) {
      Packet* there =
          reinterpret_cast<Packet*>(__shfl_sync(0xffffffffu, to, __ffs(int(lanes)) - 1));
#pragma unroll
      for (uint32_t k = 0; k < kTogether; ++k)
        if (first + 32 * k < end) store_packet(there + first + 32 * k, packets[k]);
    }
  }
}

// What goes once per row: its weights to every rank, where it went to the handle.
__device__ inline void send_weights(const Mesh& mesh, const LatencyRegions& regions,
                                    const LatencyDispatchCall& call, const SendTask& task,
                                    const Targets& targets, uint64_t epoch) {
  const uint64_t mine = reinterpret_cast<uint64_t>(targets.slot) + regions.weights_offset;
  for (uint32_t lanes = __ballot_sync(0xffffffffu, targets.is_first); lanes != 0;
       lanes &= lanes - 1) {
    const uint64_t there = __shfl_sync(0xffffffffu, mine, __ffs(int(lanes)) - 1);
    if (lane_id() < mesh.num_topk)
      put_word(reinterpret_cast<uint64_t*>(there) + lane_id(), epoch, __float_as_uint(task.weight));
  }
  if (lane_id() < mesh.num_topk)
    call.owners[uint64_t(task.token) * mesh.num_topk + lane_id()] = max(targets.rank, -1);
}

__device__ inline void send_part(const Mesh& mesh, const LatencyRegions& regions,
                                 const LatencyDispatchCall& call, RowWarp& own,
                                 const SendTask& task, uint64_t epoch) {
  const RowPart part(call, task.part);
  const Targets targets(mesh, regions, task, epoch);
  uint8_t* piece = own.pipe.wait_oldest();
  if (call.cast != kNoCast) {
    cast_piece(piece, part.in_bytes, call.dtype, call.cast, own.scales);
    // Behind the columns, where what they were cast from has been read.
    for (uint32_t i = lane_id(); i < part.num_scales; i += 32)
      reinterpret_cast<float*>(piece + part.out_bytes)[i] = own.scales[i];
    __syncwarp();
  }
  send_packets(call, part, task.part, targets, piece, epoch);
  if (task.part == 0) send_weights(mesh, regions, call, task, targets, epoch);
  own.pipe.free_oldest();
}

// Role: the own rows to each rank that wants them, a warp per part. The first part is being loaded.
__device__ inline void send_rows(const Mesh& mesh, const LatencyRegions& regions,
                                 const LatencyDispatchCall& call, RowWarp& own, PartTasks tasks,
                                 SendTask task, uint64_t epoch) {
#pragma unroll 1
  while (tasks.has_one()) {
    tasks.next();
    SendTask next{};
    if (tasks.has_one()) {
      load_part(call, own, tasks);
      next = load_choices(mesh, call, tasks);
    }
    send_part(mesh, regions, call, own, task, epoch);
    task = next;
  }
}

}  // namespace commlib::cuda
