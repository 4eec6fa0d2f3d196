// BF16 or FP32 columns to E4M3 with one FP32 scale per 128 columns, in a stage of shared memory.
// Formulas: commlib/quant.py.
#pragma once

#include "cuda/e4m3.cuh"
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

// x / scale as IEEE division rounds it, in a quarter of the instructions. The first correction
// makes the guess faithful; from a faithful guess and the correctly rounded reciprocal the second
// gives the rounded quotient (Markstein, "Computation of elementary functions on the IBM RISC
// System/6000 processor", 1990). Quotients that are so small that a remainder underflows are far
// below the smallest E4M3 number. A remainder is -(guess scale - x), not x - guess scale: of a zero
// that is a zero of the same sign, so that the sum keeps it.
__device__ inline float divide(float x, float scale, float inverse) {
  const float guess = __fmul_rn(x, inverse);
  const float faithful = __fmaf_rn(-__fmaf_rn(guess, scale, -x), inverse, guess);
  return __fmaf_rn(-__fmaf_rn(faithful, scale, -x), inverse, faithful);
}

// Of the largest magnitude, as FP32 bits, for a format whose largest number is `largest`.
__device__ inline float scale_of(uint32_t top, uint32_t cast, float largest = 448.0f) {
  const float scale = __fdiv_rn(fmaxf(__uint_as_float(top), 1e-4f), largest);
  return cast == kCastPow2 ? next_power_of_two(scale) : scale;
}

__device__ inline uint2 pack_e4m3x8(const float (&q)[8]) {
  return make_uint2(to_e4m3x2(q[0], q[1]) | to_e4m3x2(q[2], q[3]) << 16,
                    to_e4m3x2(q[4], q[5]) | to_e4m3x2(q[6], q[7]) << 16);
}

__device__ inline uint2 to_e4m3x8(const float (&values)[8], float scale) {
  float q[8];
  const bool is_finite = scale < __uint_as_float(0x7f800000u);
  const float inverse = __frcp_rn(scale);
#pragma unroll
  for (int i = 0; i < 8; ++i)
    q[i] = is_finite ? divide(values[i], scale, inverse)
                     : __fmul_rn(values[i], 0.0f);  // infinity gives NaN
  return pack_e4m3x8(q);
}

// The largest magnitude among 8 columns of BF16, as FP32 bits; NaNs are left out, they only spoil
// themselves. Magnitudes order like their bits.
__device__ inline uint32_t top_bf16(const uint4& v) {
  const uint32_t words[4] = {v.x & 0x7fff7fffu, v.y & 0x7fff7fffu, v.z & 0x7fff7fffu,
                             v.w & 0x7fff7fffu};
  const uint32_t pair = __vmaxu2(__vmaxu2(words[0], words[1]), __vmaxu2(words[2], words[3]));
  const uint32_t top = max(pair >> 16, pair & 0xffffu);
  if (top <= 0x7f80u) return top << 16;
  uint32_t rest = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t high = words[i] >> 16, low = words[i] & 0xffffu;
    rest = max(rest, max(high <= 0x7f80u ? high : 0u, low <= 0x7f80u ? low : 0u));
  }
  return rest << 16;
}

// x times a power of two is x / scale exactly, or rounded to what E4M3 rounds to 0 or saturates.
__device__ inline uint2 scale_bf16x8(const uint4& v, float inverse) {
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
  uint32_t pairs[4];
#pragma unroll
  for (int i = 0; i < 4; ++i)
    pairs[i] = to_e4m3x2(__fmul_rn(__uint_as_float(words[i] << 16), inverse),
                         __fmul_rn(__uint_as_float(words[i] & 0xffff0000u), inverse));
  return make_uint2(pairs[0] | pairs[1] << 16, pairs[2] | pairs[3] << 16);
}

// Of BF16 values the scale that is a power of two, from the bits of the largest magnitude. 448 is
// 1.75 * 2^8, so a mantissa above 1.75 takes the next power. 2^-22 is the scale of 1e-4, the least
// magnitude that counts; infinity stays.
__device__ inline float pow2_scale_of_bf16(uint32_t top) {
  if (top >= 0x7f800000u) return __uint_as_float(0x7f800000u);
  const int bits = int((top + 0x1fffffu) & 0x7f800000u) - (8 << 23);
  return __int_as_float(max(bits, (127 - 22) << 23));
}

