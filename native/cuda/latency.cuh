// The latency regime: no exchange before the rows. A row goes to its own place [source][token] at
// each rank that wants it, the counts go beside the rows, and the receiver works out the order.
//
// Slots have two generations. The operation after next may write a slot again once its rank has
// said that it has taken the rows in (dispatch_done, combine_done).
#pragma once

#include "cuda/bulk.cuh"
#include "layout/record.hpp"

namespace commlib::cuda {

enum LatencyCounter { kDispatchSent = 0, kTakenIn = 1, kCombineSent = 2, kAddedUp = 3 };
constexpr uint32_t kMaxParts = 16;  // of a row, each the work of one warp
enum LatencyPhase : uint32_t { kSend = 1, kReceive = 2 };
constexpr uint32_t kDisagree = 5;  // a Status: the ranks' calls differ

// Where things lie in every rank's control region.
struct LatencyRegions {
  uint64_t slots;          // [generation][source][token] row, scales, record
  uint64_t messages;       // [generation][source]
  uint64_t message_epoch;  // [source] line
  uint64_t row_epoch;      // [source][token][part] uint32: newest epoch that lies in the slot
  uint64_t partials;       // [generation][writer][token] row
  uint64_t partial_epoch;  // [writer][token][part] uint32
  uint64_t dispatch_done;  // [rank] line: newest epoch whose rows that rank has taken in
  uint64_t combine_done;   // [rank] line
  uint32_t max_tokens;
  uint32_t slot_bytes, scales_offset, record_offset;
  uint32_t partial_bytes;
  uint32_t message_bytes;
};

// To every rank, from every rank, in every dispatch. Behind it, uint32: which tokens come to that
// rank [max_tokens / 32] bits, tokens per expert [E].
struct LatencyMessage {
  uint32_t status;
  uint32_t bad_index;  // token * num_topk + slot
  int64_t bad_value;
  uint32_t agreed;  // hash of what must be equal on all ranks
  uint32_t num_tokens;
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
  uint32_t num_tokens, in_row_bytes, row_bytes, num_scales, piece_bytes;
  uint32_t alignment, cast, dtype, capacity;
  uint32_t agreed, status;  // kOk, or kRejected: the host found the input bad
  uint32_t phases;
  uint32_t shared_offset;  // of what the block shares, behind the warps' memory
};

__device__ inline Flags row_flags(const LatencyRegions& regions) {
  return {regions.row_epoch, regions.max_tokens * kMaxParts};
}
__device__ inline Flags partial_flags(const LatencyRegions& regions) {
  return {regions.partial_epoch, regions.max_tokens * kMaxParts};
}

__device__ inline uint32_t mask_words(const LatencyRegions& regions) {
  return (regions.max_tokens + 31) / 32;
}

__device__ inline LatencyMessage* message(const Mesh& mesh, const LatencyRegions& regions, int rank,
                                          uint64_t epoch, int source) {
  const uint64_t index = (epoch & 1) * uint64_t(mesh.num_ranks) + uint64_t(source);
  return at<LatencyMessage>(mesh, rank, regions.messages + index * regions.message_bytes);
}

__device__ inline uint32_t* message_mask(LatencyMessage* head) {
  return reinterpret_cast<uint32_t*>(head + 1);
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

// "This part came in this epoch or, its place being taken again, a later one": one writer, never
// reset. Epochs are compared as numbers on a circle.
__device__ inline bool wait_part(const Mesh& mesh, const Flags& flags, int writer, uint32_t number,
                                 uint32_t epoch, Phase phase) {
  const uint32_t* flag =
      at<uint32_t>(mesh, mesh.rank, flags.offset) + uint64_t(writer) * flags.per_writer + number;
  return wait_until(mesh, {phase, writer, epoch, epoch}, [=](uint64_t* seen) {
    const uint32_t value = load_acquire(flag);  // partner: Announcer::tell_until at the writer
    *seen = value;
    return int32_t(value - epoch) >= 0;
  });
}

// Parts of rows that a grid's warps take in turn, first the same part of all blocks.
struct PartTasks {
  uint32_t number, end, step, parts;

  __device__ PartTasks(uint32_t rows, uint32_t parts_of_row)
      : number(blockIdx.x + gridDim.x * uint32_t(warp_id())),
        end(rows * parts_of_row),
        step(gridDim.x * (blockDim.x / 32)),
        parts(parts_of_row) {}
  __device__ bool has_one() const { return number < end; }
  __device__ uint32_t row() const { return number / parts; }
  __device__ uint32_t part() const { return number % parts; }
  __device__ void next() { number += step; }
};

// Every thread of the block. False: the Runtime is faulty.
__device__ inline bool wait_lines(const Mesh& mesh, uint64_t lines, uint64_t epoch, Phase phase) {
  bool has_come = true;
  const int rank = int(threadIdx.x);
  if (rank < mesh.num_ranks) {
    const uint64_t* word = at<uint64_t>(mesh, mesh.rank, lines + kLine * rank);
    has_come = wait_until(mesh, {phase, rank, epoch, epoch}, [=](uint64_t* seen) {
      *seen = load_acquire(word);  // partner: tell_line at that rank
      return int64_t(*seen - epoch) >= 0;
    });
  }
  return __syncthreads_and(has_come) != 0;
}

// One thread, after all that it vouches for.
__device__ inline void tell_line(const Mesh& mesh, uint64_t lines, int rank, uint64_t epoch) {
  fence_system();
  commlib::store_relaxed(at<uint64_t>(mesh, rank, lines + kLine * mesh.rank), epoch);
}

// The slots of the operation before the last are free at all ranks.
__device__ inline bool wait_room(const Mesh& mesh, uint64_t done, uint64_t epoch) {
  return wait_lines(mesh, done, epoch < 2 ? 0 : epoch - 2, kRoom);
}

// Every thread of every block, at its end. The block that comes last counts the operation.
__device__ inline void finish_latency(const Mesh& mesh, uint32_t phases, LatencyCounter sent,
                                      LatencyCounter received, uint64_t done) {
  __syncthreads();
  if (warp_id() != 0) return;
  Workspace& workspace = *mesh.workspace;
  bool is_last = false;
  if (lane_id() == 0) {
    fence_device();
    is_last = atomicInc(&workspace.latency_blocks, gridDim.x - 1) == gridDim.x - 1;
    fence_device();
  }
  if (!__shfl_sync(0xffffffffu, int(is_last), 0)) return;
  const uint64_t epoch = workspace.latency_epochs[received] + 1;
  __syncwarp();  // all lanes have read it
  if (lane_id() == 0 && (phases & kSend)) workspace.latency_epochs[sent] += 1;
  if ((phases & kReceive) == 0) return;
  if (lane_id() == 0) workspace.latency_epochs[received] = epoch;
  if (lane_id() < mesh.num_ranks) tell_line(mesh, done, lane_id(), epoch);
}

}  // namespace commlib::cuda
