// Dispatch in the latency regime, the receiver: from all ranks' choices to places.
#pragma once

#include "cuda/latency_choices.cuh"

namespace commlib::cuda {

// Where the rows of this rank go, in shared memory behind the choices. Experts are added up 32 at a
// time, a stretch; rows are counted from the start of their stretch.
struct Places {
  uint32_t* first;  // [source][local expert] row
  uint32_t* total;  // [local expert]
  uint32_t* start;  // [local expert] row
  int stretches;    // of a rank
  bool is_bad;      // some rank has refused its input, or ranks disagree
  bool is_over;     // some rank has more rows than there is room for
  const Choices& choices;

  __device__ Places(const Mesh& mesh, const Choices& chosen)
      : first(chosen.rest),
        total(first + mesh.num_experts),
        start(total + mesh.experts_per_rank),
        stretches((mesh.experts_per_rank + 31) / 32),
        is_bad(false),
        is_over(false),
        choices(chosen) {
    const int source = lane_id();
    is_bad =
        __any_sync(0xffffffffu, source < mesh.num_ranks && choices.errors[source] != kNoError) != 0;
  }
  __device__ bool is_void() const { return is_bad || is_over; }  // nothing is there
  __device__ const uint8_t* end(const Mesh& mesh) const {
    return reinterpret_cast<const uint8_t*>(start + mesh.experts_per_rank);
  }
  __device__ uint32_t first_row(const Mesh& mesh, int source, int expert) const {
    return choices.bases[expert / 32] + first[source * mesh.experts_per_rank + expert];
  }
  // Of expert `experts_per_rank`: the end of all rows.
  __device__ uint32_t start_of(const Mesh& mesh, int expert) const {
    if (expert == mesh.experts_per_rank) return choices.ends[mesh.rank];
    return choices.bases[expert / 32] + start[expert];
  }
};

__device__ inline uint32_t scan_warp(uint32_t value) {
  for (int delta = 1; delta < 32; delta *= 2) {
    const uint32_t below = __shfl_up_sync(0xffffffffu, value, delta);
    if (lane_id() >= delta) value += below;
  }
  return value;
}

// Every thread of the block: rows of all ranks, of this rank also where each expert's start.
__device__ inline void place_ranks(const Mesh& mesh, const LatencyDispatchCall& call,
                                   const Choices& choices, Places* places) {
  const int end = mesh.num_ranks * places->stretches;
#pragma unroll 1
  for (int number = warp_id(); number < end; number += int(blockDim.x / 32)) {
    const int rank = number / places->stretches;
    const int j = number % places->stretches * 32 + lane_id();
    const bool is_there = j < mesh.experts_per_rank;
    const uint32_t total = is_there ? choices.totals[rank * mesh.experts_per_rank + j] : 0;
    const uint32_t aligned = (total + call.alignment - 1) / call.alignment * call.alignment;
    const uint32_t sum = scan_warp(aligned);
    const uint32_t all = __shfl_sync(0xffffffffu, sum, 31);
    if (lane_id() == 0) atomicAdd(choices.ends + rank, all);
    if (rank != mesh.rank) continue;
    for (int later = number % places->stretches + 1 + lane_id(); later < places->stretches;
         later += 32)
      atomicAdd(choices.bases + later, all);
    if (!is_there) continue;
    uint32_t row = sum - aligned;
    places->start[j] = row;
    places->total[j] = total;
#pragma unroll 1
    for (int source = 0; source < mesh.num_ranks; ++source) {
      places->first[source * mesh.experts_per_rank + j] = row;
      row += choices.count(mesh, source, j);
    }
  }
  __syncthreads();
  const int rank = lane_id();
  places->is_over =
      __any_sync(0xffffffffu, rank < mesh.num_ranks && choices.ends[rank] > call.capacity) != 0;
}

// The host looks for refusals when it comes by. One block.
__device__ inline void keep_latency_refusal(const Mesh& mesh, const LatencyRegions& regions,
                                            const LatencyDispatchCall& call, const Choices& choices,
                                            uint64_t epoch) {
  // The rank that refused its own input has raised already.
  if (threadIdx.x != 0 || call.refused == nullptr || load_acquire(&call.refused->ticket) != 0)
    return;
  for (int source = 0; source < mesh.num_ranks; ++source) {
    ExchangeHeader& header = call.refused->headers[source];
    const unsigned long long error = choices.errors[source];
    header.status = error == kNoError ? 0 : uint32_t(error & 0xff);
    header.text[0] = 0;
    header.bad_index = uint32_t(error >> 8);
    header.bad_value = 0;
    if (header.status != kBadExpert && header.status != kDuplicate && header.status != kBadWeight)
      continue;
    const Packet packet = load_packet(message(mesh, regions, mesh.rank, epoch, source) + 1 +
                                      header.bad_index / kTogetherChosen);
    header.bad_value = int64_t(uint64_t(packet.words[2]) << 32 | packet.words[1]);
  }
  fence_system();
  store_release(&call.refused->ticket, call.ticket);  // partner: the host's look
}

// Every thread of the block: where each expert's rows go.
__device__ inline void settle_places(const Mesh& mesh, const LatencyRegions& regions,
                                     const LatencyDispatchCall& call, const Choices& choices,
                                     uint64_t epoch, Places* places) {
  place_ranks(mesh, call, choices, places);
  if (blockIdx.x != 0) return;
  const bool is_void = places->is_void();
  if (places->is_bad) keep_latency_refusal(mesh, regions, call, choices, epoch);
  if (threadIdx.x == 0) {
    *call.state = is_void;
    if (places->is_over && !places->is_bad) mesh.workspace->overflowed = 1;
  }
  const int per_rank = mesh.experts_per_rank;
  for (int j = int(threadIdx.x); j <= per_rank; j += int(blockDim.x)) {
    call.expert_offset[j] = is_void ? 0 : places->start_of(mesh, j);
    if (j < per_rank) call.rows_per_expert[j] = is_void ? 0 : places->total[j];
  }
}

}  // namespace commlib::cuda
