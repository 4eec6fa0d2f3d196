// What a warp that moves rows has in shared memory, and the cast on the way.
#pragma once

#include "cuda/bulk.cuh"
#include "cuda/cast.cuh"

namespace commlib::cuda {

constexpr int kStages = 4;

using Pipe = RowPipe<kStages, 32>;
using Tellers = Announcer<32, 2, 2, 8>;

struct WarpMemory {
  Pipe pipe;
  Tellers announcer;
  uint64_t* scale_targets;  // [stage][lane], casts only
  float* scales;            // [scales of a piece], casts only
};

// Shared memory: the same for every warp. commlib/cuda/launch.py computes the total.
__device__ inline WarpMemory carve_rows(uint32_t piece_bytes, uint32_t cast, uint8_t* memory) {
  constexpr uint32_t kTargets = kStages * 32 * 8;
  const uint32_t pipe_bytes = kStages * piece_bytes + uint32_t(align_up(Pipe::kTableBytes, 16));
  const uint32_t cast_bytes =
      cast == kNoCast ? 0 : kTargets + uint32_t(align_up(piece_bytes / 64, 16));
  const uint32_t warp_bytes =
      uint32_t(align_up(pipe_bytes + Tellers::kBytes + cast_bytes, Pipe::kAlignment));
  uint32_t given;
  asm("mov.u32 %0, %dynamic_smem_size;" : "=r"(given));
  if (blockDim.x / 32 * warp_bytes > given) __trap();
  uint8_t* mine = memory + uint32_t(warp_id()) * warp_bytes;
  WarpMemory own;
  own.pipe.init(mine, piece_bytes);
  own.announcer.init(mine + pipe_bytes);
  own.scale_targets = reinterpret_cast<uint64_t*>(mine + pipe_bytes + Tellers::kBytes);
  own.scales = reinterpret_cast<float*>(mine + pipe_bytes + Tellers::kBytes + kTargets);
  return own;
}

// Casts a loaded piece and sends its scales; without a cast it leaves everything as it is.
struct Caster {
  uint32_t cast, dtype;
  const WarpMemory& own;

  __device__ uint32_t operator()(uint8_t* piece, uint32_t bytes, int stage) const {
    if (cast == kNoCast) return bytes;
    const uint32_t cast_bytes = cast_piece(piece, bytes, dtype, cast, own.scales);
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

}  // namespace commlib::cuda
