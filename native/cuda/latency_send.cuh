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

// Every thread of the block: what all own tokens chose.
__device__ inline Choices gather_choices(const Mesh& mesh, const LatencyRegions& regions,
                                         const LatencyDispatchCall& call, uint32_t* memory) {
  constexpr uint32_t kTogether = 4;  // choices whose loads are under way together
  const Choices choices{memory + 2, reinterpret_cast<unsigned long long*>(memory),
                        mask_words(regions)};
  const uint32_t threads = blockDim.x, num_topk = uint32_t(mesh.num_topk);
  if (threadIdx.x == 0) *choices.error = call.status == kOk ? ~0ull : call.status;
  for (uint32_t i = threadIdx.x; i < uint32_t(mesh.num_experts) * choices.words; i += threads)
    choices.tokens[i] = 0;
  __syncthreads();
  const uint32_t end = call.num_tokens * num_topk;
  for (uint32_t first = threadIdx.x; first < end; first += threads * kTogether) {
    int64_t experts[kTogether];
    float weights[kTogether];
#pragma unroll
    for (uint32_t k = 0; k < kTogether; ++k) {
      const uint32_t i = first + k * threads;
      experts[k] = i < end ? call.topk_idx[i] : -1;
      weights[k] = i < end && call.topk_weights != nullptr ? call.topk_weights[i] : 1.0f;
    }
#pragma unroll
    for (uint32_t k = 0; k < kTogether; ++k) {
      const uint32_t i = first + k * threads, token = i / num_topk;
      const bool is_valid = experts[k] >= 0 && experts[k] < mesh.num_experts;
      if (blockIdx.x == 0 && i < end)
        call.owners[i] = is_valid ? int32_t(experts[k]) / mesh.experts_per_rank : -1;
      if (experts[k] == -1) continue;
      if (!is_valid) {
        refuse(choices, i, kBadExpert);
        continue;
      }
      uint32_t* word = choices.tokens + uint32_t(experts[k]) * choices.words + token / 32;
      if (atomicOr(word, 1u << token % 32) >> token % 32 & 1) refuse(choices, i, kDuplicate);
      if (!isfinite(weights[k])) refuse(choices, i, kBadWeight);
    }
  }
  __syncthreads();
  return choices;
}

// A block for each rank, all its threads: counts of all experts, and which tokens come.
__device__ inline void send_messages(const Mesh& mesh, const LatencyRegions& regions,
                                     const LatencyDispatchCall& call, const Choices& choices,
                                     uint64_t epoch) {
  for (int rank = int(blockIdx.x); rank < mesh.num_ranks; rank += int(gridDim.x)) {
    uint64_t* words = message(mesh, regions, rank, epoch, mesh.rank);
    for (uint32_t w = uint32_t(warp_id()); w < choices.words; w += blockDim.x / 32) {
      uint32_t bits = 0;
      for (int e = lane_id(); e < mesh.experts_per_rank; e += 32)
        bits |= choices.tokens[uint32_t(rank * mesh.experts_per_rank + e) * choices.words + w];
      bits = __reduce_or_sync(0xffffffffu, bits);
      if (lane_id() == 0) put_word(words + kHeadWords + w, epoch, bits);
    }
    for (int e = int(threadIdx.x); e < mesh.num_experts; e += int(blockDim.x))
      put_word(words + kHeadWords + choices.words + uint32_t(e), epoch, choices.count(e));
    if (threadIdx.x != blockDim.x - 1) continue;
    const unsigned long long error = *choices.error;
    const uint32_t status = error == ~0ull ? uint32_t(kOk) : uint32_t(error & 0xff);
    const uint32_t index = uint32_t(error >> 8);
    uint64_t value = 0;
    if (status == kBadWeight) value = __float_as_uint(call.topk_weights[index]);
    if (status == kBadExpert || status == kDuplicate) value = uint64_t(call.topk_idx[index]);
    put_word(words + kStatusWord, epoch, status);
    put_word(words + kAgreedWord, epoch, call.agreed);
    put_word(words + kBadIndexWord, epoch, index);
    put_word(words + kBadValueWord, epoch, uint32_t(value));
    put_word(words + kBadValueTopWord, epoch, uint32_t(value >> 32));
  }
}

// One part of an own row: where it goes, a lane per choice of its token.
struct SendTask {
  uint32_t token, part;
  int expert, rank;
  float weight;
  bool is_target;
  uint8_t* slot;  // of the lane's rank
};

