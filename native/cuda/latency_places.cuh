// Dispatch in the latency regime, the receiver: from all ranks' messages to places.
#pragma once

#include "cuda/latency.cuh"

namespace commlib::cuda {

// Where the rows of this rank go, in shared memory.
struct Places {
  uint32_t* messages;             // [source][word]
  uint32_t* first;                // [source][local expert] row
  uint32_t* offset;               // [local expert + 1]
  uint32_t* total;                // [local expert]
  uint32_t* ends;                 // [rank][32 experts]
  uint32_t words, masks, counts;  // of a message; its masks and counts begin with these
  bool is_bad;                    // some rank has refused its input, or ranks disagree
  bool is_void;                   // that, or more rows than there is room for: nothing is there

  __device__ uint32_t word(int source, uint32_t i) const {
    return messages[uint32_t(source) * words + i];
  }
  __device__ uint32_t count(int source, int expert) const {
    return word(source, counts + uint32_t(expert));
  }
  __device__ bool comes(int source, uint32_t token) const {
    return word(source, masks + token / 32) >> token % 32 & 1;
  }
};

__device__ inline uint32_t scan_warp(uint32_t value) {
  for (int delta = 1; delta < 32; delta *= 2) {
    const uint32_t below = __shfl_up_sync(0xffffffffu, value, delta);
    if (lane_id() >= delta) value += below;
  }
  return value;
}

// 32 experts of one rank: where each ends, counted from the first of them.
struct Stretch {
  int rank, expert;  // expert: the lane's, of that rank
  uint32_t total, aligned, end;

