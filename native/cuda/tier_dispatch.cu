// Dispatch among several nodes: the roles of dispatch.cu, and blocks that serve the network first.
// Those wait for other nodes' blocks of the same kind, which wait for nobody else.
#include "cuda/expand.cuh"
#include "cuda/settle.cuh"
#include "cuda/tier_blocks.cuh"
#include "cuda/tier_dispatch.cuh"

namespace commlib::cuda {

extern "C" __global__ void __launch_bounds__(448, 1)
    tier_dispatch(const __grid_constant__ Mesh mesh, const __grid_constant__ ExchangeCall exchange,
                  const __grid_constant__ DispatchCall call,
                  const __grid_constant__ TierCall tier) {
  uint8_t* memory = dynamic_shared();
  if (!settle(mesh, exchange, reinterpret_cast<uint32_t*>(memory))) return;
  fence_async_shared();  // what settle() left in shared memory, before bulk copies overwrite it
  __syncthreads();
  WarpMemory own = carve_rows(call.piece_bytes, call.cast, memory);
  const TierBlocks blocks = tier_blocks(mesh, tier, call.tables.rank_counts);
  if (blockIdx.x < blocks.own)
    scale_out_send(mesh, call, tier, own, blockIdx.x, blocks.own);
  else if (blockIdx.x < blocks.own + blocks.others)
    forward(mesh, call, tier, own, blockIdx.x - blocks.own, blocks.others);
  push_share(mesh, call, own);
  const Share share = share_of_padding(call);
  if (call.layout == kGrouped && share.has_part) zero_padding(mesh, call, own, share);
  if (call.capacity != 0 && call.topk_idx != nullptr) clear_tail(mesh, call);
  if (call.layout == kGrouped)
    expand(mesh, call, own);
  else
    list_experts(mesh, call);
}

}  // namespace commlib::cuda
