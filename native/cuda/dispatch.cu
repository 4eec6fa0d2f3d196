// Carries every token to the ranks of its experts: push (own rows out), then, of rows that came,
// zero_padding and expand (to their other slots) or list_experts. Push waits for nobody, so every
// expand is served.
#include "cuda/expand.cuh"
#include "cuda/settle.cuh"

namespace commlib::cuda {

extern "C" __global__ void __launch_bounds__(448, 1)
    dispatch(const __grid_constant__ Mesh mesh, const __grid_constant__ ExchangeCall exchange,
             const __grid_constant__ DispatchCall call) {
  uint8_t* memory = dynamic_shared();
  if (!settle(mesh, exchange, reinterpret_cast<uint32_t*>(memory))) return;
  fence_async_shared();  // what settle() left in shared memory, before bulk copies overwrite it
  __syncthreads();
  WarpMemory own = carve_rows(call.piece_bytes, call.cast, memory);
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
