// Dispatch in the latency regime, the receiver: rows to their places.
#pragma once

#include "cuda/latency_places.cuh"
#include "cuda/latency_row.cuh"

namespace commlib::cuda {

// The record of a token in the handle: rows of this rank only. Without a row nothing came.
__device__ inline void keep_record(const Mesh& mesh, const LatencyRegions& regions,
                                   const LatencyDispatchCall& call, int source, uint32_t token,
                                   const RecordEntry& entry) {
  uint8_t* kept =
      call.records + (uint64_t(source) * regions.max_tokens + token) * record_bytes(mesh.num_topk);
  if (lane_id() < mesh.num_topk) record_entries(kept)[lane_id()] = entry;
}

// A part of a row that comes.
struct Arrival {
  bool is_one;  // false: there are no more
  int source;
  uint32_t token, part;
  int local;  // the lane's expert here, or -1
};

// Role: every row that comes, a warp per part. Its packets are loaded before anybody needs to know
// where they go, and while the part before is stored.
struct Intake {
  static constexpr uint32_t kTogether = 6;  // packets of a lane whose loads are under way together:
                                            // a part without a cast

  const Mesh& mesh;
  const LatencyRegions& regions;
  const LatencyDispatchCall& call;
  const Choices& choices;
  RowWarp& own;
  const uint64_t epoch;
  PartTasks tasks;
  const Divisor ranks;
  Arrival next{};
  uint32_t turn = 0;
  Packet packets[kTogether];

  __device__ Intake(const Mesh& of, const LatencyRegions& at_rank, const LatencyDispatchCall& what,
                    const Choices& chosen, RowWarp& memory, uint64_t number)
      : mesh(of),
        regions(at_rank),
        call(what),
        choices(chosen),
        own(memory),
        epoch(number),
        tasks(uint32_t(of.num_ranks) * at_rank.max_tokens, parts_of(what)),
        ranks(uint32_t(of.num_ranks)) {}

  __device__ const uint8_t* slot(const Arrival& of) const {
    return row_slot(mesh, regions, mesh.rank, epoch, of.source, of.token);
  }
  __device__ const Packet* packets_at(const Arrival& of) const {
    return reinterpret_cast<const Packet*>(slot(of) + of.part * call.part_bytes);
  }
  __device__ void load(const Packet* from, uint32_t first, uint32_t end) {
#pragma unroll
    for (uint32_t k = 0; k < kTogether; ++k)
      if (first + 32 * k < end)
        packets[k] = load_packet(from + min(first + 32 * k + lane_id(), end - 1));
  }
  // Of those that load() has loaded.
  __device__ bool have_come(uint32_t first, uint32_t end) const {
    bool has_come = true;
#pragma unroll
    for (uint32_t k = 0; k < kTogether; ++k)
      if (first + 32 * k < end) has_come = has_come && packets[k].epoch == uint32_t(epoch);
    return has_come;
  }

  // The next part that comes: its first packets are being loaded.
  __device__ void find() {
    next.is_one = false;
    for (; tasks.has_one() && !next.is_one; tasks.next()) {
      const uint32_t row = tasks.row(), token = ranks.divide(row);
      const int source = int(row - token * ranks.value);
      const int local = choices.local(mesh, source, token);
      next = {__any_sync(0xffffffffu, local >= 0) != 0, source, token, tasks.part(), local};
      if (!next.is_one && next.part == 0)
        keep_record(mesh, regions, call, source, token, RecordEntry{-1, -1, 0.0f});
    }
    if (next.is_one) load(packets_at(next), 0, RowPart(call, next.part).packets());
  }

  // Its packets to shared memory. False: the Runtime is faulty.
  __device__ bool gather(const Arrival& of, const RowPart& shape, uint32_t* to) {
    const uint32_t end = shape.packets();
    const Packet* from = packets_at(of);
#pragma unroll 1
    for (uint32_t first = 0; first < end; first += 32 * kTogether) {
      if (first != 0) load(from, first, end);
      if (!__all_sync(0xffffffffu, have_come(first, end))) {
        const bool has_come =
            wait_until(mesh, {kTakeIn, of.source, epoch, epoch}, [&](uint64_t* seen) {
              load(from, first, end);
              *seen = packets[0].epoch;
              return have_come(first, end);
            });
        if (!__all_sync(0xffffffffu, has_come)) return false;
      }
#pragma unroll
      for (uint32_t k = 0; k < kTogether; ++k) {
        if (first + 32 * k >= end) continue;
        uint32_t* words = to + 3 * min(first + 32 * k + lane_id(), end - 1);
#pragma unroll
        for (uint32_t i = 0; i < 3; ++i) words[i] = packets[k].words[i];
      }
    }
    return true;
  }

