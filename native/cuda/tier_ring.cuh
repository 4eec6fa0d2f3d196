// Both ends of the rings between nodes: the warps of a block fill or empty the slots of a batch of
// chunks, then one thread tells. A block serves its rings in turn and never waits for one of them
// while another can go on; or it serves chunks of one ring beside other blocks.
#pragma once

#include "cuda/bulk.cuh"
#include "cuda/tier_ends.cuh"
#include "cuda/tier_team.cuh"

namespace commlib::cuda {

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
      const uint32_t ready = batch_slots(side, number, done[number]);
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

// The slots of a batch, dealt to the warps in order. False: the Runtime is faulty.
template <typename Move, typename Finish>
__device__ bool serve_batch(const Batch& batch, Move& move, Finish& finish) {
  bool is_fine = true;
  for (uint32_t slot = batch.first + uint32_t(warp_id()); slot < batch.end && is_fine;
       slot += blockDim.x / 32)
    is_fine = move(batch.ring, slot);
  finish();
  fence_system();  // what this thread stored, before the command of thread 0
  return __syncthreads_and(is_fine) != 0;
}

// A block's share of the only ring that it serves, with others.
template <typename Side, typename Move, typename Finish>
__device__ bool share_ring(const Mesh& mesh, const Side& side, const BlockRings& rings, Move& move,
                           Finish& finish) {
  const Team team(mesh, rings);
  const uint32_t ring = rings.first, slots = uint32_t(side.num_slots(ring));
  const RingGeometry geometry = side.ring(ring);
  const uint32_t per_chunk = uint32_t(geometry.slots_per_chunk);
  const uint32_t num_chunks = uint32_t(geometry.num_chunks);
  const WaitFor what = waiting_for(mesh, side, ring);
  bool is_fine = true;
  if (threadIdx.x == 0) {
    if (rings.member == 0) team.begin(side.total(ring));
    is_fine = team.wait_turn(what, 0);
  }
  for (uint32_t chunk = rings.member; chunk * per_chunk < slots; chunk += rings.team) {
    const uint32_t first = chunk * per_chunk;
    const Batch batch{int(ring), first, min(first + per_chunk, slots)};
    // Room for it comes after others have told of theirs: no deadline runs meanwhile.
    if (threadIdx.x == 0 && is_fine && chunk >= num_chunks)
      is_fine = team.wait_turn(what, chunk + 1 - num_chunks);
    if (threadIdx.x == 0 && is_fine) {
      const uint64_t total = team.words().total;
      is_fine = wait_until(mesh, what, [&](uint64_t* seen) {
        *seen = first;
        const bool is_ready =
            team.has_chunks(chunk + 1, [&] { return side.num_ready(ring, total); });
        if (!is_ready) __nanosleep(200);
        return is_ready;
      });
    }
    if (__syncthreads_and(is_fine) == 0 || !serve_batch(batch, move, finish)) return false;
    if (threadIdx.x != 0) continue;
    is_fine = team.wait_turn(what, chunk) && side.tell(batch);
    if (is_fine) team.pass(chunk + 1);
  }
  return __syncthreads_and(is_fine) != 0;
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
  if (rings.team > 1) return share_ring(mesh, side, rings, move, finish);
  uint32_t turn = 0;
  for (;;) {
    if (threadIdx.x == 0) shared_batch = next_batch(mesh, side, rings, done, &turn);
    __syncthreads();
    const Batch batch = shared_batch;
    if (batch.ring < 0) return batch.ring == kDone;
    if (!serve_batch(batch, move, finish)) return false;
    bool is_fine = true;
    if (threadIdx.x == 0) {
      done[batch.ring] = batch.end;
      is_fine = side.tell(batch);
    }
    if (__syncthreads_and(is_fine) == 0) return false;
  }
}

}  // namespace commlib::cuda
