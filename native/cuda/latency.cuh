// The latency regime: no exchange before the rows. A row goes to its own place [source][token] at
// each rank that wants it, the choices of all tokens go beside the rows, and the receiver works out
// the order.
//
// Slots have two generations. The operation after next may write a slot again once all blocks of
// its rank have said that they have taken their rows in (dispatch_done, combine_done). Blocks meet
// nowhere: each counts the operations itself.
#pragma once

#include "cuda/bulk.cuh"
#include "layout/record.hpp"

namespace commlib::cuda {

enum LatencyCounter { kDispatchSent = 0, kTakenIn = 1, kCombineSent = 2, kAddedUp = 3 };
constexpr uint32_t kMaxParts = 16;  // of a partial row, each the work of one warp
enum LatencyPhase : uint32_t { kSend = 1, kReceive = 2 };
constexpr uint32_t kDisagree = 5;  // a Status: the ranks' calls differ

// Where things lie in every rank's control region.
struct LatencyRegions {
  uint64_t slots;          // [generation][source][token] packets of a row, weights [choice] words
  uint64_t messages;       // [generation][source] packets: a head, then choices
  uint64_t partials;       // [generation][writer][token] row
  uint64_t partial_epoch;  // [writer][token][part] uint32: newest epoch that lies in the slot
  uint64_t dispatch_done;  // [rank][block] newest epoch whose rows that block has taken in
  uint64_t combine_done;   // [rank][block]
  uint64_t block_epochs;   // [block][LatencyCounter] own: newest operation of each
  uint32_t max_tokens;
  uint32_t slot_bytes, weights_offset;
  uint32_t partial_bytes;
  uint32_t message_bytes;
};

struct LatencyDispatchCall {
  const uint8_t* x;
  const int64_t* topk_idx;
  const float* topk_weights;  // or nullptr: ones
  HostResult* refused;
  uint8_t* rows;  // [capacity]
  float* scales;
  float* weights;             // [capacity]
  uint8_t* records;           // of the handle: [source][token]
  int32_t* owners;            // of the handle: [own token][slot] rank, or -1
  uint32_t* rows_per_expert;  // [local expert]
  uint32_t* expert_offset;    // [local expert + 1]
  uint32_t* state;
  uint64_t ticket;
  uint32_t num_tokens, in_row_bytes, row_bytes, num_scales;
  uint32_t piece_bytes;  // of a row as it is given: a part, one warp's work
  uint32_t part_bytes;   // of a part's packets in a slot
  uint32_t alignment, cast, dtype, capacity;
  uint32_t agreed, status;  // kOk, or kRejected: the host found the input bad
  uint32_t phases;
  uint32_t shared_offset;  // of what the block shares, behind the warps' memory
};

__device__ inline Flags partial_flags(const LatencyRegions& regions) {
  return {regions.partial_epoch, regions.max_tokens * kMaxParts};
}

__device__ inline uint64_t place_of(const Mesh& mesh, const LatencyRegions& regions, uint64_t epoch,
                                    int writer, uint32_t token) {
  return ((epoch & 1) * uint64_t(mesh.num_ranks) + uint64_t(writer)) * regions.max_tokens + token;
}

__device__ inline uint8_t* row_slot(const Mesh& mesh, const LatencyRegions& regions, int rank,
                                    uint64_t epoch, int source, uint32_t token) {
  const uint64_t place = place_of(mesh, regions, epoch, source, token);
  return at<uint8_t>(mesh, rank, regions.slots + place * regions.slot_bytes);
}

__device__ inline uint8_t* partial_slot(const Mesh& mesh, const LatencyRegions& regions, int rank,
                                        uint64_t epoch, int writer, uint32_t token) {
  const uint64_t place = place_of(mesh, regions, epoch, writer, token);
  return at<uint8_t>(mesh, rank, regions.partials + place * regions.partial_bytes);
}

// Epoch that lies in a part's slot: one writer, never reset.
__device__ inline const uint32_t* part_flag(const Mesh& mesh, const Flags& flags, int writer,
                                            uint32_t number) {
  return at<uint32_t>(mesh, mesh.rank, flags.offset) + uint64_t(writer) * flags.per_writer + number;
}

// "This part came in this epoch or, its place being taken again, a later one". Epochs are compared
// as numbers on a circle.
__device__ inline bool part_has_come(const uint32_t* flag, uint32_t epoch, uint64_t* seen) {
  const uint32_t value = load_acquire(flag);  // partner: Announcer::tell_until at the writer
  *seen = value;
  return int32_t(value - epoch) >= 0;
}

__device__ inline bool wait_part(const Mesh& mesh, const uint32_t* flag, int writer, uint32_t epoch,
                                 Phase phase) {
  return wait_until(mesh, {phase, writer, epoch, epoch},
                    [=](uint64_t* seen) { return part_has_come(flag, epoch, seen); });
}

// Division by the same number again and again, as long as number * divisor < 2^32: the product with
// the reciprocal, rounded up, is too large by less than what is missing to the next quotient.
struct Divisor {
  uint32_t value, inverse;

