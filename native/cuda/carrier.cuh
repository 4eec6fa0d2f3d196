// What a warp that moves rows has in shared memory, and the cast on the way.
#pragma once

#include "cuda/bulk.cuh"
#include "cuda/cast.cuh"

namespace commlib::cuda {

constexpr int kStages = 4;

using Pipe = RowPipe<kStages, 3, 32>;
using Tellers = Announcer<32, 2, 2, 8>;

struct WarpMemory {
  Pipe pipe;
  Tellers announcer;
  uint64_t* scale_targets;  // [stage][lane], casts only
  float* scales;            // [stage][scales of a piece], casts only
};

// Scales of a piece: at most one for 256 bytes.
__device__ inline uint32_t scale_area_bytes(uint32_t piece_bytes) {
  return uint32_t(align_up(piece_bytes / 64, 16));
}

// Shared memory: the same for every warp. commlib/cuda/launch.py computes the total.
__device__ inline WarpMemory carve_rows(uint32_t piece_bytes, uint32_t cast, uint8_t* memory) {
  constexpr uint32_t kTargets = kStages * 32 * 8;
  const uint32_t pipe_bytes = kStages * piece_bytes + uint32_t(align_up(Pipe::kTableBytes, 16));
  const uint32_t cast_bytes =
      cast == kNoCast ? 0 : kTargets + kStages * scale_area_bytes(piece_bytes);
  const uint32_t warp_bytes =
      uint32_t(align_up(pipe_bytes + Tellers::kBytes + cast_bytes, Pipe::kAlignment));
  const uint32_t given = dynamic_shared_bytes();
  if (blockDim.x / 32 * warp_bytes > given) __trap();
  uint8_t* mine = memory + uint32_t(warp_id()) * warp_bytes;
  WarpMemory own;
  own.pipe.init(mine, piece_bytes);
  own.announcer.init(mine + pipe_bytes);
  own.scale_targets = reinterpret_cast<uint64_t*>(mine + pipe_bytes + Tellers::kBytes);
  own.scales = reinterpret_cast<float*>(mine + pipe_bytes + Tellers::kBytes + kTargets);
  return own;
}

// Bytes that share a scale.
__device__ inline uint32_t scaled_bytes(uint32_t dtype) {
  return uint32_t(kScaleBlock) * (dtype == uint32_t(Dtype::kBf16) ? 2 : 4);
}

// Casts a loaded piece and sends its scales, as a bulk copy beside that of the piece where they are
// aligned to one. Without a cast it leaves everything as it is.
struct Caster {
  uint32_t cast, dtype, area_words;
  bool is_bulk;
  const WarpMemory& own;

  template <typename Call>
  __device__ Caster(const Call& call, const WarpMemory& memory)
      : cast(call.cast),
        dtype(call.dtype),
        area_words(scale_area_bytes(call.piece_bytes) / 4),
        is_bulk(call.num_scales % 4 == 0 && call.piece_bytes % (4 * scaled_bytes(call.dtype)) == 0),
        own(memory) {}

  __device__ uint32_t operator()(uint8_t* piece, uint32_t bytes, int stage) const {
    if (cast == kNoCast) return bytes;
    float* scales = own.scales + uint32_t(stage) * area_words;
    const uint32_t cast_bytes = cast_piece(piece, bytes, dtype, cast, scales);
    const uint32_t count = cast_bytes / uint32_t(kScaleBlock);
    const uint64_t mine = own.scale_targets[stage * 32 + lane_id()];
    uint32_t lanes = is_bulk ? 0 : __ballot_sync(0xffffffffu, mine != 0);
    for (; lanes != 0; lanes &= lanes - 1) {
      float* to = reinterpret_cast<float*>(__shfl_sync(0xffffffffu, mine, __ffs(int(lanes)) - 1));
      for (uint32_t i = lane_id(); i < count; i += 32) to[i] = scales[i];
    }
    fence_async_shared();  // the cast columns and scales before the bulk stores that read them
    __syncwarp();
    if (is_bulk && mine != 0) bulk_store(reinterpret_cast<void*>(mine), scales, count * 4);
    return cast_bytes;
  }
};

}  // namespace commlib::cuda
