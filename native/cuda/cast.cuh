// BF16 or FP32 columns to E4M3 with one FP32 scale per 128 columns, in a stage of shared memory.
// Formulas: commlib/quant.py.
#pragma once

#include "cuda/params.cuh"

namespace commlib::cuda {

__device__ inline void unpack8(const uint8_t* from, uint32_t dtype, float (&values)[8]) {
  const uint4 first = *reinterpret_cast<const uint4*>(from);
  const uint32_t words[4] = {first.x, first.y, first.z, first.w};
  if (dtype == uint32_t(Dtype::kBf16)) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      values[2 * i] = __uint_as_float(words[i] << 16);
      values[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
    return;
  }
  const uint4 second = *reinterpret_cast<const uint4*>(from + 16);
  const uint32_t more[4] = {second.x, second.y, second.z, second.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    values[i] = __uint_as_float(words[i]);
    values[4 + i] = __uint_as_float(more[i]);
  }
}

// 2^ceil(log2(scale)): a scale with mantissa bits goes to the next power; infinity stays.
__device__ inline float next_power_of_two(float scale) {
  const uint32_t bits = __float_as_uint(scale);
  return __uint_as_float(bits >= 0x7f800000u ? bits : (bits + 0x7fffffu) & 0x7f800000u);
}

__device__ inline uint32_t to_e4m3x2(float low, float high) {
  uint16_t pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
  return pair;
}

// Half a warp per block of 128 columns, 8 columns a lane. In place: the casts of one round end before
// the columns of the next one begin. Scales go to `scales` (shared); returns the new size.
__device__ inline uint32_t cast_piece(uint8_t* piece, uint32_t bytes, uint32_t dtype, uint32_t cast,
                                      float* scales) {
  const uint32_t element = dtype == uint32_t(Dtype::kBf16) ? 2 : 4;
  const uint32_t blocks = bytes / (uint32_t(kScaleBlock) * element);
  const uint32_t lane = threadIdx.x % 32, half = lane / 16, column = lane % 16 * 8;
  for (uint32_t first = 0; first < blocks; first += 2) {
    const uint32_t block = first + half;
    const bool is_there = block < blocks;
    float values[8];
    unpack8(piece + (uint64_t(is_there ? block : first) * kScaleBlock + column) * element, dtype, values);
    uint32_t top = 0;  // |x| as bits orders like |x|; a NaN is left out and only spoils itself
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint32_t magnitude = __float_as_uint(values[i]) & 0x7fffffffu;
      if (magnitude <= 0x7f800000u) top = max(top, magnitude);
    }
#pragma unroll
    for (int delta = 8; delta > 0; delta /= 2) top = max(top, __shfl_xor_sync(0xffffffffu, top, delta));
    float scale = __fdiv_rn(fmaxf(__uint_as_float(top), 1e-4f), 448.0f);
    if (cast == kCastPow2) scale = next_power_of_two(scale);
    uint2 packed;
    packed.x = to_e4m3x2(__fdiv_rn(values[0], scale), __fdiv_rn(values[1], scale)) |
               to_e4m3x2(__fdiv_rn(values[2], scale), __fdiv_rn(values[3], scale)) << 16;
    packed.y = to_e4m3x2(__fdiv_rn(values[4], scale), __fdiv_rn(values[5], scale)) |
               to_e4m3x2(__fdiv_rn(values[6], scale), __fdiv_rn(values[7], scale)) << 16;
    __syncwarp();
    if (is_there) {
      *reinterpret_cast<uint2*>(piece + block * kScaleBlock + column) = packed;
      if (lane % 16 == 0) scales[block] = scale;
    }
  }
  __syncwarp();
  return blocks * uint32_t(kScaleBlock);
}

}  // namespace commlib::cuda
