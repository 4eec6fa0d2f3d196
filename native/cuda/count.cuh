// Counting the own tokens: per expert and per rank, and each slot's place among them.
#pragma once

#include "cuda/wait.cuh"

namespace commlib::cuda {

constexpr int kPrefetch = 8;  // tokens whose choices a warp loads ahead

// A rank whose host rejected the call publishes no counts.
__device__ inline bool has_counts(const ExchangeCall& call) {
  return call.call.kind == kDispatch && call.status == kOk;
}

__device__ inline void report(const Mesh& mesh, uint32_t index, Status status) {
  atomicMin(reinterpret_cast<unsigned long long*>(&mesh.workspace->input_error),
            static_cast<unsigned long long>(index) << 8 | status);
}

// One token: its slots get their place among the warp's tokens, in token order.
__device__ inline void count_token(const Mesh& mesh, const ExchangeCall& call,
                                   uint32_t* warp_counts, uint32_t token, int64_t expert,
                                   float weight) {
  const int lane = lane_id();
  const int num_topk = mesh.num_topk;
  const uint32_t index = token * uint32_t(num_topk) + uint32_t(lane);
  const bool is_slot = lane < num_topk && expert != -1;
  const bool is_valid = is_slot && expert >= 0 && expert < mesh.num_experts;
  const uint32_t same = __match_any_sync(0xffffffffu, is_valid ? int(expert) : -1 - lane);
  if (is_slot && !is_valid) report(mesh, index, kBadExpert);
  if (is_valid && __ffs(int(same)) - 1 != lane) report(mesh, index, kDuplicate);
  if (is_valid && !isfinite(weight)) report(mesh, index, kBadWeight);

  const int rank = is_valid ? int(expert) / mesh.experts_per_rank : -1 - lane;
  const int leader = __ffs(int(__match_any_sync(0xffffffffu, rank))) - 1;
  uint32_t in_expert = 0, in_rank = 0;
  if (is_valid) in_expert = warp_counts[expert]++;  // experts of a token differ
  if (is_valid && leader == lane) in_rank = warp_counts[mesh.num_experts + rank]++;
  in_rank = __shfl_sync(0xffffffffu, in_rank, leader);
  if (lane < num_topk) call.slots[index] = make_uint2(in_expert, in_rank);
  __syncwarp();
}

struct TokenRange {
  uint32_t begin, end;
};

__device__ inline TokenRange tokens_of_warp(const ExchangeCall& call) {
  const uint32_t warps = blockDim.x / 32;
  const uint32_t per_warp = (call.tokens_per_block + warps - 1) / warps;
  const uint32_t block_begin = blockIdx.x * call.tokens_per_block;
  const uint32_t block_end = min(block_begin + call.tokens_per_block, call.num_tokens);
  const uint32_t begin = block_begin + uint32_t(warp_id()) * per_warp;
  return {min(begin, block_end), min(begin + per_warp, block_end)};
}

// Role of every block: counts of its tokens, and each slot's place among them.
__device__ inline void count_tokens(const Mesh& mesh, const ExchangeCall& call, uint32_t* counts) {
  const int columns = mesh.num_experts + mesh.num_ranks;
  const int warps = int(blockDim.x / 32);
  for (int i = int(threadIdx.x); i < columns * warps; i += int(blockDim.x)) counts[i] = 0;
  __syncthreads();

  uint32_t* own = counts + warp_id() * columns;
  const TokenRange range = tokens_of_warp(call);
  const int lane = lane_id();
  for (uint32_t first = range.begin; first < range.end; first += kPrefetch) {
    int64_t experts[kPrefetch];
    float weights[kPrefetch];
#pragma unroll
    for (int i = 0; i < kPrefetch; ++i) {
      const bool is_there = first + i < range.end && lane < mesh.num_topk;
      const uint64_t index = uint64_t(first + i) * mesh.num_topk + lane;
      experts[i] = is_there ? call.topk_idx[index] : -1;
      weights[i] = is_there && call.topk_weights != nullptr ? call.topk_weights[index] : 1.0f;
    }
#pragma unroll
    for (int i = 0; i < kPrefetch; ++i)
      if (first + i < range.end) count_token(mesh, call, own, first + i, experts[i], weights[i]);
  }
  __syncthreads();

  // Counts of the warps below, in place, and of the whole block.
  for (int c = int(threadIdx.x); c < columns; c += int(blockDim.x)) {
    uint32_t sum = 0;
    for (int w = 0; w < warps; ++w) {
      const uint32_t count = counts[w * columns + c];
      counts[w * columns + c] = sum;
      sum += count;
    }
    call.block_base[blockIdx.x * columns + c] = sum;
  }
  __syncthreads();

  const uint32_t num_topk = uint32_t(mesh.num_topk);
  const uint32_t end = range.end * num_topk;
  for (uint32_t first = range.begin * num_topk + lane; first < end; first += 32 * kPrefetch) {
    int64_t experts[kPrefetch];
    uint2 slots[kPrefetch];
#pragma unroll
    for (int i = 0; i < kPrefetch; ++i) {
      experts[i] = -1;
      if (first + i * 32 < end)
        experts[i] = call.topk_idx[first + i * 32], slots[i] = call.slots[first + i * 32];
    }
#pragma unroll
    for (int i = 0; i < kPrefetch; ++i) {
      if (experts[i] < 0 || experts[i] >= mesh.num_experts) continue;
      slots[i].x += own[experts[i]];
      slots[i].y += own[mesh.num_experts + experts[i] / mesh.experts_per_rank];
      call.slots[first + i * 32] = slots[i];
    }
  }
}

}  // namespace commlib::cuda
