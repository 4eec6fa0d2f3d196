// Brings the experts' outputs home: reduce (one partial row per record, pushed to its source) and
// final_reduce (one sum per own token). Reduce waits for nobody, so every final_reduce is served.
#pragma once

#include "cuda/final_reduce.cuh"
#include "cuda/reduce.cuh"
#include "cuda/settle.cuh"

namespace commlib::cuda {

template <typename T>
__device__ void combine(const Mesh& mesh, const ExchangeCall& exchange, const CombineCall& call) {
  uint8_t* memory = dynamic_shared();
  if (!settle(mesh, exchange, reinterpret_cast<uint32_t*>(memory))) return fill_nan<T>(mesh, call);
  fence_async_shared();  // what settle() left in shared memory, before bulk copies overwrite it
  __syncthreads();
  WarpMemory own = carve_sums(call.piece_bytes, memory);
  if (uint32_t(warp_id()) >= call.final_warps) {
    if (call.weights != nullptr)
      reduce<Summer<T, true>>(mesh, call, own);
    else
      reduce<Summer<T, false>>(mesh, call, own);
  }
  final_reduce<T>(mesh, call, own);
}

}  // namespace commlib::cuda
