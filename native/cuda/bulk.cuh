// Bulk copies (TMA) of rows through shared memory: one load, then one store for each lane that has
// a target. A warp owns its stages; nothing is shared between warps.
#pragma once

#include "cuda/wait.cuh"

namespace commlib::cuda {

struct NoTransform {
  __device__ uint32_t operator()(uint8_t*, uint32_t bytes, int) const { return bytes; }
};

// A warp's stages. Pieces are loaded up to kAhead ahead and stored in the order of loading; the
// other stages hold what stores still read. Every stored piece is one bulk group of every lane, so
// groups count pieces. kLanes: lanes that may have a target.
template <int kStages, int kAhead, int kLanes>
struct RowPipe {
  static constexpr uint32_t kTableBytes = kStages * (kLanes * 8 + 8 + 4);
  static constexpr uint32_t kMostAhead = kAhead;
  // Of the memory of a warp: bulk copies from and to stages that start elsewhere took a quarter
  // longer.
  static constexpr uint32_t kAlignment = 128;

  uint8_t* stages;
  uint64_t* ready;    // [stage]
  uint64_t* targets;  // [stage][lane]: where the lane stores the piece; 0: nowhere
  uint32_t* lengths;  // [stage]
  uint32_t piece_bytes;
  uint32_t loaded = 0;
  uint32_t stored = 0;

  // `memory`: kStages * piece bytes, then kTableBytes.
  __device__ void init(uint8_t* memory, uint32_t bytes) {
    piece_bytes = bytes;
    stages = memory;
    targets = reinterpret_cast<uint64_t*>(memory + kStages * bytes);
    ready = targets + kStages * kLanes;
    lengths = reinterpret_cast<uint32_t*>(ready + kStages);
    if (lane_id() == 0)
      for (int s = 0; s < kStages; ++s) init_barrier(ready + s);
    fence_barrier_init();
    __syncwarp();
  }

  // Room for one put(). The stage it will take (loaded % kStages) and its tables are out of use
  // then. `transform(stage, bytes, stage number)` may rewrite a piece in place and returns its new
  // size.
  template <typename Transform>
  __device__ void make_room(Transform& transform) {
    if (loaded - stored == kAhead) store_oldest(transform);
  }

  __device__ void put(const uint8_t* from, uint32_t bytes, uint64_t target) {
    // Of the groups that are newer than the one that stored from this stage.
    bulk_wait_read<kStages - kAhead>();
    const uint32_t stage = loaded % kStages;
    if (lane_id() < kLanes) targets[stage * kLanes + lane_id()] = target;
    if (lane_id() == 0) lengths[stage] = bytes;
    __syncwarp();  // every lane's store has read the stage, and the tables are written
    if (lane_id() == 0) bulk_load(stages + stage * piece_bytes, from, bytes, ready + stage);
    ++loaded;
  }

  // The newest `pieces`, put without a target, none of them stored, are one row that goes to the
  // lane's `target`; 0: nowhere.
  __device__ void aim(uint64_t target, uint32_t pieces) {
    if (lane_id() >= kLanes || target == 0) return;
    for (uint32_t i = 0; i < pieces; ++i)
      targets[(loaded - pieces + i) % kStages * kLanes + lane_id()] =
          target + uint64_t(i) * piece_bytes;
  }

  template <typename Transform>
  __device__ void store_oldest(Transform& transform) {
    const uint32_t stage = stored % kStages;
    uint8_t* piece = stages + stage * piece_bytes;
    wait_barrier(ready + stage, (stored / kStages) & 1);
    const uint32_t bytes = transform(piece, lengths[stage], int(stage));
    const uint64_t target = lane_id() < kLanes ? targets[stage * kLanes + lane_id()] : 0;
    if (target != 0) bulk_store(reinterpret_cast<void*>(target), piece, bytes);
    bulk_commit();
    ++stored;
  }

