// Instructions that CUDA C++ has no word for. The kernels that move rows use no other PTX but the
// casts in e4m3.cuh, so that native/tests/cuda_on_cpu can stand in for both files.
#pragma once

#include "common/types.hpp"

namespace commlib::cuda {

// ---- words that other processors and GPUs read and write

__device__ inline uint32_t load_acquire(const uint32_t* word) {
  uint32_t value;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(word) : "memory");
  return value;
}

__device__ inline void store_relaxed(uint32_t* word, uint32_t value) {
  asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(word), "r"(value) : "memory");
}

__device__ inline void fence_system() { asm volatile("fence.acq_rel.sys;" ::: "memory"); }
__device__ inline void fence_device() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

__device__ inline uint64_t now_ns() {
  uint64_t ns;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(ns));
  return ns;
}

// ---- packets: see packet.cuh

struct Packet {
  uint32_t words[3];
  uint32_t epoch;
};
static_assert(sizeof(Packet) == 16);

// One access of 128 bits: a vector of words might come apart (PTX, memory consistency model).
__device__ inline void store_packet(Packet* to, const Packet& packet) {
  asm volatile(
      "{.reg .b64 low, high; .reg .b128 all; mov.b64 low, {%1, %2}; mov.b64 high, {%3, %4}; "
      "mov.b128 all, {low, high}; st.relaxed.sys.global.b128 [%0], all;}" ::"l"(to),
      "r"(packet.words[0]), "r"(packet.words[1]), "r"(packet.words[2]), "r"(packet.epoch)
      : "memory");
}

__device__ inline Packet load_packet(const Packet* from) {
  Packet packet;
  asm volatile(
      "{.reg .b64 low, high; .reg .b128 all; ld.relaxed.sys.global.b128 all, [%4]; "
      "mov.b128 {low, high}, all; mov.b64 {%0, %1}, low; mov.b64 {%2, %3}, high;}"
      : "=r"(packet.words[0]), "=r"(packet.words[1]), "=r"(packet.words[2]), "=r"(packet.epoch)
      : "l"(from)
      : "memory");
  return packet;
}

// ---- bulk copies (TMA) and what waits for them

__device__ inline uint32_t shared_address(const void* pointer) {
  return uint32_t(__cvta_generic_to_shared(pointer));
}

__device__ inline void bulk_load(void* stage, const void* from, uint32_t bytes, uint64_t* ready) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(ready)),
      "r"(bytes)
      : "memory");
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(stage)),
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

// Orders this thread's ordinary accesses of global (shared) memory before later bulk copies of it.
// The fence over all memory would wait for the stores under way, too.
__device__ inline void fence_async_global() {
  asm volatile("fence.proxy.async.global;" ::: "memory");
}
__device__ inline void fence_async_shared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Barriers that this thread has initialised, before bulk copies that complete on them.
__device__ inline void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ inline void init_barrier(uint64_t* barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
}

// Ends by itself: it waits for bulk loads from own memory only.
__device__ inline void wait_barrier(uint64_t* barrier, uint32_t parity) {
  uint32_t is_done = 0;
  while (is_done == 0)
    asm volatile(
        "{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, "
        "p;}"
        : "=r"(is_done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
}

// ---- numbers

// Rounded to nearest, ties to even; the first in the lower half.
__device__ inline uint32_t to_bf16x2(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// ---- the block

// The dynamic shared memory that it was launched with.
__device__ inline uint8_t* dynamic_shared() {
  extern __shared__ __align__(128) uint8_t memory[];
  return memory;
}
__device__ inline uint32_t dynamic_shared_bytes() {
  uint32_t bytes;
  asm("mov.u32 %0, %dynamic_smem_size;" : "=r"(bytes));
  return bytes;
}

}  // namespace commlib::cuda
