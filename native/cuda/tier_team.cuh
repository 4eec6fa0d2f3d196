// Which rings between nodes a block serves; and the order among several blocks at one ring.
#pragma once

#include "cuda/tier_exchange.cuh"

namespace commlib::cuda {

enum RingSide : uint32_t { kOwnTokens, kTokensOfOthers };

// Rings of a block: numbers `first`, `first + step`, ... below `count`. Of a team its number and
// how many they are; number 0 is the first.
struct BlockRings {
  RingSide side;
  uint32_t first, step, count;
  uint32_t member, team;
};

// Block `number` of `blocks` at `count` rings: several rings a block, or several blocks a ring.
__device__ inline BlockRings rings_of(RingSide side, uint32_t number, uint32_t blocks,
                                      uint32_t count) {
  if (blocks <= count || count == 0) return {side, number, blocks, count, 0, 1};
  const uint32_t ring = number % count;
  return {side, ring, count, count, number / count, (blocks - ring + count - 1) / count};
}

constexpr uint64_t kNoDeadline = ~0ull;

// Thread 0 of each block of a team. Member m takes the chunks m, m + team, ... of an operation, as
// far as it can by itself; the network is told of them in order, by whoever has the next one.
//
// No deadlines among blocks: every wait that they have for others has one, and a missed one ends
// these, too.
struct Team {
  const Mesh& mesh;
  const BlockRings& rings;
  const uint64_t first_turn;  // unlike any of another kernel

  __device__ Team(const Mesh& of, const BlockRings& served)
      : mesh(of), rings(served), first_turn(uint64_t(of.workspace->plan.epoch) << 32) {}

  __device__ TeamWords& words() const { return mesh.fabric->state.team[rings.side][rings.first]; }

  // Member 0: what the others need to know lies there.
  __device__ void begin(uint64_t total) const {
    words().total = words().ready = total;
    pass(0);
  }

  // Whether this many chunks of the operation may be served. `num_ready()` looks for how many, over
  // the life of the ring, in host memory: one block at a time, for twenty that read the same words
  // over PCIe make what writes them ten times slower.
  template <typename NumReady>
  __device__ bool has_chunks(uint32_t count, NumReady num_ready) const {
    TeamWords& word = words();
    const uint64_t wanted = word.total + count;
    if (load_acquire(&word.ready) >= wanted) return true;  // partner: the store below
    if (atomicExch(&word.is_looking, 1u) != 0) return false;
    fence_device();  // what the last that looked has stored
    const uint64_t ready = num_ready();
    if (ready > word.ready) store_release(&word.ready, ready);
    fence_device();
    atomicExch(&word.is_looking, 0u);
    return ready >= wanted;
  }

  // `told` chunks have been told: the next may be. False: the Runtime is faulty.
  __device__ bool wait_turn(const WaitFor& what, uint32_t told) const {
    const uint64_t* turn = &words().turn;
    const uint64_t wanted = first_turn + told;
    return wait_until(
        mesh, what,
        [=](uint64_t* seen) {
          *seen = load_acquire(turn);  // partner: pass()
          if (*seen < wanted) __nanosleep(200);
          return *seen >= wanted;
        },
        kNoDeadline);
  }

  __device__ void pass(uint32_t told) const {
    fence_device();
    store_release(&words().turn, first_turn + told);  // partner: the load in wait_turn()
  }
};

}  // namespace commlib::cuda
