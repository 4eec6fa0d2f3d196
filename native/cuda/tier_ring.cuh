// Both ends of the rings between nodes, a whole block or several at each: warps fill or empty the
// slots of a batch of chunks, then one thread tells. A block serves its rings in turn and never
// waits for one of them while another can go on.
#pragma once

#include "cuda/bulk.cuh"
#include "cuda/tier_team.cuh"

namespace commlib::cuda {

__device__ inline uint64_t partial_flag(const Mesh& mesh, int source, int writer) {
  const DeviceFabric& fabric = *mesh.fabric;
  return (uint64_t(source) * fabric.max_local_ranks + fabric.local_rank_of[writer]) *
         mesh.max_tokens;
}

// At most, or one chunk: a block that fills more before it tells leaves the network without work,
// and one that takes in more keeps the sender from room.
constexpr uint64_t kBatchBytes = 2 << 20;

// Half a ring at a time: the other half is on its way.
__device__ inline uint32_t batch_slots(const RingGeometry& ring, uint64_t chunks) {
  const uint64_t half = ring.num_chunks / 2, few = kBatchBytes / ring.chunk_bytes();
  uint64_t most = half < few ? half : few;
  if (most == 0) most = 1;
  return uint32_t((chunks < most ? chunks : most) * ring.slots_per_chunk);
}

template <typename Side>
__device__ WaitFor waiting_for(const Mesh& mesh, const Side& side, uint32_t ring) {
  return {side.phase(), side.peer(ring), mesh.workspace->plan.epoch, side.num_slots(ring)};
}

// One thread: goes over the rings in turn until one of them can go on, or all slots are done.
template <typename Side>
__device__ Batch next_batch(const Mesh& mesh, const Side& side, const BlockRings& rings,
                            const uint32_t* done, uint32_t* turn) {
  Batch batch{kDone, 0, 0};
  int waiting = -1;
  const uint32_t own =
      rings.count > rings.first ? (rings.count - rings.first - 1) / rings.step + 1 : 0;
  const auto look = [&](uint64_t* seen) {
    bool has_rest = false;
    for (uint32_t i = 0; i < own; ++i) {
      const uint32_t number = rings.first + (i + *turn) % own * rings.step;
      const uint64_t slots = side.num_slots(number);
      if (done[number] >= slots) continue;
      has_rest = true;
      waiting = int(number);
      const uint32_t ready = side.ready(number, done[number]);
      *seen = done[number];
      if (ready == 0) continue;
      const uint64_t end = done[number] + ready < slots ? done[number] + ready : slots;
      batch = {int(number), done[number], uint32_t(end)};
      *turn = (i + *turn + 1) % own;
      return true;
    }
    if (has_rest) __nanosleep(200);
    return !has_rest;
  };
  uint64_t seen = 0;
  if (look(&seen)) return batch;
  if (!wait_until(mesh, waiting_for(mesh, side, uint32_t(waiting)), look)) batch.ring = kBroken;
  return batch;
}

// `move(ring, slot)` for every slot of every ring of the block, dealt to the warps that serve it in
// order; `finish()` when a warp's part of a batch must be complete. False: the Runtime is faulty.
template <typename Side, typename Move, typename Finish>
__device__ bool serve_rings(const Mesh& mesh, const Side& side, const BlockRings& rings, Move move,
                            Finish finish) {
  __shared__ uint32_t done[kMaxFabricRanks];
  __shared__ Batch shared_batch;
  for (uint32_t i = threadIdx.x; i < kMaxFabricRanks; i += blockDim.x) done[i] = 0;
  __syncthreads();
  const bool is_first = rings.member == 0, is_alone = rings.team == 1;
  const uint32_t warps = blockDim.x / 32;
  Team team(mesh, rings);
  uint32_t turn = 0;
  const auto look = [&] {
    if (!is_first) return team.follow(waiting_for(mesh, side, rings.first));
    const Batch batch = next_batch(mesh, side, rings, done, &turn);
    if (!is_alone) team.lead(batch);
    return batch;
  };
  const auto tell = [&](const Batch& batch) {
    if (!is_first) {
      team.tell_through();
      return true;
    }
    done[batch.ring] = batch.end;
    if (!is_alone && !team.wait_through(waiting_for(mesh, side, rings.first))) return false;
    return side.tell(batch);
  };
  for (;;) {
    if (threadIdx.x == 0) shared_batch = look();
    __syncthreads();
    const Batch batch = shared_batch;
    if (batch.ring < 0) return batch.ring == kDone;
    bool is_fine = true;
    for (uint32_t slot = batch.first + rings.member * warps + uint32_t(warp_id());
         slot < batch.end && is_fine; slot += warps * rings.team)
      is_fine = move(batch.ring, slot);
    finish();
    fence_system();  // what this thread stored, before the command of thread 0
    if (__syncthreads_and(is_fine) == 0) return false;
    if (threadIdx.x == 0) is_fine = tell(batch);
    if (__syncthreads_and(is_fine) == 0) return false;
  }
}

// The sending end.
struct Outgoing {
  const Mesh& mesh;
  const SendEnd* ends;  // by node or by source
  uint64_t* totals;
  const uint32_t* counts;  // slots of ring i: counts[i * count_step]
  uint32_t count_step;
  const int32_t* numbers;  // ring i of the block's list is `ends[numbers[i]]`
  int fifo;
  uint32_t slot_bytes;
  bool is_by_source;

