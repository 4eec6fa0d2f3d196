// Combine among several nodes: the roles of combine_body.cuh, and blocks that serve the network first.
// Reduce waits for nobody, receive for other nodes' forward_reduce, which waits for reduce.
#pragma once

#include "cuda/settle.cuh"
#include "cuda/tier_blocks.cuh"
#include "cuda/tier_combine.cuh"
#include "cuda/tier_final_reduce.cuh"

namespace commlib::cuda {

template <typename T>
__device__ void combine(const Mesh& mesh, const ExchangeCall& exchange, const CombineCall& call,
                        const TierCall& tier) {
  uint8_t* memory = dynamic_shared();
  if (!settle(mesh, exchange, reinterpret_cast<uint32_t*>(memory))) return fill_nan<T>(mesh, call);
  fence_async_shared();  // what settle() left in shared memory, before bulk copies overwrite it
  __syncthreads();
  WarpMemory own = carve_sums(call.piece_bytes, memory);
  const uint32_t* rank_counts = exchange.tables.rank_counts;
  const TierBlocks blocks = tier_blocks(mesh, tier, rank_counts);
  if (blockIdx.x < blocks.own)
    receive(mesh, tier, own, blockIdx.x, blocks.own);
  else if (blockIdx.x < blocks.own + blocks.others)
    forward_reduce<T>(mesh, call, tier, rank_counts, own, blockIdx.x - blocks.own, blocks.others);
  if (uint32_t(warp_id()) >= call.final_warps) {
    if (call.weights != nullptr)
      reduce<Summer<T, true>>(mesh, call, own);
    else
      reduce<Summer<T, false>>(mesh, call, own);
  }
  tier_final_reduce<T>(mesh, call, tier, own, carve_aside<T>(memory));
}

}  // namespace commlib::cuda
