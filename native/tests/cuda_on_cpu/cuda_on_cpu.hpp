// Enough of CUDA C++ to run simple kernels on a CPU: a thread per CUDA thread, one block after the
// other. Finds wrong indices; says nothing about speed or memory order. Include it before the
// kernels.
#pragma once

#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // there is one block at a time

struct uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }

struct Dim {
  unsigned x = 1;
};
inline thread_local Dim threadIdx, blockIdx;
inline Dim blockDim, gridDim;

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

namespace cuda_on_cpu {

struct Warp {
  std::barrier<> barrier{32};
  uint32_t values[32];
};
inline std::vector<std::unique_ptr<Warp>> warps;
inline std::unique_ptr<std::barrier<>> block;

inline Warp& warp() { return *warps[threadIdx.x / 32]; }

// `read(values of all lanes)` between two barriers.
template <typename Read>
uint32_t exchange(uint32_t value, Read read) {
  Warp& mine = warp();
  mine.values[threadIdx.x % 32] = value;
  mine.barrier.arrive_and_wait();
  const uint32_t result = read(mine.values);
  mine.barrier.arrive_and_wait();
  return result;
}

template <typename Kernel, typename Call>
void launch(Kernel kernel, const Call& call, unsigned num_blocks, unsigned num_threads) {
  blockDim.x = num_threads, gridDim.x = num_blocks;
  for (unsigned number = 0; number < num_blocks; ++number) {
    warps.clear();
    for (unsigned i = 0; i < num_threads / 32; ++i) warps.push_back(std::make_unique<Warp>());
    block = std::make_unique<std::barrier<>>(num_threads);
    std::vector<std::thread> threads;
    for (unsigned i = 0; i < num_threads; ++i)
      threads.emplace_back([=, &call] {
        threadIdx.x = i, blockIdx.x = number;
        kernel(call);
      });
    for (std::thread& thread : threads) thread.join();
  }
}

}  // namespace cuda_on_cpu

inline void __syncthreads() { cuda_on_cpu::block->arrive_and_wait(); }
inline void __syncwarp() { cuda_on_cpu::warp().barrier.arrive_and_wait(); }
inline uint32_t __shfl_xor_sync(uint32_t, uint32_t value, uint32_t delta) {
  const uint32_t other = threadIdx.x % 32 ^ delta;
  return cuda_on_cpu::exchange(value, [other](const uint32_t* all) { return all[other]; });
}
inline float __shfl_xor_sync(uint32_t mask, float value, uint32_t delta) {
  return __uint_as_float(__shfl_xor_sync(mask, __float_as_uint(value), delta));
}
inline uint32_t __reduce_max_sync(uint32_t, uint32_t value) {
  return cuda_on_cpu::exchange(
      value, [](const uint32_t* all) { return *std::max_element(all, all + 32); });
}