  // To all its places, its record to the handle. False: the Runtime is faulty.
  __device__ bool place(const Places& places) {
    const Arrival now = next;
    const RowPart shape(call, now.part);
    const bool is_here = now.local >= 0;
    uint8_t* stage = own.pipe.stage(turn++);
    bulk_wait_read<PiecePipe::kStages - 1>();
    __syncwarp();  // nobody reads the stage any more
    uint64_t weight = 0;
    const uint64_t* weights =
        reinterpret_cast<const uint64_t*>(slot(now) + regions.weights_offset) + lane_id();
    if (now.part == 0 && is_here) weight = commlib::load_relaxed(weights);
    if (!gather(now, shape, reinterpret_cast<uint32_t*>(stage))) return false;
    find();
    uint32_t row = 0;
    if (is_here)
      row = places.first_row(mesh, now.source, now.local) +
            choices.count_below(mesh, now.source, now.local, now.token);
    fence_async_shared();  // the packets before the bulk stores that read them
    __syncwarp();
    if (is_here)
      bulk_store(call.rows + uint64_t(row) * call.row_bytes + shape.out_begin, stage,
                 shape.out_bytes);
    bulk_commit();
    const float* scales = reinterpret_cast<const float*>(stage + shape.out_bytes);
    uint32_t lanes = shape.num_scales ? __ballot_sync(0xffffffffu, is_here) : 0;
    for (; lanes != 0; lanes &= lanes - 1) {
      const uint64_t target = __shfl_sync(0xffffffffu, row, __ffs(int(lanes)) - 1);
      for (uint32_t i = lane_id(); i < shape.num_scales; i += 32)
        call.scales[target * call.num_scales + shape.first_scale + i] = scales[i];
    }
    if (now.part != 0) return true;
    bool has_come = true;
    if (is_here && uint32_t(weight >> 32) != uint32_t(epoch))
      has_come = wait_word(mesh, weights, now.source, epoch, &weight);
    if (is_here) call.weights[row] = __uint_as_float(uint32_t(weight));
    keep_record(mesh, regions, call, now.source, now.token,
                RecordEntry{is_here ? mesh.rank * mesh.experts_per_rank + now.local : -1,
                            is_here ? int32_t(row) : -1, __uint_as_float(uint32_t(weight))});
    return __all_sync(0xffffffffu, has_come);
  }

  __device__ void finish(const Places& places) {
    while (next.is_one && place(places)) {
    }
    bulk_wait<0>();
  }
};

// Rows between an expert's last and its aligned end are zeros, weights behind the last row, too.
__device__ inline void clear_rest(const Mesh& mesh, const LatencyDispatchCall& call,
                                  const Places& places) {
  const uint32_t threads = gridDim.x * blockDim.x, first = blockIdx.x * blockDim.x + threadIdx.x;
  for (uint32_t row = places.start_of(mesh, mesh.experts_per_rank) + first; row < call.capacity;
       row += threads)
    call.weights[row] = 0.0f;
  if (call.alignment == 1) return;
  const uint32_t tasks = uint32_t(mesh.experts_per_rank) * (call.alignment - 1);
  for (uint32_t task = blockIdx.x + gridDim.x * uint32_t(warp_id()); task < tasks;
       task += gridDim.x * (blockDim.x / 32)) {
    const uint32_t expert = task / (call.alignment - 1);
    const uint64_t row =
        places.start_of(mesh, int(expert)) + places.total[expert] + task % (call.alignment - 1);
    if (row >= places.start_of(mesh, int(expert) + 1)) continue;
    uint4* to = reinterpret_cast<uint4*>(call.rows + row * call.row_bytes);
    for (uint32_t i = lane_id(); i < call.row_bytes / 16; i += 32) to[i] = make_uint4(0, 0, 0, 0);
    for (uint32_t i = lane_id(); i < call.num_scales; i += 32)
      call.scales[row * call.num_scales + i] = 0.0f;
    if (lane_id() == 0) call.weights[row] = 0.0f;
  }
}

}  // namespace commlib::cuda
