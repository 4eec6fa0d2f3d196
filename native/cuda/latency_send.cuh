// Dispatch in the latency regime, the sender: own rows and the counts of all experts.
#pragma once

#include "cuda/carrier.cuh"
#include "cuda/latency.cuh"

namespace commlib::cuda {

// What the blocks find out about the own choices, in shared memory: which tokens chose which
// expert.
struct Choices {
  uint32_t* tokens;  // [expert][word] bits
  unsigned long long* error;
  uint32_t words;

  __device__ uint32_t count(int expert) const {
    uint32_t sum = 0;
    for (uint32_t w = 0; w < words; ++w) sum += uint32_t(__popc(tokens[expert * words + w]));
    return sum;
  }
  // Tokens below `token` that chose the expert.
  __device__ uint32_t count_below(int expert, uint32_t token) const {
    uint32_t sum = 0;
    for (uint32_t w = 0; w < token / 32; ++w) sum += uint32_t(__popc(tokens[expert * words + w]));
    const uint32_t last = tokens[expert * words + token / 32];
    return sum + uint32_t(__popc(last & ((1u << token % 32) - 1)));
  }
};

__device__ inline void refuse(const Choices& choices, uint32_t index, Status status) {
  atomicMin(choices.error, static_cast<unsigned long long>(index) << 8 | status);
}

__device__ inline Choices gather_choices(const Mesh& mesh, const LatencyRegions& regions,
                                         const LatencyDispatchCall& call, uint32_t* memory) {
  Choices choices{memory + 2, reinterpret_cast<unsigned long long*>(memory), mask_words(regions)};
  const uint32_t threads = blockDim.x;
  if (threadIdx.x == 0) *choices.error = call.status == kOk ? ~0ull : call.status;
  for (uint32_t i = threadIdx.x; i < uint32_t(mesh.num_experts) * choices.words; i += threads)
    choices.tokens[i] = 0;
  __syncthreads();
  for (uint32_t i = threadIdx.x; i < call.num_tokens * uint32_t(mesh.num_topk); i += threads) {
    const int64_t expert = call.topk_idx[i];
    const uint32_t token = i / uint32_t(mesh.num_topk);
    const bool is_valid = expert >= 0 && expert < mesh.num_experts;
    if (blockIdx.x == 0) call.owners[i] = is_valid ? int32_t(expert) / mesh.experts_per_rank : -1;
    if (expert == -1) continue;
    if (!is_valid) {
      refuse(choices, i, kBadExpert);
      continue;
    }
    uint32_t* word = choices.tokens + uint32_t(expert) * choices.words + token / 32;
    if (atomicOr(word, 1u << token % 32) >> token % 32 & 1) refuse(choices, i, kDuplicate);
    if (call.topk_weights != nullptr && !isfinite(call.topk_weights[i]))
      refuse(choices, i, kBadWeight);
  }
  __syncthreads();
  return choices;
}

// A block for each rank: counts of all experts, and which tokens come.
__device__ inline void send_messages(const Mesh& mesh, const LatencyRegions& regions,
                                     const LatencyDispatchCall& call, const Choices& choices,
                                     uint64_t epoch) {
  const unsigned long long error = *choices.error;
  const uint32_t index = uint32_t(error >> 8);
  for (int rank = int(blockIdx.x); rank < mesh.num_ranks; rank += int(gridDim.x)) {
    LatencyMessage* head = message(mesh, regions, rank, epoch, mesh.rank);
    if (threadIdx.x == 0) {
      const uint32_t status = error == ~0ull ? uint32_t(kOk) : uint32_t(error & 0xff);
      int64_t value = 0;
      if (status == kBadWeight) value = int64_t(__float_as_uint(call.topk_weights[index]));
      if (status == kBadExpert || status == kDuplicate) value = call.topk_idx[index];
      *head = LatencyMessage{status, index, value, call.agreed, call.num_tokens};
    }
    uint32_t* mask = message_mask(head);
    for (uint32_t w = threadIdx.x; w < choices.words; w += blockDim.x) {
      uint32_t bits = 0;
      for (int e = rank * mesh.experts_per_rank; e < (rank + 1) * mesh.experts_per_rank; ++e)
        bits |= choices.tokens[uint32_t(e) * choices.words + w];
      mask[w] = bits;
    }
    for (int e = int(threadIdx.x); e < mesh.num_experts; e += int(blockDim.x))
      mask[choices.words + e] = choices.count(e);
    __syncthreads();
    if (threadIdx.x == 0) tell_line(mesh, regions.message_epoch, rank, epoch);
  }
}

__device__ inline void send_record(const Mesh& mesh, const LatencyDispatchCall& call,
                                   uint32_t token, int expert, uint32_t place, uint8_t* record,
                                   uint32_t epoch) {
  const int lane = lane_id();
  const uint32_t header[4] = {uint32_t(mesh.rank), token, uint32_t(mesh.num_topk), epoch};
  if (lane < 4)
    reinterpret_cast<uint32_t*>(record)[lane] = lane == 0   ? header[0]
                                                : lane == 1 ? header[1]
                                                : lane == 2 ? header[2]
                                                            : header[3];
  if (lane >= mesh.num_topk) return;
  const uint64_t index = uint64_t(token) * mesh.num_topk + lane;
  const float weight = expert < 0                     ? 0.0f
                       : call.topk_weights == nullptr ? 1.0f
                                                      : call.topk_weights[index];
  record_entries(record)[lane] = RecordEntry{expert, int32_t(place), weight};
}

// Role: each own row to each rank that wants it, a warp per token.
__device__ inline void send_rows(const Mesh& mesh, const LatencyRegions& regions,
                                 const LatencyDispatchCall& call, const Choices& choices,
                                 WarpMemory& own, uint64_t epoch) {
  const int lane = lane_id();
  const Caster caster{call.cast, call.dtype, own};
  const uint32_t shrink = call.in_row_bytes / call.row_bytes;
  const uint32_t step = gridDim.x * (blockDim.x / 32);
  for (uint32_t token = blockIdx.x + gridDim.x * uint32_t(warp_id()); token < call.num_tokens;
       token += step) {
    int expert = -1;
    if (lane < mesh.num_topk) expert = int(call.topk_idx[uint64_t(token) * mesh.num_topk + lane]);
    const int rank = expert < 0 ? -1 - lane : expert / mesh.experts_per_rank;
    const uint32_t same = __match_any_sync(0xffffffffu, rank);
    const bool is_target = expert >= 0 && __ffs(int(same)) - 1 == lane;
    uint8_t* slot = is_target ? row_slot(mesh, regions, rank, epoch, mesh.rank, token) : nullptr;
    for (uint32_t begin = 0; begin < call.in_row_bytes; begin += call.piece_bytes) {
      own.pipe.make_room(caster);
      const uint32_t to = begin / shrink;
      if (call.cast != kNoCast)
        own.scale_targets[own.pipe.loaded % kStages * 32 + lane] =
            is_target
                ? reinterpret_cast<uint64_t>(slot + regions.scales_offset) + to / kScaleBlock * 4
                : 0;
      own.pipe.put(call.x + uint64_t(token) * call.in_row_bytes + begin,
                   min(call.piece_bytes, call.in_row_bytes - begin),
                   is_target ? reinterpret_cast<uint64_t>(slot + to) : 0);
    }
    const uint32_t place = expert < 0 ? 0 : choices.count_below(expert, token);
    for (uint32_t lanes = __ballot_sync(0xffffffffu, is_target); lanes != 0; lanes &= lanes - 1) {
      const uint64_t there =
          __shfl_sync(0xffffffffu, reinterpret_cast<uint64_t>(slot), __ffs(int(lanes)) - 1);
      send_record(mesh, call, token, expert, place,
                  reinterpret_cast<uint8_t*>(there) + regions.record_offset, uint32_t(epoch));
    }
    own.pipe.drain(caster);
    tell_row(mesh, regions.row_epoch, regions, is_target, rank, token, uint32_t(epoch));
    __syncwarp();
  }
}

}  // namespace commlib::cuda
