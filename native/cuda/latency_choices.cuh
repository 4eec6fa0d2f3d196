// Dispatch in the latency regime: every rank tells every other what all its tokens chose, before it
// has looked at them as a whole. A message is a head and then eight choices a packet, 12 bits each.
#pragma once

#include "cuda/latency.cuh"
#include "cuda/packet.cuh"

namespace commlib::cuda {

constexpr uint32_t kTogetherChosen = 8;  // choices in a packet
constexpr uint32_t kNoChoice = 0xfff;
constexpr uint32_t kBadChoice = 0xffe;  // the first: the packet says what is wrong instead
constexpr unsigned long long kNoError = ~0ull;

// Of one rank, all its tokens' choices.
__device__ inline uint32_t choice_packets(const Mesh& mesh, const LatencyRegions& regions) {
  return (regions.max_tokens * uint32_t(mesh.num_topk) + kTogetherChosen - 1) / kTogetherChosen;
}

__device__ inline Packet* message(const Mesh& mesh, const LatencyRegions& regions, int rank,
                                  uint64_t epoch, int source) {
  const uint64_t index = (epoch & 1) * uint64_t(mesh.num_ranks) + uint64_t(source);
  return at<Packet>(mesh, rank, regions.messages + index * regions.message_bytes);
}

// ---- the sender

// Eight choices, or the first that is wrong.
__device__ inline Packet pack_choices(const Mesh& mesh, const LatencyDispatchCall& call,
                                      uint32_t first) {
  const uint32_t num_topk = uint32_t(mesh.num_topk), end = call.num_tokens * num_topk;
  int64_t experts[kTogetherChosen];
  float weights[kTogetherChosen];
#pragma unroll
  for (uint32_t k = 0; k < kTogetherChosen; ++k) {
    const bool is_there = first + k < end;
    experts[k] = is_there ? call.topk_idx[first + k] : -1;
    weights[k] = is_there && call.topk_weights != nullptr ? call.topk_weights[first + k] : 1.0f;
  }
  uint32_t codes[kTogetherChosen];
#pragma unroll
  for (uint32_t k = 0; k < kTogetherChosen; ++k) {
    const bool is_valid = uint64_t(experts[k]) < uint64_t(mesh.num_experts);
    codes[k] = is_valid ? uint32_t(experts[k]) : experts[k] == -1 ? kNoChoice : kBadChoice;
  }
  Packet bad{};
  bool is_bad = false;
  uint32_t slot = first % num_topk;
#pragma unroll
  for (uint32_t k = 0; k < kTogetherChosen; ++k) {
    // Earlier choices of the token, in this packet and before it.
    bool is_again = false;
#pragma unroll
    for (uint32_t j = 0; j < k; ++j) is_again |= codes[j] == codes[k] && k - j <= slot;
    const uint32_t before = codes[k] == kNoChoice || slot < k ? 0 : slot - k;
#pragma unroll 1
    for (uint32_t i = 1; i <= before; ++i) is_again |= call.topk_idx[first - i] == experts[k];
    const bool is_wrong = codes[k] == kBadChoice || is_again || !isfinite(weights[k]);
    if (is_wrong && codes[k] != kNoChoice && !is_bad) {
      is_bad = true;
      const Status status = codes[k] == kBadChoice ? kBadExpert
                            : is_again             ? kDuplicate
                                                   : kBadWeight;
      const uint64_t value =
          status == kBadWeight ? __float_as_uint(weights[k]) : uint64_t(experts[k]);
      bad = {{kBadChoice | status << 12 | k << 16, uint32_t(value), uint32_t(value >> 32)}, 0};
    }
    slot = slot + 1 == num_topk ? 0 : slot + 1;
  }
  if (is_bad) return bad;
  return {{codes[0] | codes[1] << 12 | codes[2] << 24,
           codes[2] >> 8 | codes[3] << 4 | codes[4] << 16 | codes[5] << 28,
           codes[5] >> 4 | codes[6] << 8 | codes[7] << 20},
          0};
}

// Role: the message, a warp for 32 packets, from the warp that has rows last. Packed before there
// is room, sent before any row: rows fill the way, and the receivers want to know their places.
// Every thread of the block; `wait_room` is called once. False: it said so.
template <typename Wait>
__device__ inline bool send_choices(const Mesh& mesh, const LatencyRegions& regions,
                                    const LatencyDispatchCall& call, uint64_t epoch,
                                    Wait wait_room) {
  const uint32_t end = 1 + choice_packets(mesh, regions), step = gridDim.x * blockDim.x;
  const uint32_t last = blockDim.x / 32 - 1 - uint32_t(warp_id());
  uint32_t number = (blockIdx.x + gridDim.x * last) * 32 + uint32_t(lane_id());
  bool has_room = false;
#pragma unroll 1
  do {
    Packet packet{};
    if (number == 0)
      packet = {{call.status, call.agreed, 0}, 0};
    else if (number < end)
      packet = pack_choices(mesh, call, (number - 1) * kTogetherChosen);
    packet.epoch = uint32_t(epoch);
    if (!has_room && !wait_room()) return false;
    has_room = true;
#pragma unroll 1
    for (int rank = 0; rank < mesh.num_ranks && number < end; ++rank)
      store_packet(message(mesh, regions, rank, epoch, mesh.rank) + number, packet);
    number += step;
  } while (number < end);
  return true;
}

// ---- the receiver

// What all ranks' tokens chose, in shared memory.
struct Choices {
  unsigned long long* errors;  // [source] index of the first bad choice and status, or kNoError
  uint16_t* experts;           // [source][token][slot], kNoChoice
  uint32_t* tokens;            // [source][word][local expert] bits
  uint32_t* totals;            // [expert] rows
  uint32_t* ends;              // [rank] rows, padding included
  uint32_t* bases;             // [32 local experts] where their rows begin
  uint32_t* rest;              // behind it
  uint32_t per_source;         // choices
  uint32_t words;              // of bits

