// The gate: affinity, bias, group-limited top-k and normalised weights, a warp per token, experts
// in registers. What is chosen is what commlib/routing.py says: equal values go to the lower group
// and the lower expert, NaN counts as the largest value.
#include "cuda/params.cuh"

namespace commlib::cuda {

struct GateCall {
  const void* logits;              // [T, E] FP32 or BF16
  const float* bias;               // [E] or nullptr
  const int32_t* group_of_expert;  // [E]; read if groups are limited
  int64_t* topk_idx;               // [T, K]
  float* topk_weights;             // [T, K]
  float* scores;                   // [T, E] or nullptr
  uint32_t num_tokens, num_experts, num_topk;
  uint32_t num_groups, max_groups;  // max_groups 0: no limit
  uint32_t num_summed;              // best experts that count for a group
  uint32_t dtype;
  uint32_t is_softmax, normalize;
  float route_scale;
};

namespace {

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

// Lane l holds experts l, l + 32, ..., as keys: what is left of them, the best first.
template <int kPerLane>
struct Candidates {
  uint32_t left;   // bit i: expert i * 32 + lane may be taken
  uint32_t key;    // of the best; 0: none is left
  uint32_t place;  // its i

  __device__ __forceinline__ void find_best(const uint32_t (&keys)[kPerLane]) {
    key = 0, place = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const bool is_better = (left >> i & 1) != 0 && keys[i] > key;
      key = is_better ? keys[i] : key;
      place = is_better ? uint32_t(i) : place;
    }
  }
  // Takes the best of all lanes and gives its key; 0 if there is none. `expert` is its number.
  __device__ __forceinline__ uint32_t take(const uint32_t (&keys)[kPerLane], uint32_t* expert) {
    const uint32_t top = __reduce_max_sync(kAll, key);
    if (top == 0) return 0;
    const uint32_t mine = key == top ? place * 32 + uint32_t(lane_id()) : kNone;
    *expert = __reduce_min_sync(kAll, mine);
    if (mine == *expert) {
      left &= ~(1u << place);
      find_best(keys);
    }
    return top;
  }
};

template <int kPerLane>
__device__ __forceinline__ void load_scores(const GateCall& call, uint32_t token,
                                            float (&scores)[kPerLane]) {
  const uint64_t first = uint64_t(token) * call.num_experts;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const uint32_t expert = uint32_t(i) * 32 + uint32_t(lane_id());
    scores[i] = __int_as_float(0xff800000);  // -infinity: of an expert that is not there
    if (expert >= call.num_experts) continue;
    scores[i] = call.dtype == uint32_t(Dtype::kBf16)
                    ? __uint_as_float(
                          uint32_t(static_cast<const uint16_t*>(call.logits)[first + expert]) << 16)
                    : static_cast<const float*>(call.logits)[first + expert];
  }
  if (call.is_softmax == 0) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) scores[i] = __fdiv_rn(1.0f, 1.0f + expf(-scores[i]));
    return;
  }
  float top = scores[0], sum = 0.0f;
#pragma unroll
  for (int i = 1; i < kPerLane; ++i) top = fmaxf(top, scores[i]);
  for (int delta = 16; delta > 0; delta /= 2) top = fmaxf(top, __shfl_xor_sync(kAll, top, delta));
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) sum += scores[i] = expf(scores[i] - top);
  for (int delta = 16; delta > 0; delta /= 2) sum += __shfl_xor_sync(kAll, sum, delta);
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) scores[i] = __fdiv_rn(scores[i], sum);
}

