// Enough of CUDA C++ to run kernels on a CPU: a thread per CUDA thread. Blocks run one after the
// other, or each in a copy of the library of its own, which is what __shared__ variables ask for.
// Finds wrong indices, and blocks that wait for each other in vain; says nothing about speed or
// memory order. Include it before the kernels.
#pragma once

#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

struct uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

struct Dim {
  unsigned x = 1;
};
inline thread_local Dim threadIdx, blockIdx;
inline Dim blockDim, gridDim;

using std::isfinite;
using std::max;
using std::min;

inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline float __int_as_float(int bits) { return __uint_as_float(uint32_t(bits)); }
// Compiled without contraction of operations.
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline uint32_t __vmaxu2(uint32_t x, uint32_t y) {
  return max(x >> 16, y >> 16) << 16 | max(x & 0xffffu, y & 0xffffu);
}

inline uint32_t __umulhi(uint32_t x, uint32_t y) { return uint32_t(uint64_t(x) * y >> 32); }
inline int __popc(uint32_t bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
[[noreturn]] inline void __trap() { std::abort(); }

inline uint32_t atomicAdd(uint32_t* word, uint32_t value) {
  return __atomic_fetch_add(word, value, __ATOMIC_RELAXED);
}
inline uint32_t atomicOr(uint32_t* word, uint32_t value) {
  return __atomic_fetch_or(word, value, __ATOMIC_RELAXED);
}
inline uint32_t atomicInc(uint32_t* word, uint32_t last) {
  uint32_t old = __atomic_load_n(word, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(word, &old, old >= last ? 0 : old + 1, false,
                                      __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return old;
}
inline uint32_t atomicExch(uint32_t* word, uint32_t value) {
  return __atomic_exchange_n(word, value, __ATOMIC_RELAXED);
}
inline unsigned long long atomicMin(unsigned long long* word, unsigned long long value) {
  unsigned long long old = __atomic_load_n(word, __ATOMIC_RELAXED);
  while (value < old && !__atomic_compare_exchange_n(word, &old, value, false, __ATOMIC_RELAXED,
                                                     __ATOMIC_RELAXED)) {
  }
  return old;
}

namespace cuda_on_cpu {

struct Warp {
  std::barrier<> barrier{32};
  uint64_t values[32];
};

struct Block {
  explicit Block(unsigned num_threads, size_t shared_bytes)
      : barrier(num_threads), votes(num_threads), shared(shared_bytes + 128) {
    for (unsigned i = 0; i < num_threads / 32; ++i) warps.push_back(std::make_unique<Warp>());
  }
  std::barrier<> barrier;
  std::vector<uint8_t> votes;
  std::vector<uint8_t> shared;  // dynamic; with room to align it
  std::vector<std::unique_ptr<Warp>> warps;
};
inline thread_local Block* block;

inline Warp& warp() { return *block->warps[threadIdx.x / 32]; }

// `read(values of all lanes)` between two barriers.
template <typename Read>
auto exchange(uint64_t value, Read read) {
  Warp& mine = warp();
  mine.values[threadIdx.x % 32] = value;
  mine.barrier.arrive_and_wait();
  const auto result = read(mine.values);
  mine.barrier.arrive_and_wait();
  return result;
}

// Runs one block of a kernel to its end.
template <typename... Calls>
void run_block(void (*kernel)(Calls...), unsigned number, size_t shared_bytes,
               const std::remove_cvref_t<Calls>&... calls) {
  Block own(blockDim.x, shared_bytes);
  std::vector<std::thread> threads;
  for (unsigned i = 0; i < blockDim.x; ++i)
    threads.emplace_back([&, i] {
      block = &own, threadIdx.x = i, blockIdx.x = number;
      kernel(calls...);
    });
  for (std::thread& thread : threads) thread.join();
}

// The same for structs as a launch through the driver has them: a pointer to each.
template <typename... Calls>
void run_block_of(void (*kernel)(Calls...), unsigned number, unsigned num_blocks,
                  unsigned num_threads, size_t shared_bytes, const void* const* structs) {
  blockDim.x = num_threads, gridDim.x = num_blocks;
  [&]<size_t... I>(std::index_sequence<I...>) {
    run_block(kernel, number, shared_bytes,
              *static_cast<const std::remove_cvref_t<Calls>*>(structs[I])...);
  }(std::index_sequence_for<Calls...>{});
}

// One block after the other.
template <typename Call>
void launch(void (*kernel)(Call), const std::remove_cvref_t<Call>& call, unsigned num_blocks,
            unsigned num_threads) {
  blockDim.x = num_threads, gridDim.x = num_blocks;
  for (unsigned number = 0; number < num_blocks; ++number) run_block(kernel, number, 0, call);
}

}  // namespace cuda_on_cpu

inline void __syncthreads() { cuda_on_cpu::block->barrier.arrive_and_wait(); }
inline int __syncthreads_and(int is_yes) {
  cuda_on_cpu::Block& block = *cuda_on_cpu::block;
  block.votes[threadIdx.x] = is_yes != 0;
  __syncthreads();
  const bool all = std::count(block.votes.begin(), block.votes.end(), uint8_t(0)) == 0;
  __syncthreads();
  return all;
}
inline void __syncwarp() { cuda_on_cpu::warp().barrier.arrive_and_wait(); }

// Of 32 or 64 bits.
template <typename T>
T __shfl_sync(uint32_t, T value, int lane) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = cuda_on_cpu::exchange(bits, [lane](const uint64_t* all) { return all[lane & 31]; });
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
template <typename T>
T __shfl_xor_sync(uint32_t mask, T value, uint32_t delta) {
  return __shfl_sync(mask, value, int(threadIdx.x % 32 ^ delta));
}
template <typename T>
T __shfl_up_sync(uint32_t mask, T value, uint32_t delta) {
  const uint32_t lane = threadIdx.x % 32;
  return __shfl_sync(mask, value, int(lane < delta ? lane : lane - delta));
}
inline uint32_t __ballot_sync(uint32_t, int is_yes) {
  return cuda_on_cpu::exchange(is_yes != 0, [](const uint64_t* all) {
    uint32_t bits = 0;
    for (int i = 0; i < 32; ++i) bits |= uint32_t(all[i]) << i;
    return bits;
  });
}
inline int __any_sync(uint32_t mask, int is_yes) { return __ballot_sync(mask, is_yes) != 0; }
inline int __all_sync(uint32_t mask, int is_yes) { return __ballot_sync(mask, is_yes) == ~0u; }
inline uint32_t __match_any_sync(uint32_t, int value) {
  return cuda_on_cpu::exchange(uint32_t(value), [value](const uint64_t* all) {
    uint32_t bits = 0;
    for (int i = 0; i < 32; ++i) bits |= uint32_t(all[i] == uint32_t(value)) << i;
    return bits;
  });
}
inline uint32_t __reduce_max_sync(uint32_t, uint32_t value) {
  return cuda_on_cpu::exchange(
      value, [](const uint64_t* all) { return uint32_t(*std::max_element(all, all + 32)); });
}
inline uint32_t __reduce_add_sync(uint32_t, uint32_t value) {
  return cuda_on_cpu::exchange(value, [](const uint64_t* all) {
    uint32_t sum = 0;
    for (int i = 0; i < 32; ++i) sum += uint32_t(all[i]);
    return sum;
  });
}
inline int __reduce_min_sync(uint32_t, int value) {
  return cuda_on_cpu::exchange(uint32_t(value), [](const uint64_t* all) {
    int least = int(uint32_t(all[0]));
    for (int i = 1; i < 32; ++i) least = min(least, int(uint32_t(all[i])));
    return least;
  });
}
inline void __nanosleep(unsigned) { std::this_thread::yield(); }
inline float __fadd_rn(float x, float y) { return x + y; }
