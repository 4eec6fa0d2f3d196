// Which rings between nodes a block serves; and several blocks at one ring: the first of them looks
// for work and tells the network, all of them do the work.
#pragma once

#include "cuda/tier_exchange.cuh"

namespace commlib::cuda {

constexpr int kDone = -1, kBroken = -2;

struct Batch {
  int ring;  // or kDone, kBroken
  uint32_t first, end;
};

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

// One thread of each block of a team. A turn is a batch; all do it before there is the next.
struct Team {
  const Mesh& mesh;
  const BlockRings& rings;
  uint64_t turn;  // unlike that of any other kernel

  __device__ Team(const Mesh& of, const BlockRings& served)
      : mesh(of), rings(served), turn(uint64_t(of.workspace->plan.epoch) << 32) {}

  __device__ TeamWords& words() const { return mesh.fabric->state.team[rings.side][rings.first]; }

  // The first: tells the others. They are through with the turn before.
  __device__ void lead(const Batch& batch) {
    TeamWords& word = words();
    word.ring = batch.ring;
    word.first = batch.first;
    word.end = batch.end;
    word.num_through = 0;
    fence_device();
    store_release(&word.turn, ++turn);  // partner: the load in follow()
  }

  // The others: what the first says. No deadlines among blocks: every wait that they have for
  // others has one, and a missed one ends these, too. `what`: it waits for.
  __device__ Batch follow(const WaitFor& what) {
    TeamWords& word = words();
    ++turn;
    const bool is_told = wait_until(
        mesh, what,
        [&](uint64_t* seen) {
          const uint64_t told = load_acquire(&word.turn);
          *seen = told;
          if (told != turn) __nanosleep(200);
          return told == turn;
        },
        kNoDeadline);
    if (!is_told) return {kBroken, 0, 0};
    return {word.ring, word.first, word.end};
  }

  // The others: their part is done, and all threads of the block have fenced what they wrote.
  __device__ void tell_through() {
    fence_device();
    atomicAdd(&words().num_through, 1u);  // partner: the load in wait_through()
  }

  // The first: whether all have done theirs. Otherwise the Runtime is faulty.
  __device__ bool wait_through(const WaitFor& what) {
    TeamWords& word = words();
    const bool is_through = wait_until(
        mesh, what,
        [&](uint64_t* seen) {
          const uint32_t through = load_acquire(&word.num_through);
          *seen = through;
          return through == rings.team - 1;
        },
        kNoDeadline);
    fence_system();  // what they wrote, before what the network is told
    return is_through;
  }
};

}  // namespace commlib::cuda
