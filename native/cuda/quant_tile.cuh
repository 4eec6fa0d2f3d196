// 8 columns of a row per lane, 16 lanes to a block of 128 columns: what the kernels of quant.cu and
// swiglu.cu have in common. Formulas: commlib/quant.
#pragma once

#include "cuda/cast.cuh"

namespace commlib::cuda {

constexpr uint32_t kAllLanes = 0xffffffffu;
constexpr uint32_t kLanesPerTile = 16;
constexpr uint32_t kColumns = 8;  // of a lane

// FP8 rows, or nowhere to put them.
struct Fp8Out {
  uint8_t* q;
  float* scales;
};

struct Fp8In {
  const uint8_t* q;
  const float* scales;
};

// BF16 or FP32, from element `at` on, a multiple of 8.
__device__ inline void load8(const void* x, uint64_t at, uint32_t dtype, float (&values)[8]) {
  const uint32_t element = dtype == uint32_t(Dtype::kBf16) ? 2 : 4;
  unpack8(static_cast<const uint8_t*>(x) + at * element, dtype, values);
}

__device__ inline void unpack_e4m3x8(const uint8_t* from, float scale, float (&values)[8]) {
  const uint2 words = *reinterpret_cast<const uint2*>(from);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t word = i == 0 ? words.x : words.y;
    from_e4m3x2(word & 0xffffu, &values[4 * i], &values[4 * i + 1]);
    from_e4m3x2(word >> 16, &values[4 * i + 2], &values[4 * i + 3]);
  }
#pragma unroll
  for (float& value : values) value = __fmul_rn(value, scale);
}

__device__ inline uint32_t largest_bits(const float (&values)[8]) {
  uint32_t top = 0;  // |x| as bits orders like |x|; a NaN is left out and only spoils itself
#pragma unroll
  for (float value : values) {
    const uint32_t magnitude = __float_as_uint(value) & 0x7fffffffu;
    top = max(top, magnitude <= 0x7f800000u ? magnitude : 0u);
  }
  return top;
}

// All 16 lanes of a tile call it.
__device__ inline uint32_t largest_of_tile(const float (&values)[8]) {
  uint32_t top = largest_bits(values);
#pragma unroll
  for (uint32_t delta = kLanesPerTile / 2; delta > 0; delta /= 2)
    top = max(top, __shfl_xor_sync(kAllLanes, top, delta));
  return top;
}

// All 16 lanes of a tile call it; those of a tile that is not there (`is_here`) store nothing.
__device__ inline void store_tile(const Fp8Out& out, uint64_t at, uint64_t tile,
                                  const float (&values)[8], uint32_t cast, bool is_here) {
  const float scale = scale_of(largest_of_tile(values), cast);
  if (!is_here) return;
  *reinterpret_cast<uint2*>(out.q + at) = to_e4m3x8(values, scale);
  if (threadIdx.x % kLanesPerTile == 0) out.scales[tile] = scale;
}

// Rows of `width` columns, a warp per row and two tiles at a time: `work(row, first element, tile,
// is the tile there)`, then `finish(row)`. All lanes are there in every call.
template <typename Work, typename Finish>
__device__ inline void for_each_row(uint32_t num_rows, uint32_t width, Work work, Finish finish) {
  const uint32_t warps = blockDim.x / 32, lane = threadIdx.x % 32;
  const uint32_t tiles = width / uint32_t(kScaleBlock);
  for (uint32_t row = blockIdx.x * warps + threadIdx.x / 32; row < num_rows;
       row += gridDim.x * warps) {
    for (uint32_t first = 0; first < tiles; first += 2) {
      const uint32_t tile = first + lane / kLanesPerTile, there = min(tile, tiles - 1);
      const uint64_t at =
          uint64_t(row) * width + there * uint32_t(kScaleBlock) + lane % kLanesPerTile * kColumns;
      work(row, at, uint64_t(row) * tiles + there, tile < tiles);
    }
    finish(row);
  }
}

}  // namespace commlib::cuda