  __device__ Choices(const Mesh& mesh, const LatencyRegions& regions, uint8_t* memory)
      : errors(reinterpret_cast<unsigned long long*>(memory)),
        per_source(choice_packets(mesh, regions) * kTogetherChosen),
        words((regions.max_tokens + 31) / 32) {
    const uint32_t ranks = uint32_t(mesh.num_ranks);
    experts = reinterpret_cast<uint16_t*>(memory + align_up(8 * ranks, 16));
    tokens = reinterpret_cast<uint32_t*>(experts + ranks * per_source);
    totals = tokens + ranks * words * uint32_t(mesh.experts_per_rank);
    ends = totals + mesh.num_experts;
    bases = ends + mesh.num_ranks;
    rest = bases + (mesh.experts_per_rank + 31) / 32;
  }

  // The lane's choice of a token as an expert of this rank, or -1.
  __device__ int local(const Mesh& mesh, int source, uint32_t token) const {
    const uint32_t first = uint32_t(source) * per_source + token * uint32_t(mesh.num_topk);
    const int expert =
        lane_id() < mesh.num_topk ? int(experts[first + uint32_t(lane_id())]) : int(kNoChoice);
    const int number = expert - mesh.rank * mesh.experts_per_rank;
    const bool is_here = expert < int(kBadChoice) && number >= 0 && number < mesh.experts_per_rank;
    return is_here ? number : -1;
  }
  __device__ const uint32_t* bits(const Mesh& mesh, int source, uint32_t word) const {
    return tokens + (uint32_t(source) * words + word) * uint32_t(mesh.experts_per_rank);
  }
  __device__ uint32_t count(const Mesh& mesh, int source, int local_expert) const {
    uint32_t sum = 0;
#pragma unroll 1
    for (uint32_t w = 0; w < words; ++w)
      sum += uint32_t(__popc(bits(mesh, source, w)[local_expert]));
    return sum;
  }
  // Tokens below `token` that chose the expert.
  __device__ uint32_t count_below(const Mesh& mesh, int source, int local_expert,
                                  uint32_t token) const {
    uint32_t sum = 0;
#pragma unroll 1
    for (uint32_t w = 0; w < token / 32; ++w)
      sum += uint32_t(__popc(bits(mesh, source, w)[local_expert]));
    const uint32_t last = bits(mesh, source, token / 32)[local_expert];
    return sum + uint32_t(__popc(last & ((1u << token % 32) - 1)));
  }
};

// Every thread of the block, before a barrier of it.
__device__ inline void clear_choices(const Mesh& mesh, const Choices& choices) {
  for (int i = int(threadIdx.x); i < mesh.num_ranks; i += int(blockDim.x))
    choices.errors[i] = kNoError;
  for (uint32_t* word = choices.tokens + threadIdx.x; word < choices.rest; word += blockDim.x)
    *word = 0;
}

__device__ inline void take_head(const LatencyDispatchCall& call, const Choices& choices,
                                 int source, const Packet& head) {
  if (head.words[0] != kOk)
    atomicMin(choices.errors + source, static_cast<unsigned long long>(head.words[0]));
  else if (head.words[1] != call.agreed)
    atomicMin(choices.errors + source, 0xffffffffull << 8 | kDisagree);
}

__device__ inline void take_choices(const Mesh& mesh, const Choices& choices, int source,
                                    uint32_t first, const Packet& packet) {
  const uint32_t (&w)[3] = packet.words;
  if ((w[0] & 0xfff) == kBadChoice) {
    const unsigned long long index = first + (w[0] >> 16);
    atomicMin(choices.errors + source, index << 8 | (w[0] >> 12 & 0xf));
    return;
  }
  const uint32_t experts[kTogetherChosen] = {
      w[0] & 0xfff,      w[0] >> 12 & 0xfff, (w[0] >> 24 | w[1] << 8) & 0xfff,
      w[1] >> 4 & 0xfff, w[1] >> 16 & 0xfff, (w[1] >> 28 | w[2] << 4) & 0xfff,
      w[2] >> 8 & 0xfff, w[2] >> 20};
  *reinterpret_cast<uint4*>(choices.experts + uint32_t(source) * choices.per_source + first) =
      make_uint4(experts[0] | experts[1] << 16, experts[2] | experts[3] << 16,
                 experts[4] | experts[5] << 16, experts[6] | experts[7] << 16);
  uint32_t token = first / uint32_t(mesh.num_topk), slot = first % uint32_t(mesh.num_topk);
#pragma unroll
  for (uint32_t k = 0; k < kTogetherChosen; ++k) {
    if (experts[k] != kNoChoice) {
      atomicAdd(choices.totals + experts[k], 1u);
      const int local = int(experts[k]) - mesh.rank * mesh.experts_per_rank;
      if (local >= 0 && local < mesh.experts_per_rank)
        atomicOr(const_cast<uint32_t*>(choices.bits(mesh, source, token / 32)) + local,
                 1u << token % 32);
    }
    if (++slot == uint32_t(mesh.num_topk)) {
      slot = 0;
      ++token;
    }
  }
}

// Every thread of the block: the messages of all ranks. False: the Runtime is faulty.
__device__ inline bool read_choices(const Mesh& mesh, const LatencyRegions& regions,
                                    const LatencyDispatchCall& call, const Choices& choices,
                                    uint64_t epoch) {
  const Divisor packets(1 + choice_packets(mesh, regions));
  const uint32_t end = uint32_t(mesh.num_ranks) * packets.value;
  bool has_come = true;
#pragma unroll 1
  for (uint32_t i = threadIdx.x; i < end && has_come; i += blockDim.x) {
    const uint32_t source = packets.divide(i), number = i - source * packets.value;
    Packet packet;
    has_come = wait_packet(mesh, message(mesh, regions, mesh.rank, epoch, int(source)) + number,
                           int(source), epoch, &packet);
    if (!has_come) break;
    if (number == 0)
      take_head(call, choices, int(source), packet);
    else
      take_choices(mesh, choices, int(source), (number - 1) * kTogetherChosen, packet);
  }
  return __syncthreads_and(has_come) != 0;
}

}  // namespace commlib::cuda
