// Combine, the expert rank: one partial row for every record, pushed to its source.
#pragma once

#include "cuda/sum.cuh"
#include "cuda/tier_ring.cuh"
#include "layout/record.hpp"

namespace commlib::cuda {

// Which record a ticket of reduce means: sources take turns, this rank first.
struct Turn {
  uint32_t source, number;
  bool is_there;   // false: this source has fewer records than others
  uint32_t index;  // among all records here
};

__device__ inline Turn turn_of(const Mesh& mesh, const CombineCall& call, uint32_t ticket) {
  const uint32_t ranks = uint32_t(mesh.num_ranks);
  Turn turn{(uint32_t(mesh.rank) + ticket) % ranks, ticket / ranks, false, 0};
  const PeerPlan& peer = mesh.workspace->plan.peer[turn.source];
  const bool is_needed = !is_own_row_partial(call) || int(turn.source) != mesh.rank;
  turn.is_there = turn.number < peer.num_from && is_needed;
  turn.index = peer.first_from + turn.number;
  return turn;
}

// One ticket on its way: entry first, then the weight of the lane's row, then the sum. Loads of the
// next two are under way while one is summed.
struct Job {
  uint32_t ticket;
  uint32_t token;  // of this rank; only where it is the source
  int32_t expert;  // of this lane; -1: none here
  int32_t row;
  float weight;
};

__device__ inline Job make_job(const Mesh& mesh, const CombineCall& call, uint32_t ticket) {
  Job job{ticket, 0, -1, -1, 1.0f};
  const Turn turn = turn_of(mesh, call, ticket);
  if (!turn.is_there) return job;
  const uint8_t* record = call.records + uint64_t(turn.index) * record_bytes(mesh.num_topk);
  if (int(turn.source) == mesh.rank)
    job.token = uint32_t(reinterpret_cast<const RecordHeader*>(record)->token);
  if (lane_id() >= mesh.num_topk) return job;
  const RecordEntry* entry = record_entries(record) + lane_id();
  job.expert = entry->expert;
  job.row = call.layout == kRows ? int32_t(turn.index) : entry->row;
  return job;
}

// Keeps what is on this rank and loads its weight.
__device__ inline void load_weight(const Mesh& mesh, const CombineCall& call, Job& job) {
  if (job.expert >= 0 && job.expert / mesh.experts_per_rank != mesh.rank) job.expert = -1;
  if (job.expert >= 0 && call.weights != nullptr) job.weight = call.weights[job.row];
}

// One partial row: the local rows of the record's token, local experts (and so rows) ascending.
template <typename Sum>
__device__ void reduce_record(const Mesh& mesh, const CombineCall& call, WarpMemory& own, Sum& sum,
                              const Job& job, const Turn& turn) {
  const int lane = lane_id();
  const bool is_here = job.expert >= 0, is_own = int(turn.source) == mesh.rank;
  uint8_t* to = is_own ? call.out + uint64_t(job.token) * call.row_bytes
                       : mesh.workspace->plan.peer[turn.source].partial_out +
                             uint64_t(turn.number) * call.slot_bytes;
  if (call.weight_grads != nullptr && is_here) {
    const uint64_t place =
        call.layout == kRows ? uint64_t(turn.index) * mesh.num_topk + lane : uint64_t(job.row);
    float* grads = is_own ? call.out_weight_grads + uint64_t(job.token) * uint64_t(mesh.num_topk)
                          : reinterpret_cast<float*>(to + call.row_bytes);
    grads[lane] = call.weight_grads[place];
  }
  // In the rows layout all lanes with a slot here share one row: the first of them stands for it.
  const uint32_t here = __ballot_sync(0xffffffffu, is_here);
  const bool is_term = is_here && (call.layout == kGrouped || lane == __ffs(int(here)) - 1);
  int from = 0;
  const int count = order_lanes(is_term ? job.row : kNothing, &from);
  const uint64_t row = uint64_t(__shfl_sync(0xffffffffu, job.row, from));
  const float weight = __shfl_sync(0xffffffffu, job.weight, from);
  sum_rows(0, call.row_bytes, own, sum, to,
           reinterpret_cast<uint64_t>(call.y + row * call.row_bytes), weight, count);
}

// Where it is told that a partial row has come: at the source, or at the source's rail here.
__device__ inline uint32_t place_of_partial(const Mesh& mesh, const Turn& turn) {
  if (mesh.fabric == nullptr) return Tellers::place(int(turn.source), int(turn.number));
  const DeviceFabric& fabric = *mesh.fabric;
  const bool is_here = mesh.base[turn.source] != nullptr;
  const int collector = is_here ? int(turn.source) : fabric.rail[turn.source][fabric.node];
  const uint64_t number =
      partial_flag(mesh, int(turn.source), mesh.rank) + uint64_t(turn.number);
  return Tellers::place(collector, int(number));
}

__device__ inline Flags flags_of_partials(const Mesh& mesh) {
  if (mesh.fabric != nullptr) return {mesh.partial_arrived, 0};
  return {mesh.combine_arrived, uint32_t(mesh.max_tokens)};
}

// Role: a partial row for every record, in record order, sources taking turns. Each rank begins
// with itself and goes on to the next, so that no source is written by all at once.
template <typename Sum>
__device__ void reduce(const Mesh& mesh, const CombineCall& call, WarpMemory& own) {
  const Plan& plan = mesh.workspace->plan;
  const uint32_t most = __reduce_max_sync(
      0xffffffffu, lane_id() < mesh.num_ranks ? plan.peer[lane_id()].num_from : 0u);
  const uint32_t end = most * uint32_t(mesh.num_ranks);
  Sum sum(own.is_last, own.weights);
  const Flags flags = flags_of_partials(mesh);
  Tickets tickets(&mesh.workspace->next_reduce);
  Job job = make_job(mesh, call, tickets.take());
  load_weight(mesh, call, job);
  Job next = make_job(mesh, call, tickets.take());
  while (job.ticket < end) {
    const Job after = make_job(mesh, call, tickets.take());
    load_weight(mesh, call, next);
    const Turn turn = turn_of(mesh, call, job.ticket);
    if (turn.is_there) {
      reduce_record(mesh, call, own, sum, job, turn);
      own.announcer.add(place_of_partial(mesh, turn), own.pipe.loaded);
      own.announcer.tell(mesh, flags, plan.epoch, own.pipe);
    }
    job = next;
    next = after;
  }
  own.pipe.drain(sum);
  own.announcer.tell_all(mesh, flags, plan.epoch);
}

}  // namespace commlib::cuda
