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
    words().total = total;
    pass(0);
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
