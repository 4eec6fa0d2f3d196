// Dispatch in the latency regime: parts of a row, and what a warp that moves them has in shared
// memory.
#pragma once

#include "cuda/cast.cuh"
#include "cuda/latency.cuh"
#include "cuda/packet.cuh"

namespace commlib::cuda {

// A part as it is given, and as it travels: columns, then their scales. A cast makes one byte of
// two.
struct RowPart {
  uint32_t in_begin, in_bytes;
  uint32_t out_begin, out_bytes;
  uint32_t first_scale, num_scales;

  __device__ RowPart(const LatencyDispatchCall& call, uint32_t number)
      : in_begin(number * call.piece_bytes),
        in_bytes(min(call.piece_bytes, call.in_row_bytes - in_begin)) {
    const bool is_cast = call.cast != kNoCast;
    out_begin = is_cast ? in_begin / 2 : in_begin;
    out_bytes = is_cast ? in_bytes / 2 : in_bytes;
    first_scale = out_begin / uint32_t(kScaleBlock);
    num_scales = is_cast ? out_bytes / uint32_t(kScaleBlock) : 0;
  }
  __device__ uint32_t packets() const { return packets_of(out_bytes + 4 * num_scales); }
};

__device__ inline uint32_t parts_of(const LatencyDispatchCall& call) {
  return (call.in_row_bytes + call.piece_bytes - 1) / call.piece_bytes;
}

// Two stages of a warp: of pieces on their way from the caller's rows, then of pieces on their way
// to the results.
struct PiecePipe {
  static constexpr uint32_t kStages = 2;  // _LATENCY_STAGES in commlib/cuda/launch.py

  uint8_t* stages;
  uint64_t* ready;  // [stage]
  uint32_t stage_bytes;
  uint32_t loaded = 0;
  uint32_t used = 0;

  __device__ void init(uint8_t* memory, uint64_t* barriers, uint32_t bytes) {
    stages = memory;
    ready = barriers;
    stage_bytes = bytes;
    if (lane_id() == 0)
      for (uint32_t s = 0; s < kStages; ++s) init_barrier(ready + s);
    fence_barrier_init();
    __syncwarp();
  }
  __device__ uint8_t* stage(uint32_t number) const {
    return stages + number % kStages * stage_bytes;
  }
  // At most kStages are loaded and not free.
  __device__ void load(const uint8_t* from, uint32_t bytes) {
    if (lane_id() == 0) bulk_load(stage(loaded), from, bytes, ready + loaded % kStages);
    ++loaded;
  }
  __device__ uint8_t* wait_oldest() const {
    wait_barrier(ready + used % kStages, used / kStages & 1);
    __syncwarp();  // the lanes read it together
    return stage(used);
  }
  __device__ void free_oldest() {
    fence_async_shared();  // the lanes' reads and casts before the next bulk load to the stage
    __syncwarp();
    ++used;
  }
  // Loads must not outlive the block.
  __device__ void abandon() {
    for (; used < loaded; ++used) wait_oldest();
  }
};

struct RowWarp {
  PiecePipe pipe;
  float* scales;  // of a piece
};

// Shared memory: the same for every warp. A stage holds a piece, and whole packets of one.
// commlib/cuda/launch.py computes the total.
__device__ inline RowWarp carve_rows(uint32_t piece_bytes, uint8_t* memory, uint32_t end) {
  const uint32_t stage_bytes = uint32_t(align_up(piece_bytes + 8, 128));
  const uint32_t scale_bytes = uint32_t(align_up(piece_bytes / 64, 16));
  const uint32_t stages = PiecePipe::kStages * stage_bytes;
  const uint32_t warp_bytes =
      uint32_t(align_up(stages + 8 * PiecePipe::kStages + scale_bytes, 128));
  if (blockDim.x / 32 * warp_bytes > end) __trap();
  uint8_t* mine = memory + uint32_t(warp_id()) * warp_bytes;
  RowWarp own;
  own.scales = reinterpret_cast<float*>(mine + stages);
  own.pipe.init(mine, reinterpret_cast<uint64_t*>(mine + stages + scale_bytes), stage_bytes);
  return own;
}

}  // namespace commlib::cuda
