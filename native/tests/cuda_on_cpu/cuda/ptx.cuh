// In place of native/cuda/ptx.cuh on a CPU. Bulk copies are done at once; what hardware demands of
// their addresses and sizes is checked.
#pragma once

#include <chrono>
#include <mutex>

#include "common/types.hpp"

namespace commlib::cuda {

// Whoever polls lets others go on: there are many more threads than processors.
inline void yield_now_and_then() {
  static thread_local unsigned polls = 0;
  if (++polls % 8 == 0) std::this_thread::yield();
}

inline uint32_t load_acquire(const uint32_t* word) {
  yield_now_and_then();
  return __atomic_load_n(word, __ATOMIC_ACQUIRE);
}
inline void store_relaxed(uint32_t* word, uint32_t value) {
  __atomic_store_n(word, value, __ATOMIC_RELAXED);
}
inline void fence_system() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void fence_device() { fence_system(); }
inline uint64_t now_ns() {
  std::this_thread::yield();
  return uint64_t(
      std::chrono::nanoseconds(std::chrono::steady_clock::now().time_since_epoch()).count());
}

struct Packet {
  uint32_t words[3];
  uint32_t epoch;
};
static_assert(sizeof(Packet) == 16);

inline void check_alignment(const void* address, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(address) % 16 != 0 || bytes % 16 != 0 || bytes == 0) __trap();
}

inline std::mutex& lock_of(const Packet* packet) {
  static std::mutex locks[61];
  return locks[reinterpret_cast<uintptr_t>(packet) / 16 % 61];
}
inline void store_packet(Packet* to, const Packet& packet) {
  check_alignment(to, sizeof packet);
  const std::lock_guard<std::mutex> guard(lock_of(to));
  *to = packet;
}
inline Packet load_packet(const Packet* from) {
  check_alignment(from, sizeof(Packet));
  yield_now_and_then();
  const std::lock_guard<std::mutex> guard(lock_of(from));
  return *from;
}

// A barrier counts its phases.
inline void init_barrier(uint64_t* barrier) { *barrier = 0; }
inline void fence_barrier_init() {}
inline void bulk_load(void* stage, const void* from, uint32_t bytes, uint64_t* ready) {
  check_alignment(stage, bytes);
  check_alignment(from, bytes);
  std::memcpy(stage, from, bytes);
  __atomic_fetch_add(ready, 1, __ATOMIC_RELEASE);
}
inline void wait_barrier(uint64_t* barrier, uint32_t parity) {
  while ((__atomic_load_n(barrier, __ATOMIC_ACQUIRE) & 1) == parity) std::this_thread::yield();
}
inline void bulk_store(void* to, const void* stage, uint32_t bytes) {
  check_alignment(stage, bytes);
  check_alignment(to, bytes);
  std::memcpy(to, stage, bytes);
}
inline void bulk_commit() {}
template <int>
void bulk_wait_read() {}
template <int>
void bulk_wait() {}
inline void fence_async_global() {}
inline void fence_async_shared() {}

inline uint32_t to_bf16(float value) {
  uint32_t bits = __float_as_uint(value);
  if (std::isnan(value)) return 0x7fff;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline uint32_t to_bf16x2(float low, float high) { return to_bf16(low) | to_bf16(high) << 16; }

inline uint8_t* dynamic_shared() {
  const auto start = reinterpret_cast<uintptr_t>(cuda_on_cpu::block->shared.data());
  return reinterpret_cast<uint8_t*>(align_up(start, 128));
}
inline uint32_t dynamic_shared_bytes() { return uint32_t(cuda_on_cpu::block->shared.size() - 128); }

}  // namespace commlib::cuda