  __device__ uint64_t num_slots(uint32_t i) const { return counts[numbers[i] * count_step]; }
  __device__ RingGeometry ring(uint32_t i) const {
    return make_ring(mesh.fabric->ring_bytes, mesh.fabric->chunk_bytes, slot_bytes, num_slots(i));
  }
  __device__ Phase phase() const { return kScaleOut; }
  __device__ int peer(uint32_t i) const {
    return is_by_source ? numbers[i] : mesh.fabric->rail[mesh.rank][numbers[i]];
  }
  // Slots for which there is room: the receiver has drained them, and the own puts are complete.
  __device__ uint32_t ready(uint32_t i, uint32_t done) const {
    const SendEnd& end = ends[numbers[i]];
    const RingGeometry geometry = ring(i);
    // Partner: the credit signal of the receiver's proxy.
    const uint64_t credits = commlib::load_acquire(registered<uint64_t>(mesh, end.credit));
    const uint64_t completed = completed_puts(mesh, end.channel);
    const uint64_t drained = credits < completed ? credits : completed;
    const uint64_t total = totals[numbers[i]];
    const uint64_t begin = total - num_chunks_of(geometry, done);
    if (drained < begin) return 0;  // of the last operation, whose slots were of another size
    return batch_slots(geometry, geometry.num_chunks - (total - drained));
  }
  __device__ uint8_t* slot(uint32_t i, uint32_t number) const {
    return ring_at(mesh, ends[numbers[i]].local_offset + ring(i).slot_offset(number));
  }
  // Posts the chunks of a batch.
  __device__ bool tell(const Batch& batch) const {
    const SendEnd& end = ends[numbers[batch.ring]];
    const RingGeometry geometry = ring(uint32_t(batch.ring));
    for (uint64_t first = batch.first; first < batch.end; first += geometry.slots_per_chunk) {
      const uint64_t rest = batch.end - first;
      const uint64_t slots = rest < geometry.slots_per_chunk ? rest : geometry.slots_per_chunk;
      const uint64_t offset = geometry.slot_offset(first);
      if (!push_command(mesh, fifo,
                        encode({CommandKind::kPut, end.channel, 1, uint32_t(slots * slot_bytes),
                                end.local_offset + offset, end.remote_offset + offset})))
        return false;
      ++totals[numbers[batch.ring]];
    }
    return true;
  }
};

// The receiving end.
struct Incoming {
  const Mesh& mesh;
  const RecvEnd* ends;
  uint64_t* totals;
  const uint32_t* counts;
  uint32_t count_step;
  const int32_t* numbers;
  int fifo;
  uint32_t slot_bytes;
  Phase what;
  bool is_by_source;

  __device__ uint64_t num_slots(uint32_t i) const { return counts[numbers[i] * count_step]; }
  __device__ RingGeometry ring(uint32_t i) const {
    return make_ring(mesh.fabric->ring_bytes, mesh.fabric->chunk_bytes, slot_bytes, num_slots(i));
  }
  __device__ Phase phase() const { return what; }
  __device__ int peer(uint32_t i) const {
    return is_by_source ? numbers[i] : mesh.fabric->rail[mesh.rank][numbers[i]];
  }
  // Slots that have come. Partner: the put_signal of the sender's proxy.
  __device__ uint32_t ready(uint32_t i, uint32_t) const {
    const uint64_t chunks =
        commlib::load_acquire(registered<uint64_t>(mesh, ends[numbers[i]].count)) -
        totals[numbers[i]];
    return batch_slots(ring(i), chunks);
  }
  __device__ const uint8_t* slot(uint32_t i, uint32_t number) const {
    return ring_at(mesh, ends[numbers[i]].local_offset + ring(i).slot_offset(number));
  }
  // Gives the chunks of a batch back.
  __device__ bool tell(const Batch& batch) const {
    const uint64_t per_chunk = ring(uint32_t(batch.ring)).slots_per_chunk;
    uint64_t chunks = (batch.end - batch.first + per_chunk - 1) / per_chunk;
    while (chunks > 0) {
      const uint32_t count = uint32_t(chunks < kMaxCommandCount ? chunks : kMaxCommandCount);
      if (!push_command(mesh, fifo,
                        encode({CommandKind::kSignal, ends[numbers[batch.ring]].credit_channel,
                                count, 0, 0, 0})))
        return false;
      totals[numbers[batch.ring]] += count;
      chunks -= count;
    }
    return true;
  }
};

}  // namespace commlib::cuda
