// A tile of 128 x 128 FP8 numbers that comes in by rows and leaves by columns.
#pragma once

#include "cuda/quant_tile.cuh"

namespace commlib::cuda {

// A column is 32 words of 4 rows. Word w of column c lies at (w + c / 8) % 32: the lanes of a row
// put bytes of columns 8 apart, which so lie in banks of their own.
struct TurnedTile {
  alignas(16) uint8_t bytes[kScaleBlock * kScaleBlock];

  __device__ uint8_t* word(uint32_t column, uint32_t number) {
    return bytes + column * uint32_t(kScaleBlock) + (number + column / kColumns) % 32 * 4;
  }

  // Numbers of `row` in the 8 columns from `column` on.
  __device__ void put(uint32_t row, uint32_t column, uint2 q) {
#pragma unroll
    for (uint32_t i = 0; i < kColumns; ++i) {
      const uint32_t four = i < 4 ? q.x : q.y;
      word(column + i, row / 4)[row % 4] = uint8_t(four >> (i % 4 * 8));
    }
  }

  // All threads: once everything is in, column c goes to `out + c * stride`.
  __device__ void take_out(uint8_t* out, uint64_t stride) {
    __syncthreads();
    const uint32_t lane = threadIdx.x % 32;
    for (uint32_t column = threadIdx.x / 32; column < uint32_t(kScaleBlock);
         column += blockDim.x / 32)
      *reinterpret_cast<uint32_t*>(out + column * stride + lane * 4) =
          *reinterpret_cast<const uint32_t*>(word(column, lane));
    __syncthreads();
  }
};

}  // namespace commlib::cuda
