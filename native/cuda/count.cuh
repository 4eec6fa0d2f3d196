// Counting the own tokens: per expert and per rank, and each slot's place among them.
#pragma once

#include "cuda/wait.cuh"

namespace commlib::cuda {

constexpr uint32_t kCountWords = 16;  // of 32 tokens each: what a block counts at once
constexpr int kSlots = 4;             // of a thread whose loads are under way together

// A rank whose host rejected the call publishes no counts.
__device__ inline bool has_counts(const ExchangeCall& call) {
  return call.call.kind == kDispatch && call.status == kOk;
}

__device__ inline void report(const Mesh& mesh, uint32_t index, Status status) {
  atomicMin(reinterpret_cast<unsigned long long*>(&mesh.workspace->input_error),
            static_cast<unsigned long long>(index) << 8 | status);
}

// Tokens that a block counts at once, as words of a bit per token, for every expert and every rank.
// commlib/cuda/launch.py knows the size of it.
struct TokenBits {
  uint32_t columns, words;
  uint32_t* base;    // [column] tokens before these
  uint32_t* bits;    // [word][column]
  uint32_t* before;  // [word][column] tokens before the word's

  __device__ TokenBits(const Mesh& mesh, const ExchangeCall& call, uint32_t* memory)
      : columns(uint32_t(mesh.num_experts + mesh.num_ranks)),
        words(min(kCountWords, (call.tokens_per_block + 31) / 32)),
        base(memory),
        bits(base + columns),
        before(bits + words * columns) {}

  // How many tokens with this column come before bit `token`.
  __device__ uint32_t place(uint32_t token, uint32_t column) const {
    const uint32_t at = token / 32 * columns + column;
    return before[at] + uint32_t(__popc(bits[at] & ((1u << token % 32) - 1)));
  }
};

// An expert that a token names twice: where it does for the second time.
__device__ inline void report_duplicate(const Mesh& mesh, const ExchangeCall& call, uint32_t index,
                                        int64_t expert) {
  const uint32_t first = index / uint32_t(mesh.num_topk) * uint32_t(mesh.num_topk);
  int seen = 0;
  for (uint32_t i = first; i < first + uint32_t(mesh.num_topk); ++i)
    if (call.topk_idx[i] == expert && ++seen == 2) report(mesh, i, kDuplicate);
}

// One slot: its token's bit for the expert and for the expert's rank.
__device__ inline void mark_slot(const Mesh& mesh, const ExchangeCall& call, const TokenBits& marks,
                                 uint32_t first, uint32_t slot, int64_t expert, float weight) {
  if (expert == -1) return;
  const uint32_t index = first + slot;
  if (expert < 0 || expert >= mesh.num_experts) return report(mesh, index, kBadExpert);
  if (!isfinite(weight)) report(mesh, index, kBadWeight);
  const uint32_t token = slot / uint32_t(mesh.num_topk), bit = 1u << token % 32;
  uint32_t* word = marks.bits + token / 32 * marks.columns;
  if ((atomicOr(word + expert, bit) & bit) != 0) report_duplicate(mesh, call, index, expert);
  atomicOr(word + mesh.num_experts + int(expert) / mesh.experts_per_rank, bit);
}

// Calls `act(slot, expert, weight)` for slots [0, end) from `first` on, one thread each.
template <typename Act>
__device__ inline void for_slots(const ExchangeCall& call, uint32_t first, uint32_t end, Act act) {
  for (uint32_t start = threadIdx.x; start < end; start += kSlots * blockDim.x) {
    int64_t experts[kSlots];
    float weights[kSlots];
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      const uint32_t slot = start + i * blockDim.x;
      experts[i] = slot < end ? call.topk_idx[first + slot] : -1;
      weights[i] =
          slot < end && call.topk_weights != nullptr ? call.topk_weights[first + slot] : 1.0f;
    }
#pragma unroll
    for (int i = 0; i < kSlots; ++i)
      if (start + i * blockDim.x < end) act(start + i * blockDim.x, experts[i], weights[i]);
  }
}

// Role of every block: counts of its tokens, and each slot's place among them, in token order.
__device__ inline void count_tokens(const Mesh& mesh, const ExchangeCall& call, uint32_t* memory) {
  const TokenBits marks(mesh, call, memory);
  const uint32_t num_topk = uint32_t(mesh.num_topk), thread = threadIdx.x, step = blockDim.x;
  for (uint32_t c = thread; c < marks.columns; c += step) marks.base[c] = 0;
  const uint32_t block_begin = blockIdx.x * call.tokens_per_block;
  const uint32_t block_end = min(block_begin + call.tokens_per_block, call.num_tokens);
  for (uint32_t begin = block_begin; begin < block_end; begin += 32 * marks.words) {
    const uint32_t end = min(32 * marks.words, block_end - begin) * num_topk;
    const uint32_t first = begin * num_topk;
    for (uint32_t i = thread; i < marks.words * marks.columns; i += step) marks.bits[i] = 0;
    __syncthreads();
    for_slots(call, first, end, [&](uint32_t slot, int64_t expert, float weight) {
      mark_slot(mesh, call, marks, first, slot, expert, weight);
    });
    __syncthreads();
    for (uint32_t c = thread; c < marks.columns; c += step) {
      uint32_t sum = marks.base[c];
      for (uint32_t at = c; at < marks.words * marks.columns; at += marks.columns) {
        marks.before[at] = sum;
        sum += uint32_t(__popc(marks.bits[at]));
      }
      marks.base[c] = sum;
    }
    __syncthreads();
    for_slots(call, first, end, [&](uint32_t slot, int64_t expert, float) {
      if (expert < 0 || expert >= mesh.num_experts) return;
      const uint32_t token = slot / num_topk;
      const int rank = int(expert) / mesh.experts_per_rank;
      call.slots[first + slot] = make_uint2(marks.place(token, uint32_t(expert)),
                                            marks.place(token, uint32_t(mesh.num_experts + rank)));
    });
    __syncthreads();
  }
  __syncthreads();
  for (uint32_t c = thread; c < marks.columns; c += step)
    call.block_base[blockIdx.x * marks.columns + c] = marks.base[c];
}

}  // namespace commlib::cuda
