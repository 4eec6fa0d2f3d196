// What a rank sends, counted: tokens per expert and per rank, and which ranks each token goes to.
#include "cuda/params.cuh"

namespace commlib::cuda {

struct LayoutCall {
  const int64_t* topk_idx;      // [T, K], -1: none
  uint32_t* tokens_per_rank;    // [R] zeros
  uint32_t* tokens_per_expert;  // [E] zeros
  uint8_t* is_token_in_rank;    // [T, R]
  uint32_t num_tokens, num_topk;
  uint32_t num_experts, num_ranks;  // at most 64 ranks
};

extern "C" __global__ void __launch_bounds__(256)
    dispatch_layout(const __grid_constant__ LayoutCall call) {
  extern __shared__ uint32_t counts[];  // by expert, then by rank
  const uint32_t experts = call.num_experts, ranks = call.num_ranks;
  for (uint32_t i = threadIdx.x; i < experts + ranks; i += blockDim.x) counts[i] = 0;
  __syncthreads();
  const uint32_t per_rank = experts / ranks;
  for (uint32_t token = blockIdx.x * blockDim.x + threadIdx.x; token < call.num_tokens;
       token += gridDim.x * blockDim.x) {
    uint64_t wanted = 0;
    for (uint32_t k = 0; k < call.num_topk; ++k) {
      const int64_t expert = call.topk_idx[uint64_t(token) * call.num_topk + k];
      if (expert < 0 || expert >= int64_t(experts)) continue;
      atomicAdd(&counts[expert], 1u);
      wanted |= uint64_t(1) << (uint32_t(expert) / per_rank);
    }
    for (uint32_t rank = 0; rank < ranks; ++rank) {
      const bool is_wanted = (wanted >> rank & 1) != 0;
      call.is_token_in_rank[uint64_t(token) * ranks + rank] = is_wanted;
      if (is_wanted) atomicAdd(&counts[experts + rank], 1u);
    }
  }
  __syncthreads();
  for (uint32_t i = threadIdx.x; i < experts + ranks; i += blockDim.x) {
    if (counts[i] == 0) continue;
    uint32_t* total =
        i < experts ? call.tokens_per_expert + i : call.tokens_per_rank + (i - experts);
    atomicAdd(total, counts[i]);
  }
}

}  // namespace commlib::cuda