  __device__ explicit Divisor(uint32_t by) : value(by), inverse(0xffffffffu / by + 1) {}
  __device__ uint32_t divide(uint32_t number) const {
    return value == 1 ? number : __umulhi(number, inverse);
  }
};

// Parts of rows that a grid's warps take in turn, first the same part of all blocks.
struct PartTasks {
  uint32_t number, end, step;
  Divisor parts;

  __device__ PartTasks(uint32_t rows, uint32_t parts_of_row)
      : number(blockIdx.x + gridDim.x * uint32_t(warp_id())),
        end(rows * parts_of_row),
        step(gridDim.x * (blockDim.x / 32)),
        parts(parts_of_row) {}
  __device__ bool has_one() const { return number < end; }
  __device__ uint32_t row() const { return parts.divide(number); }
  __device__ uint32_t part() const { return number - row() * parts.value; }
  __device__ void next() { number += step; }
};

// Words that carry the epoch in their upper half: a reader knows of each by itself that it has
// come, and nobody needs a fence.
__device__ inline void put_word(uint64_t* to, uint64_t epoch, uint32_t word) {
  commlib::store_relaxed(to, epoch << 32 | word);
}

// Partner: put_word at the writer. False: the Runtime is faulty.
__device__ inline bool wait_word(const Mesh& mesh, const uint64_t* from, int writer, uint64_t epoch,
                                 uint64_t* word) {
  return wait_until(mesh, {kTakeIn, writer, epoch, epoch}, [=](uint64_t* seen) {
    *word = commlib::load_relaxed(from);
    *seen = *word >> 32;
    return uint32_t(*seen) == uint32_t(epoch);
  });
}

__device__ inline uint64_t* block_epochs(const Mesh& mesh, const LatencyRegions& regions) {
  return at<uint64_t>(mesh, mesh.rank, regions.block_epochs) + 4 * blockIdx.x;
}

// Every thread of the block: the slots of the operation before the last are free at all ranks.
// False: the Runtime is faulty.
__device__ inline bool wait_room(const Mesh& mesh, uint64_t done, uint64_t epoch) {
  bool has_come = true;
  const uint64_t* words = at<uint64_t>(mesh, mesh.rank, done);
  const int end = epoch < 3 ? 0 : mesh.num_ranks * int(gridDim.x);  // all ranks have as many blocks
#pragma unroll 1
  for (int i = int(threadIdx.x); i < end && has_come; i += int(blockDim.x))
    has_come = wait_until(mesh, {kRoom, i / int(gridDim.x), epoch - 2, epoch - 2},
                          [word = words + i, epoch](uint64_t* seen) {
                            *seen = load_acquire(word);  // partner: tell_done at that rank
                            return int64_t(*seen - (epoch - 2)) >= 0;
                          });
  return __syncthreads_and(has_come) != 0;
}

// A lane per rank: the slots of this block's operations up to `epoch` are free.
__device__ inline void tell_done(const Mesh& mesh, uint64_t done, uint64_t epoch) {
  if (lane_id() >= mesh.num_ranks) return;
  uint64_t* words = at<uint64_t>(mesh, lane_id(), done);
  // Partner: the load in wait_room at that rank.
  commlib::store_relaxed(words + uint64_t(mesh.rank) * gridDim.x + blockIdx.x, epoch);
}

// Every thread of the block, at its start. What earlier kernels have read is free: the end of a
// kernel orders it before, without a fence that somebody waits for.
__device__ inline const uint64_t* start_latency(const Mesh& mesh, const LatencyRegions& regions) {
  const uint64_t* epochs = block_epochs(mesh, regions);
  if (warp_id() == int(blockDim.x / 32) - 1) {
    tell_done(mesh, regions.dispatch_done, epochs[kTakenIn]);
    tell_done(mesh, regions.combine_done, epochs[kAddedUp]);
  }
  return epochs;
}

// Every thread of the block, at its end: counts the operation. Second halves also tell at once that
// their slots are free, since the next kernel may be long in coming.
__device__ inline void finish_latency(const Mesh& mesh, const LatencyRegions& regions,
                                      uint32_t phases, LatencyCounter sent, LatencyCounter received,
                                      uint64_t done) {
  __syncthreads();
  if (warp_id() != 0) return;
  uint64_t* epochs = block_epochs(mesh, regions);
  const uint64_t epoch = epochs[received] + 1;
  __syncwarp();  // all lanes have read it
  if (lane_id() == 0 && (phases & kSend)) epochs[sent] += 1;
  if (lane_id() == 0 && (phases & kReceive)) epochs[received] = epoch;
  if (phases != kReceive) return;
  fence_system();  // what the block has read, before the word that lets it be overwritten
  tell_done(mesh, done, epoch);
}

}  // namespace commlib::cuda