__device__ inline SendTask make_task(const Mesh& mesh, const LatencyRegions& regions,
                                     const LatencyDispatchCall& call, const PartTasks& tasks,
                                     uint64_t epoch) {
  SendTask task{tasks.row(), tasks.part(), -1, -1, 1.0f, false, nullptr};
  const int lane = lane_id();
  const uint64_t choice = uint64_t(task.token) * mesh.num_topk + lane;
  if (lane < mesh.num_topk) task.expert = int(call.topk_idx[choice]);
  if (lane < mesh.num_topk && call.topk_weights != nullptr) task.weight = call.topk_weights[choice];
  const bool is_valid = task.expert >= 0 && task.expert < mesh.num_experts;  // else nothing goes
  task.rank = is_valid ? task.expert / mesh.experts_per_rank : -1 - lane;
  const uint32_t same = __match_any_sync(0xffffffffu, task.rank);
  task.is_target = is_valid && __ffs(int(same)) - 1 == lane;
  if (task.is_target) task.slot = row_slot(mesh, regions, task.rank, epoch, mesh.rank, task.token);
  return task;
}

// Starts to load it.
__device__ inline void load_part(const LatencyRegions& regions, const LatencyDispatchCall& call,
                                 WarpMemory& own, const SendTask& task) {
  const uint32_t begin = task.part * call.piece_bytes;
  const uint32_t to = begin / (call.in_row_bytes / call.row_bytes);
  if (call.cast != kNoCast) {
    const uint64_t scales = reinterpret_cast<uint64_t>(task.slot + regions.scales_offset);
    own.scale_targets[own.pipe.loaded % kStages * 32 + lane_id()] =
        task.is_target ? scales + to / kScaleBlock * 4 : 0;
  }
  own.pipe.put(call.x + uint64_t(task.token) * call.in_row_bytes + begin,
               min(call.piece_bytes, call.in_row_bytes - begin),
               task.is_target ? reinterpret_cast<uint64_t>(task.slot + to) : 0);
}

// To every rank that gets the token: where its rows lie there.
__device__ inline void send_record(const Mesh& mesh, const LatencyRegions& regions,
                                   const Choices& choices, const SendTask& task, uint64_t epoch) {
  const bool is_choice = lane_id() < mesh.num_topk;
  const bool is_valid = task.rank >= 0;
  const uint32_t place = is_valid ? choices.count_below(task.expert, task.token) : 0;
  const uint64_t slot = reinterpret_cast<uint64_t>(task.slot) + regions.record_offset;
  for (uint32_t lanes = __ballot_sync(0xffffffffu, task.is_target); lanes != 0;
       lanes &= lanes - 1) {
    const uint64_t there = __shfl_sync(0xffffffffu, slot, __ffs(int(lanes)) - 1);
    uint64_t* words = reinterpret_cast<uint64_t*>(there) + uint32_t(lane_id()) * kRecordWords;
    if (!is_choice) continue;
    put_word(words + kExpertWord, epoch, uint32_t(is_valid ? task.expert : -1));
    put_word(words + kPlaceWord, epoch, place);
    put_word(words + kWeightWord, epoch, __float_as_uint(is_valid ? task.weight : 0.0f));
  }
}

// The part is stored as soon as it is there; its arrival is told when a batch is complete.
__device__ inline void send_part(const Mesh& mesh, const LatencyRegions& regions, WarpMemory& own,
                                 const Caster& caster, const SendTask& task, uint64_t epoch) {
  own.pipe.store_oldest(caster);
  const int number = int(task.token * kMaxParts + task.part);
  own.announcer.add(task.is_target ? Tellers::place(task.rank, number) : Tellers::kNobody,
                    own.pipe.stored);
  own.announcer.tell(mesh, row_flags(regions), uint32_t(epoch), own.pipe);
}

// Role: the own rows to each rank that wants them, a warp per part. The first part has gone: before
// the choices of all tokens were known, since its own token's were.
__device__ inline void send_rows(const Mesh& mesh, const LatencyRegions& regions,
                                 const LatencyDispatchCall& call, const Choices& choices,
                                 WarpMemory& own, const Caster& caster, PartTasks tasks,
                                 SendTask task, uint64_t epoch) {
  while (tasks.has_one()) {
    tasks.next();
    SendTask next{};
    if (tasks.has_one()) {
      next = make_task(mesh, regions, call, tasks, epoch);
      load_part(regions, call, own, next);
    }
    if (task.part == 0) send_record(mesh, regions, choices, task, epoch);
    if (tasks.has_one()) send_part(mesh, regions, own, caster, next, epoch);
    task = next;
  }
  own.pipe.drain(caster);
  own.announcer.tell_all(mesh, row_flags(regions), uint32_t(epoch));
}

}  // namespace commlib::cuda