// The experts of the groups whose best experts have the largest sums. Lane g holds group g.
template <int kPerLane>
__device__ __forceinline__ uint32_t experts_of_best_groups(const GateCall& call,
                                                           const uint32_t (&keys)[kPerLane]) {
  int32_t group[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const uint32_t expert = uint32_t(i) * 32 + uint32_t(lane_id());
    group[i] = expert < call.num_experts ? call.group_of_expert[expert] : -1;
  }
  float sum = 0.0f;
  for (int g = 0; g < int(call.num_groups); ++g) {
    Candidates<kPerLane> members;
    members.left = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) members.left |= uint32_t(group[i] == g) << i;
    members.find_best(keys);
    float total = 0.0f;
    for (uint32_t n = 0; n < call.num_summed; ++n) {
      uint32_t expert;
      const uint32_t top = members.take(keys, &expert);
      if (top == 0) break;
      total += value_of(top);
    }
    if (lane_id() == g) sum = total;
  }
  uint32_t key = lane_id() < int(call.num_groups) ? key_of(sum) : 0, chosen = 0;
  for (uint32_t n = 0; n < call.max_groups; ++n) {
    const uint32_t top = __reduce_max_sync(kAll, key);
    const uint32_t best = uint32_t(__ffs(int(__ballot_sync(kAll, key == top))) - 1);
    chosen |= 1u << best;
    if (uint32_t(lane_id()) == best) key = 0;
  }
  uint32_t allowed = 0;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i)
    allowed |= uint32_t(group[i] >= 0 && (chosen >> (group[i] & 31) & 1)) << i;
  return allowed;
}

template <int kPerLane>
__device__ __forceinline__ void route_token(const GateCall& call, uint32_t token,
                                            const float (&bias)[kPerLane]) {
  const int lane = lane_id();
  float scores[kPerLane];
  uint32_t keys[kPerLane];
  load_scores(call, token, scores);
  Candidates<kPerLane> candidates;
  candidates.left = 0;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const uint32_t expert = uint32_t(i) * 32 + uint32_t(lane);
    const bool is_there = expert < call.num_experts;
    keys[i] = key_of(call.bias == nullptr ? scores[i] : scores[i] + bias[i]);
    candidates.left |= uint32_t(is_there) << i;
    if (is_there && call.scores != nullptr)
      call.scores[uint64_t(token) * call.num_experts + expert] = scores[i];
  }
  if (call.max_groups != 0) candidates.left &= experts_of_best_groups(call, keys);
  candidates.find_best(keys);
  uint32_t own = kNone;  // the lane's choice: that of its number
  float weight = 0.0f;
  for (uint32_t k = 0; k < call.num_topk; ++k) {
    uint32_t expert;
    candidates.take(keys, &expert);
    if (uint32_t(lane) == k) own = expert;
  }
  // Each lane asks the one that holds its choice.
  const uint32_t wanted = uint32_t(lane) < call.num_topk ? own : 0;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const float score = __shfl_sync(kAll, scores[i], int(wanted % 32));
    if (wanted / 32 == uint32_t(i) && uint32_t(lane) < call.num_topk) weight = score;
  }
  if (call.normalize != 0) {
    float total = weight;
    for (int delta = 16; delta > 0; delta /= 2) total += __shfl_xor_sync(kAll, total, delta);
    weight = total == 0.0f ? __fdiv_rn(1.0f, float(call.num_topk)) : __fdiv_rn(weight, total);
  }
  if (uint32_t(lane) >= call.num_topk) return;
  const uint64_t at = uint64_t(token) * call.num_topk + uint32_t(lane);
  call.topk_idx[at] = int64_t(own);
  call.topk_weights[at] = weight * call.route_scale;
}

template <int kPerLane>
__device__ __forceinline__ void route(const GateCall& call) {
  float bias[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const uint32_t expert = uint32_t(i) * 32 + uint32_t(lane_id());
    bias[i] = call.bias != nullptr && expert < call.num_experts ? call.bias[expert] : 0.0f;
  }
  const uint32_t warps = blockDim.x / 32;
  for (uint32_t token = blockIdx.x * warps + threadIdx.x / 32; token < call.num_tokens;
       token += gridDim.x * warps)
    route_token(call, token, bias);
}

}  // namespace

extern "C" __global__ void __launch_bounds__(512, 2) gate_8(const __grid_constant__ GateCall call) {
  route<8>(call);
}
extern "C" __global__ void __launch_bounds__(512, 1)
    gate_16(const __grid_constant__ GateCall call) {
  route<16>(call);
}
extern "C" __global__ void __launch_bounds__(256, 1)
    gate_32(const __grid_constant__ GateCall call) {
  route<32>(call);
}

}  // namespace commlib::cuda