  __device__ Stretch(const Mesh& mesh, const LatencyDispatchCall& call, const Places& places,
                     int number)
      : rank(number / per_rank(mesh)), expert(number % per_rank(mesh) * 32 + lane_id()), total(0) {
    for (int source = 0; source < mesh.num_ranks && is_there(mesh); ++source)
      total += places.count(source, rank * mesh.experts_per_rank + expert);
    aligned = (total + call.alignment - 1) / call.alignment * call.alignment;
    end = scan_warp(aligned);
  }
  __device__ static int per_rank(const Mesh& mesh) { return (mesh.experts_per_rank + 31) / 32; }
  __device__ bool is_there(const Mesh& mesh) const { return expert < mesh.experts_per_rank; }
};

// Every thread of the block: rows of all ranks, of this rank also where each expert's start. True:
// some rank has more than there is room for.
__device__ inline bool place_ranks(const Mesh& mesh, const LatencyDispatchCall& call,
                                   const Places& places) {
  const int per_rank = Stretch::per_rank(mesh), warps = int(blockDim.x / 32);
  const int end = mesh.num_ranks * per_rank;
  for (int number = warp_id(); number < end; number += warps) {
    const Stretch stretch(mesh, call, places, number);
    if (lane_id() == 31) places.ends[number] = stretch.end;
  }
  __syncthreads();
  bool is_over = false;
  for (int number = warp_id(); number < end; number += warps) {
    uint32_t before = 0;
    for (int i = number / per_rank * per_rank; i < number; ++i) before += places.ends[i];
    is_over |= before + places.ends[number] > call.capacity;
    if (number / per_rank != mesh.rank) continue;
    const Stretch stretch(mesh, call, places, number);
    if (!stretch.is_there(mesh)) continue;
    const int j = stretch.expert;
    uint32_t row = before + stretch.end - stretch.aligned;
    places.offset[j] = row;
    places.total[j] = stretch.total;
    if (j == mesh.experts_per_rank - 1) places.offset[j + 1] = before + stretch.end;
    for (int source = 0; source < mesh.num_ranks; ++source) {
      places.first[source * mesh.experts_per_rank + j] = row;
      row += places.count(source, mesh.rank * mesh.experts_per_rank + j);
    }
  }
  return __syncthreads_or(is_over) != 0;
}

// The host looks for refusals when it comes by. One block.
__device__ inline void keep_latency_refusal(const Mesh& mesh, const LatencyDispatchCall& call,
                                            const Places& places) {
  // The rank that refused its own input has raised already.
  if (threadIdx.x != 0 || call.refused == nullptr || load_acquire(&call.refused->ticket) != 0)
    return;
  for (int source = 0; source < mesh.num_ranks; ++source) {
    const uint32_t status = places.word(source, kStatusWord);
    ExchangeHeader& header = call.refused->headers[source];
    header.status = status != kOk                                     ? status
                    : places.word(source, kAgreedWord) != call.agreed ? kDisagree
                                                                      : 0;
    header.text[0] = 0;
    header.bad_index = places.word(source, kBadIndexWord);
    header.bad_value = int64_t(uint64_t(places.word(source, kBadValueTopWord)) << 32 |
                               places.word(source, kBadValueWord));
  }
  fence_system();
  store_release(&call.refused->ticket, call.ticket);  // partner: the host's look
}

// Every thread of the block: the messages of all ranks. False: the Runtime is faulty.
__device__ inline bool read_messages(const Mesh& mesh, const LatencyRegions& regions,
                                     const LatencyDispatchCall& call, uint32_t* memory,
                                     uint64_t epoch, Places* places) {
  constexpr uint32_t kTogether = 4;  // words whose loads are under way together
  const uint32_t words = message_words(mesh, regions), threads = blockDim.x;
  const uint32_t end = uint32_t(mesh.num_ranks) * words, experts = uint32_t(mesh.num_experts);
  *places = {memory,
             memory + end,
             memory + end + experts,
             memory + end + experts + mesh.experts_per_rank + 1,
             memory + end + experts + 2 * mesh.experts_per_rank + 1,
             words,
             kHeadWords,
             kHeadWords + mask_words(regions),
             false,
             false};
  bool is_bad = false, has_come = true;
  for (uint32_t begin = threadIdx.x; begin < end && has_come; begin += threads * kTogether) {
    const uint64_t* from[kTogether];
    uint64_t found[kTogether];
#pragma unroll
    for (uint32_t k = 0; k < kTogether; ++k) {
      const uint32_t i = min(begin + k * threads, end - 1);
      from[k] = message(mesh, regions, mesh.rank, epoch, int(i / words)) + i % words;
      found[k] = commlib::load_relaxed(from[k]);
    }
#pragma unroll
    for (uint32_t k = 0; k < kTogether; ++k) {
      const uint32_t i = min(begin + k * threads, end - 1);
      if (has_come && uint32_t(found[k] >> 32) != uint32_t(epoch))
        has_come = wait_word(mesh, from[k], int(i / words), epoch, &found[k]);
      const uint32_t word = uint32_t(found[k]);
      memory[i] = word;
      if (i % words == kStatusWord) is_bad |= word != kOk;
      if (i % words == kAgreedWord) is_bad |= word != call.agreed;
    }
  }
  if (__syncthreads_and(has_come) == 0) return false;
  places->is_bad = places->is_void = __syncthreads_or(is_bad) != 0;
  return true;
}

// Every thread of the block: where each expert's rows go.
__device__ inline void settle_places(const Mesh& mesh, const LatencyDispatchCall& call,
                                     Places* places) {
  const int per_rank = mesh.experts_per_rank;
  const bool is_over = place_ranks(mesh, call, *places);
  places->is_void |= is_over;
  if (blockIdx.x != 0) return;
  if (places->is_bad) keep_latency_refusal(mesh, call, *places);
  if (threadIdx.x == 0) {
    *call.state = places->is_void;
    if (is_over && !places->is_bad) mesh.workspace->overflowed = 1;
  }
  for (int j = int(threadIdx.x); j <= per_rank; j += int(blockDim.x)) {
    call.expert_offset[j] = places->is_void ? 0 : places->offset[j];
    if (j < per_rank) call.rows_per_expert[j] = places->is_void ? 0 : places->total[j];
  }
}

}  // namespace commlib::cuda
