// Dispatch in the latency regime, the receiver: rows to their places.
#pragma once

#include "cuda/carrier.cuh"
#include "cuda/latency_places.cuh"

namespace commlib::cuda {

// The record of a token in the handle: rows of this rank only. Without a row nothing came.
__device__ inline void keep_record(const Mesh& mesh, const LatencyRegions& regions,
                                   const LatencyDispatchCall& call, int source, uint32_t token,
                                   const RecordEntry& entry) {
  uint8_t* kept =
      call.records + (uint64_t(source) * regions.max_tokens + token) * record_bytes(mesh.num_topk);
  if (lane_id() < mesh.num_topk) record_entries(kept)[lane_id()] = entry;
}

// Role: every row that comes, a warp per row. A row is loaded before anybody needs to know where it
// goes.
struct Intake {
  const Mesh& mesh;
  const LatencyRegions& regions;
  const LatencyDispatchCall& call;
  WarpMemory& own;
  const uint64_t epoch;
  PartTasks tasks;
  bool has_row = false;
  int source = 0;
  uint32_t token = 0;
  uint32_t begun = 0;   // bytes
  float scale[2] = {};  // the lane's first
  NoTransform as_it_is{};

  __device__ Intake(const Mesh& of, const LatencyRegions& at_rank, const LatencyDispatchCall& what,
                    WarpMemory& memory, uint64_t number)
      : mesh(of),
        regions(at_rank),
        call(what),
        own(memory),
        epoch(number),
        tasks(uint32_t(of.num_ranks) * at_rank.max_tokens, 1) {}

  __device__ const uint8_t* slot() const {
    return row_slot(mesh, regions, mesh.rank, epoch, source, token);
  }
  __device__ const float* scales() const {
    return reinterpret_cast<const float*>(slot() + regions.scales_offset);
  }

  // The next row that comes, as soon as it is there: its first pieces are being loaded.
  __device__ void begin(const Places& places) {
    has_row = false;
    for (; tasks.has_one(); tasks.next()) {
      source = int(tasks.row() % uint32_t(mesh.num_ranks));
      token = tasks.row() / uint32_t(mesh.num_ranks);
      if (places.comes(source, token)) break;
      keep_record(mesh, regions, call, source, token, RecordEntry{-1, -1, 0.0f});
    }
    if (!tasks.has_one() || !has_come()) return;
    tasks.next();
    has_row = true;
    fence_async_global();  // what the acquire made visible, before the bulk loads
    __syncwarp();
    for (begun = 0; begun < call.row_bytes && begun < Pipe::kMostAhead * call.piece_bytes;
         begun += call.piece_bytes) {
      own.pipe.make_room(as_it_is);
      own.pipe.put(slot() + begun, min(call.piece_bytes, call.row_bytes - begun), 0);
    }
    for (int i = 0; i < 2; ++i)
      if (lane_id() + 32 * i < int(call.num_scales)) scale[i] = scales()[lane_id() + 32 * i];
  }

  // Rows that are here leave before the warp waits for one that is not.
  __device__ bool has_come() {
    const uint32_t parts = (call.in_row_bytes + call.piece_bytes - 1) / call.piece_bytes;
    const uint32_t* flag =
        part_flag(mesh, row_flags(regions), source, token * kMaxParts + uint32_t(lane_id()));
    bool is_here = true;
    uint64_t seen;
    if (uint32_t(lane_id()) < parts) is_here = part_has_come(flag, uint32_t(epoch), &seen);
    if (__all_sync(0xffffffffu, is_here)) return true;
    while (own.pipe.stored < own.pipe.loaded) own.pipe.store_oldest(as_it_is);
    if (uint32_t(lane_id()) < parts)
      is_here = wait_part(mesh, flag, source, uint32_t(epoch), kTakeIn);
    return __all_sync(0xffffffffu, is_here);
  }

  // The lane's choice. False: the Runtime is faulty.
  __device__ bool read_record(RecordEntry* entry) const {
    const uint64_t* words = reinterpret_cast<const uint64_t*>(slot() + regions.record_offset) +
                            uint32_t(lane_id()) * kRecordWords;
    uint64_t found[kRecordWords] = {};
    bool has_come = true;
    if (lane_id() < mesh.num_topk) {
#pragma unroll
      for (uint32_t i = 0; i < kRecordWords; ++i) found[i] = commlib::load_relaxed(words + i);
#pragma unroll
      for (uint32_t i = 0; i < kRecordWords; ++i)
        if (uint32_t(found[i] >> 32) != uint32_t(epoch))
          has_come = has_come && wait_word(mesh, words + i, source, epoch, &found[i]);
      *entry =
          RecordEntry{int32_t(uint32_t(found[kExpertWord])), int32_t(uint32_t(found[kPlaceWord])),
                      __uint_as_float(uint32_t(found[kWeightWord]))};
    }
    return __all_sync(0xffffffffu, has_come);
  }

  // The row to all its places, its record to the handle. False: the Runtime is faulty.
  __device__ bool place(const Places& places) {
    const int lane = lane_id(), per_rank = mesh.experts_per_rank;
    RecordEntry entry{-1, -1, 0.0f};
    if (!read_record(&entry)) return false;
    const int local = entry.expert - mesh.rank * per_rank;
    const bool is_here = entry.expert >= 0 && local >= 0 && local < per_rank;
    const uint32_t row =
        is_here ? places.first[source * per_rank + local] + uint32_t(entry.row) : 0;
    const uint64_t to =
        is_here ? reinterpret_cast<uint64_t>(call.rows) + uint64_t(row) * call.row_bytes : 0;
    own.pipe.aim(to, (begun + call.piece_bytes - 1) / call.piece_bytes);
    for (; begun < call.row_bytes; begun += call.piece_bytes) {
      own.pipe.make_room(as_it_is);
      own.pipe.put(slot() + begun, min(call.piece_bytes, call.row_bytes - begun),
                   is_here ? to + begun : 0);
    }
    const uint32_t targets = call.num_scales ? __ballot_sync(0xffffffffu, is_here) : 0;
    for (uint32_t i = uint32_t(lane), turn = 0; i - uint32_t(lane) < call.num_scales;
         i += 32, ++turn) {
      const bool is_scale = i < call.num_scales;
      const float value = turn == 0 ? scale[0] : turn == 1 ? scale[1] : is_scale ? scales()[i] : 0;
      for (uint32_t lanes = targets; lanes != 0; lanes &= lanes - 1) {
        const uint64_t target = __shfl_sync(0xffffffffu, row, __ffs(int(lanes)) - 1);
        if (is_scale) call.scales[target * call.num_scales + i] = value;
      }
    }
    if (is_here) call.weights[row] = entry.weight;
    keep_record(
        mesh, regions, call, source, token,
        RecordEntry{is_here ? entry.expert : -1, is_here ? int32_t(row) : -1, entry.weight});
    return true;
  }

  __device__ void finish(const Places& places) {
    while (has_row && place(places)) begin(places);
    own.pipe.drain(as_it_is);
  }
};

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
