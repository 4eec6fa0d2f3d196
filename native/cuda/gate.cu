// The gate: affinity, bias, group-limited top-k and normalised weights, a warp per token, experts
// in registers. What is chosen is what commlib/routing.py says: equal values go to the lower group
// and the lower expert, NaN counts as the largest value.
#include "cuda/gate_choice.cuh"

namespace commlib::cuda {

namespace {

// 8 experts at a time where rows are aligned to that.
template <int kPerLane>
__device__ __forceinline__ void load_logits(const GateCall& call, uint32_t token,
                                            float (&logits)[kPerLane]) {
  const uint32_t first = uint32_t(lane_id()) * kPerLane;
  const uint64_t at = uint64_t(token) * call.num_experts + first;
  const bool is_bf16 = call.dtype == uint32_t(Dtype::kBf16);
  const float* floats = static_cast<const float*>(call.logits) + at;
  const uint16_t* halves = static_cast<const uint16_t*>(call.logits) + at;
  const bool is_aligned =
      call.num_experts % 8 == 0 && reinterpret_cast<uint64_t>(call.logits) % 16 == 0;
#pragma unroll
  for (int i = 0; i < kPerLane; i += 8) {
    uint32_t words[8];
    if (is_aligned && first + i < call.num_experts) {
      const uint4 low = *reinterpret_cast<const uint4*>(
          is_bf16 ? static_cast<const void*>(halves + i) : floats + i);
      words[0] = low.x, words[1] = low.y, words[2] = low.z, words[3] = low.w;
      if (!is_bf16) {
        const uint4 high = *reinterpret_cast<const uint4*>(floats + i + 4);
        words[4] = high.x, words[5] = high.y, words[6] = high.z, words[7] = high.w;
      }
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const uint32_t half = j % 2 ? words[j / 2] & 0xffff0000u : words[j / 2] << 16;
        logits[i + j] = __uint_as_float(is_bf16 ? half : words[j]);
      }
      continue;
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      logits[i + j] = __int_as_float(0xff800000);  // -infinity: of an expert that is not there
      if (first + i + j >= call.num_experts) continue;
      logits[i + j] = is_bf16 ? __uint_as_float(uint32_t(halves[i + j]) << 16) : floats[i + j];
    }
  }
}

template <int kPerLane>
__device__ __forceinline__ void to_scores(const GateCall& call, float (&scores)[kPerLane]) {
  if (call.is_softmax == 0) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) scores[i] = __frcp_rn(1.0f + expf(-scores[i]));
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

// 4 experts at a time where rows are aligned to that: a lane's sectors are written in two steps,
// not in eight.
template <int kPerLane>
__device__ __forceinline__ void store_scores(const GateCall& call, uint32_t token,
                                             const float (&scores)[kPerLane]) {
  const uint32_t first = uint32_t(lane_id()) * kPerLane;
  float* to = call.scores + uint64_t(token) * call.num_experts + first;
#pragma unroll
  for (int i = 0; i < kPerLane; i += 4) {
    if (call.num_experts % 4 == 0) {
      if (first + i < call.num_experts)
        *reinterpret_cast<float4*>(to + i) =
            make_float4(scores[i], scores[i + 1], scores[i + 2], scores[i + 3]);
      continue;
    }
#pragma unroll
    for (int j = i; j < i + 4; ++j)
      if (first + j < call.num_experts) to[j] = scores[j];
  }
}

template <int kPerLane>
__device__ __forceinline__ void route_token(const GateCall& call, uint32_t token,
                                            const float (&bias)[kPerLane]) {
  const int lane = lane_id();
  float scores[kPerLane];
  uint32_t keys[kPerLane];
  load_logits(call, token, scores);
  to_scores(call, scores);
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const uint32_t expert = uint32_t(lane) * kPerLane + uint32_t(i);
    const bool is_there = expert < call.num_experts;
    keys[i] = is_there ? key_of(call.bias == nullptr ? scores[i] : scores[i] + bias[i]) : 0;
  }
  store_scores(call, token, scores);
  if (call.max_groups != 0 && call.lanes_per_group != 0)
    keep_groups_of_lanes(call, keys);
  else if (call.max_groups != 0)
    keep_groups(call, keys);
  Best<kPerLane> best;
  best.find(keys);
  uint32_t own = kNone;  // the lane's choice: that of its number
  for (uint32_t k = 0; k < call.num_topk; ++k) {
    uint32_t expert;
    best.take(keys, &expert);
    if (uint32_t(lane) == k) own = expert;
  }
  // Each lane asks the one that holds its choice.
  const uint32_t wanted = uint32_t(lane) < call.num_topk ? own : 0;
  float weight = 0.0f;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const float score = __shfl_sync(kAll, scores[i], int(wanted / kPerLane));
    if (wanted % kPerLane == uint32_t(i) && uint32_t(lane) < call.num_topk) weight = score;
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
    const uint32_t expert = uint32_t(lane_id()) * kPerLane + uint32_t(i);
    bias[i] = call.bias != nullptr && expert < call.num_experts ? call.bias[expert] : 0.0f;
  }
  const uint32_t warps = blockDim.x / 32;
  for (uint32_t token = blockIdx.x * warps + threadIdx.x / 32; token < call.num_tokens;
       token += gridDim.x * warps)
    route_token(call, token, bias);
}

}  // namespace

extern "C" __global__ void __launch_bounds__(1024, 1)
    gate_8(const __grid_constant__ GateCall call) {
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