// BF16 with scales that are powers of two, a third of the instructions of the general case. Four
// lanes per block of 128 columns, 8 blocks at a time, each lane's columns in an order of its own so
// that no two lanes meet in a bank. In place: what a round writes lies below what the next one
// reads. Scales go to `scales` (shared); returns the new size.
__device__ inline uint32_t cast_piece_pow2(uint8_t* piece, uint32_t blocks, float* scales) {
  const uint32_t lane = threadIdx.x % 32, part = lane % 4, turn = lane / 2;
  for (uint32_t first = 0; first < blocks; first += 8) {
    const uint32_t block = min(first + lane / 4, blocks - 1);
    const uint8_t* from = piece + (block * kScaleBlock + part * 32) * 2;
    uint4 values[4];
    uint32_t top = 0;
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i)
      values[i] = *reinterpret_cast<const uint4*>(from + (i + turn) % 4 * 16);
#pragma unroll
    for (int i = 0; i < 4; ++i) top = max(top, top_bf16(values[i]));
    top = max(top, __shfl_xor_sync(0xffffffffu, top, 1));
    top = max(top, __shfl_xor_sync(0xffffffffu, top, 2));
    const float scale = pow2_scale_of_bf16(top);
    // The reciprocal of 2^e from its bits; of infinity it is 0, and infinity times 0 is NaN.
    const uint32_t bits = __float_as_uint(scale);
    const float inverse = __uint_as_float(bits >= 0x7f800000u ? 0u : 0x7f000000u - bits);
    __syncwarp();
    if (first + lane / 4 < blocks) {
      uint8_t* to = piece + block * kScaleBlock + part * 32;
#pragma unroll
      for (uint32_t i = 0; i < 4; ++i)
        *reinterpret_cast<uint2*>(to + (i + turn) % 4 * 8) = scale_bf16x8(values[i], inverse);
      if (part == 0) scales[block] = scale;
    }
    __syncwarp();
  }
  return blocks * uint32_t(kScaleBlock);
}

// Half a warp per block of 128 columns, 8 columns a lane, kRounds blocks each at a time, likewise
// in place.
//
// Any payload, any kind of scale.
__device__ inline uint32_t cast_piece_any(uint8_t* piece, uint32_t blocks, uint32_t element,
                                          uint32_t dtype, uint32_t cast, float* scales) {
  constexpr int kRounds = 2;
  const uint32_t lane = threadIdx.x % 32, half = lane / 16, column = lane % 16 * 8;
  for (uint32_t first = 0; first < blocks; first += 2 * kRounds) {
    float values[kRounds][8];
    uint32_t top[kRounds] =
        {};  // |x| as bits orders like |x|; a NaN is left out and only spoils itself
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
      const uint32_t block = min(first + 2 * r + half, blocks - 1);
      unpack8(piece + (uint64_t(block) * kScaleBlock + column) * element, dtype, values[r]);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const uint32_t magnitude = __float_as_uint(values[r][i]) & 0x7fffffffu;
        top[r] = max(top[r], magnitude <= 0x7f800000u ? magnitude : 0u);
      }
    }
#pragma unroll
    for (int delta = 8; delta > 0; delta /= 2)
#pragma unroll
      for (int r = 0; r < kRounds; ++r)
        top[r] = max(top[r], __shfl_xor_sync(0xffffffffu, top[r], delta));
    __syncwarp();
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
      const uint32_t block = first + 2 * r + half;
      const float scale = scale_of(top[r], cast);
      const uint2 packed = to_e4m3x8(values[r], scale);
      if (block >= blocks) continue;
      *reinterpret_cast<uint2*>(piece + block * kScaleBlock + column) = packed;
      if (lane % 16 == 0) scales[block] = scale;
    }
    __syncwarp();
  }
  return blocks * uint32_t(kScaleBlock);
}

__device__ inline uint32_t cast_piece(uint8_t* piece, uint32_t bytes, uint32_t dtype, uint32_t cast,
                                      float* scales) {
  const bool is_bf16 = dtype == uint32_t(Dtype::kBf16);
  const uint32_t element = is_bf16 ? 2 : 4;
  const uint32_t blocks = bytes / (uint32_t(kScaleBlock) * element);
  if (is_bf16 && cast == kCastPow2) return cast_piece_pow2(piece, blocks, scales);
  return cast_piece_any(piece, blocks, element, dtype, cast, scales);
}

}  // namespace commlib::cuda
