// Bulk copies (TMA) of rows through shared memory: one load, then one store for each lane that has a
// target. A warp owns its stages; nothing is shared between warps.
#pragma once

#include "cuda/wait.cuh"

namespace commlib::cuda {

constexpr int kStages = 3;

__device__ inline uint32_t shared_address(const void* pointer) {
  return uint32_t(__cvta_generic_to_shared(pointer));
}

__device__ inline void bulk_load(void* stage, const void* from, uint32_t bytes, uint64_t* ready) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(ready)),
               "r"(bytes)
               : "memory");
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
          shared_address(stage)),
      "l"(from), "r"(bytes), "r"(shared_address(ready))
      : "memory");
}

__device__ inline void bulk_store(void* to, const void* stage, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to),
               "r"(shared_address(stage)), "r"(bytes)
               : "memory");
}

__device__ inline void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// All but the newest N groups of this thread have read their shared memory.
template <int N>
__device__ inline void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
}

// All but the newest N groups of this thread are complete: their writes are visible to this thread.
template <int N>
__device__ inline void bulk_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(N) : "memory");
}

// Orders this thread's ordinary accesses before its later bulk copies of the same memory.
__device__ inline void fence_async() { asm volatile("fence.proxy.async;" ::: "memory"); }

__device__ inline void init_barrier(uint64_t* barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
}

// Ends by itself: it waits for bulk loads from own memory only.
__device__ inline void wait_barrier(uint64_t* barrier, uint32_t parity) {
  uint32_t is_done = 0;
  while (is_done == 0)
    asm volatile(
        "{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
        : "=r"(is_done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
}

struct NoTransform {
  __device__ uint32_t operator()(uint8_t*, uint32_t bytes, int) const { return bytes; }
};

// A warp's stages. Pieces are loaded kStages - 1 ahead and stored in the order of loading.
struct RowPipe {
  uint8_t* stages;
  uint64_t* ready;    // [stage]
  uint64_t* targets;  // [stage][lane]: where the lane stores the piece; 0: nowhere
  uint32_t* lengths;  // [stage]
  uint32_t piece_bytes;
  uint32_t loaded = 0;
  uint32_t stored = 0;

  __device__ void init() {
    if (lane_id() == 0)
      for (int s = 0; s < kStages; ++s) init_barrier(ready + s);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    __syncwarp();
  }

  // `transform(stage, bytes, stage number)` may rewrite a piece in place and returns its new size.
  template <typename Transform = NoTransform>
  __device__ void put(const uint8_t* from, uint32_t bytes, uint64_t target,
                      const Transform& transform = {}) {
    if (loaded - stored == kStages - 1) store_oldest(transform);
    // The stage was stored from two groups ago.
    bulk_wait_read<1>();
    const uint32_t stage = loaded % kStages;
    targets[stage * 32 + lane_id()] = target;
    if (lane_id() == 0) lengths[stage] = bytes;
    __syncwarp();  // every lane's store has read the stage, and the tables are written
    if (lane_id() == 0) bulk_load(stages + stage * piece_bytes, from, bytes, ready + stage);
    ++loaded;
  }

  template <typename Transform = NoTransform>
  __device__ void store_oldest(const Transform& transform = {}) {
    const uint32_t stage = stored % kStages;
    uint8_t* piece = stages + stage * piece_bytes;
    wait_barrier(ready + stage, (stored / kStages) & 1);
    const uint32_t bytes = transform(piece, lengths[stage], int(stage));
    const uint64_t target = targets[stage * 32 + lane_id()];
    if (target != 0) bulk_store(reinterpret_cast<void*>(target), piece, bytes);
    bulk_commit();
    ++stored;
  }

  // Stores what is loaded and waits until all of it has been written.
  template <typename Transform = NoTransform>
  __device__ void drain(const Transform& transform = {}) {
    while (stored < loaded) store_oldest(transform);
    bulk_wait<0>();
    __syncwarp();
  }
};

}  // namespace commlib::cuda