  // Waits for what is being loaded and stores none of it: loads must not outlive the block.
  __device__ void abandon() {
    for (; stored < loaded; ++stored)
      wait_barrier(ready + stored % kStages, (stored / kStages) & 1);
  }

  // Stores what is loaded and waits until all of it has been written.
  template <typename Transform>
  __device__ void drain(Transform& transform) {
    while (stored < loaded) store_oldest(transform);
    bulk_wait<0>();
    __syncwarp();
  }
};

// uint32 [writer][number] in every rank's control region: epoch in which the writer's row came.
struct Flags {
  uint64_t offset;
  uint32_t per_writer;
};

// Rows of a warp that are on their way to peers, and the flags that will tell of their arrival.
// Flags follow in batches: one fence orders the rows before all of them.
//
// kLanes: lanes that may have a row each. kBatch: rows told together; a larger batch has fewer
// fences and keeps receivers waiting longer. kLag: newest pieces that need not be complete when a
// batch goes. kRows: pending at most.
template <int kLanes, uint32_t kBatch, uint32_t kLag, uint32_t kRows>
struct Announcer {
  // When the ring is full its oldest row must be old enough to be told, even if every row is one
  // piece and the pipe still holds the newest unstored ones.
  static_assert(kRows >= kLag + 4 && kRows >= kBatch, "rows would be overwritten untold");
  static constexpr uint32_t kNobody = ~0u;
  static constexpr uint32_t kNumberBits = 27;  // of a record; the rank is above
  static constexpr uint32_t kBytes = kRows * (kLanes * 4 + 4);

  uint32_t* places;  // [row][lane]: rank and record to tell, or kNobody
  uint32_t* ends;    // [row]: pieces stored when the row is
  uint32_t added = 0;
  uint32_t told = 0;

  __device__ void init(uint8_t* memory) {
    places = reinterpret_cast<uint32_t*>(memory);
    ends = places + kRows * kLanes;
  }

  __device__ static uint32_t place(int rank, int record) {
    return uint32_t(rank) << kNumberBits | uint32_t(record);
  }

  // A row that is complete once `end` pieces are. `tell` after it keeps room for the next.
  __device__ void add(uint32_t where, uint32_t end) {
    if (lane_id() < kLanes) places[added % kRows * kLanes + uint32_t(lane_id())] = where;
    if (lane_id() == 0) ends[added % kRows] = end;
    ++added;
    __syncwarp();
  }

  // Tells of rows whose pieces are old enough, if they make a batch.
  template <typename Pipe>
  __device__ void tell(const Mesh& mesh, const Flags& flags, uint32_t epoch, const Pipe& pipe) {
    uint32_t complete = told;
    while (complete < added && ends[complete % kRows] + kLag <= pipe.stored) ++complete;
    if (complete - told < kBatch && added - told < kRows) return;
    bulk_wait<int(kLag)>();
    tell_until(mesh, flags, epoch, complete);
  }

  // After drain(): all of them.
  __device__ void tell_all(const Mesh& mesh, const Flags& flags, uint32_t epoch) {
    tell_until(mesh, flags, epoch, added);
  }

  __device__ void tell_until(const Mesh& mesh, const Flags& flags, uint32_t epoch, uint32_t end) {
    if (told == end) return;
    __syncwarp();
    fence_system();  // partner: the acquire in wait_arrived at the receiver
    for (; told < end; ++told) {
      const uint32_t where =
          lane_id() < kLanes ? places[told % kRows * kLanes + uint32_t(lane_id())] : kNobody;
      if (where == kNobody) continue;
      const uint64_t record = where & ((1u << kNumberBits) - 1);
      uint32_t* words = at<uint32_t>(mesh, int(where >> kNumberBits), flags.offset);
      store_relaxed(words + uint64_t(mesh.rank) * flags.per_writer + record, epoch);
    }
    __syncwarp();  // places may be overwritten
  }
};

}  // namespace commlib::cuda
