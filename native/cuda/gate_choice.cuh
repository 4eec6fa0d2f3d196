// Choosing by keys: numbers that order like the values. A warp holds the experts of one token, lane
// l those from l * kPerLane on; 0: none, or taken.
#pragma once

#include "cuda/params.cuh"

namespace commlib::cuda {

struct GateCall {
  const void* logits;              // [T, E] FP32 or BF16
  const float* bias;               // [E] or nullptr
  const int32_t* group_of_expert;  // [E]; read if groups are limited
  int64_t* topk_idx;               // [T, K]
  float* topk_weights;             // [T, K]
  float* scores;                   // [T, E]
  uint32_t num_tokens, num_experts, num_topk;
  uint32_t num_groups, max_groups;  // max_groups 0: no limit
  uint32_t num_summed;              // best experts that count for a group
  uint32_t lanes_per_group;  // groups lie on so many lanes each, a power of two; 0: they do not
  uint32_t dtype;
  uint32_t is_softmax, normalize;
  float route_scale;
};

constexpr uint32_t kAll = 0xffffffffu;
constexpr uint32_t kNone = 0xffffffffu;  // no expert

__device__ __forceinline__ int lane_id() { return int(threadIdx.x % 32); }

// Orders like the value; -0 like 0, NaN above all, nothing is 0.
__device__ __forceinline__ uint32_t key_of(float value) {
  const uint32_t bits = __float_as_uint(value + 0.0f);
  if (value != value) return 0xffffffffu;
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float value_of(uint32_t key) {
  if (key == 0xffffffffu) return __int_as_float(0x7fffffff);  // a NaN
  return __uint_as_float(key & 0x80000000u ? key ^ 0x80000000u : ~key);
}

// The best of the lane.
template <int kPerLane>
struct Best {
  uint32_t key;
  uint32_t place;  // of the lowest expert that has it

  __device__ __forceinline__ void find(const uint32_t (&keys)[kPerLane]) {
    key = 0, place = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const bool is_better = keys[i] > key;
      key = is_better ? keys[i] : key;
      place = is_better ? uint32_t(i) : place;
    }
  }
  // Takes the best of all lanes, of equal ones the lowest expert, and gives its key; 0: none is
  // left.
  __device__ __forceinline__ uint32_t take(uint32_t (&keys)[kPerLane], uint32_t* expert) {
    const uint32_t top = __reduce_max_sync(kAll, key);
    if (top == 0) return 0;
    const int from = __ffs(int(__ballot_sync(kAll, key == top))) - 1;
    *expert = __shfl_sync(kAll, uint32_t(lane_id()) * kPerLane + place, from);
    if (lane_id() == from) {
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) keys[i] = uint32_t(i) == place ? 0 : keys[i];
      find(keys);
    }
    return top;
  }
};

// Whether the lane's group, whose sum it holds as a key, is one of the best. `per_group` lanes hold
// the same group and sum.
__device__ __forceinline__ bool is_best_group(const GateCall& call, uint32_t key,
                                              uint32_t per_group) {
  bool is_chosen = false;
  for (uint32_t n = 0; n < call.max_groups; ++n) {
    const uint32_t top = __reduce_max_sync(kAll, key);
    const uint32_t best = uint32_t(__ffs(int(__ballot_sync(kAll, key == top))) - 1) / per_group;
    const bool is_mine = uint32_t(lane_id()) / per_group == best;
    is_chosen |= is_mine;
    key = is_mine ? 0 : key;
  }
  return is_chosen;
}

// Groups that lie on whole lanes, with one or two experts that count: all groups at once.
template <int kPerLane>
__device__ __forceinline__ void keep_groups_of_lanes(const GateCall& call,
                                                     uint32_t (&keys)[kPerLane]) {
  uint32_t first = 0, second = 0;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    second = max(second, min(first, keys[i]));
    first = max(first, keys[i]);
  }
  for (uint32_t delta = 1; delta < call.lanes_per_group; delta *= 2) {
    const uint32_t other = __shfl_xor_sync(kAll, first, delta);
    second = max(max(second, __shfl_xor_sync(kAll, second, delta)), min(first, other));
    first = max(first, other);
  }
  float sum = 0.0f + value_of(first);
  if (call.num_summed > 1 && second != 0) sum += value_of(second);
  const bool is_there = first != 0;
  if (is_best_group(call, is_there ? key_of(sum) : 0, call.lanes_per_group)) return;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) keys[i] = 0;
}

// Any groups: the best experts of one after the other. Lane g holds the sum of group g.
template <int kPerLane>
__device__ __forceinline__ void keep_groups(const GateCall& call, uint32_t (&keys)[kPerLane]) {
  int32_t group[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; ++i)
    group[i] = keys[i] != 0 ? call.group_of_expert[lane_id() * kPerLane + i] : -1;
  float sum = 0.0f;
  for (int g = 0; g < int(call.num_groups); ++g) {
    uint32_t members[kPerLane];
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) members[i] = group[i] == g ? keys[i] : 0;
    Best<kPerLane> best;
    best.find(members);
    float total = 0.0f;
    for (uint32_t n = 0; n < call.num_summed; ++n) {
      uint32_t expert;
      const uint32_t top = best.take(members, &expert);
      if (top == 0) break;
      total += value_of(top);
    }
    if (lane_id() == g) sum = total;
  }
  const bool is_group = lane_id() < int(call.num_groups);
  const uint32_t chosen = __ballot_sync(kAll, is_best_group(call, is_group ? key_of(sum) : 0, 1));
#pragma unroll
  for (int i = 0; i < kPerLane; ++i)
    if (group[i] >= 0 && (chosen >> (group[i] & 31) & 1) == 0) keys[i] = 0;
}

}  // namespace commlib::cuda
