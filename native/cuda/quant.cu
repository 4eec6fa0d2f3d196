// Casts of commlib/quant by themselves: rows (1x128), weights (128x128), rows to columns (128x1).
// Every byte is read once and written once, the last two also with rows and columns exchanged.
#include "cuda/turned_tile.cuh"

namespace commlib::cuda {

struct CastRowsCall {
  const void* x;
  Fp8Out out;
  uint32_t num_rows, hidden, dtype, cast;
};

struct CastWeightCall {
  const void* w;  // [experts, rows, columns]
  // The same with scales [experts, row tiles, column tiles]; if `is_turned` the last two of both
  // are exchanged, and multiples of 128.
  Fp8Out out;
  uint32_t num_experts, rows, columns, dtype, cast, is_turned;
};

struct RetileCall {
  Fp8In x;     // [rows, hidden]
  Fp8Out out;  // [rows, hidden], [hidden, rows] if `is_turned`; scales [rows / 128, hidden]
  uint32_t num_rows, hidden, cast, is_turned;
};

namespace {

constexpr uint32_t kTileThreads = 256;
constexpr uint32_t kTile = uint32_t(kScaleBlock);
constexpr uint32_t kRowsAtOnce = kTileThreads / kLanesPerTile;  // of a tile
constexpr uint32_t kTurns = kTile / kRowsAtOnce;

__device__ inline uint32_t largest_of_block(uint32_t top) {
  __shared__ uint32_t of_warp[kTileThreads / 32];
  top = __reduce_max_sync(kAllLanes, top);
  __syncthreads();  // the tile before has been read
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = top;
  __syncthreads();
#pragma unroll
  for (uint32_t warp = 0; warp < kTileThreads / 32; ++warp) top = max(top, of_warp[warp]);
  return top;
}

}  // namespace

extern "C" __global__ void __launch_bounds__(512, 2) cast_rows(CastRowsCall call) {
  for_each_row(
      call.num_rows, call.hidden,
      [&](uint32_t, uint64_t at, uint64_t tile, bool is_here) {
        float values[8];
        load8(call.x, at, call.dtype, values);
        store_tile(call.out, at, tile, values, call.cast, is_here);
      },
      [](uint32_t) {});
}

// A block per tile. The last tiles may be smaller; columns are a multiple of 8.
extern "C" __global__ void __launch_bounds__(kTileThreads) cast_weight(CastWeightCall call) {
  __shared__ TurnedTile turned;
  const uint32_t row_tiles = (call.rows + kTile - 1) / kTile;
  const uint32_t column_tiles = (call.columns + kTile - 1) / kTile;
  const uint64_t tiles = uint64_t(call.num_experts) * row_tiles * column_tiles;
  for (uint64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const uint32_t column_tile = uint32_t(tile % column_tiles);
    const uint32_t row_tile = uint32_t(tile / column_tiles % row_tiles);
    const uint64_t expert = tile / column_tiles / row_tiles;
    const uint32_t column = column_tile * kTile + threadIdx.x % kLanesPerTile * kColumns;
    const uint32_t first_row = row_tile * kTile + threadIdx.x / kLanesPerTile;
    const uint64_t expert_rows = expert * call.rows;
    float values[kTurns][8] = {};
    uint32_t top = 0;
#pragma unroll
    for (uint32_t turn = 0; turn < kTurns; ++turn) {
      const uint32_t row = first_row + turn * kRowsAtOnce;
      if (row < call.rows && column < call.columns)
        load8(call.w, (expert_rows + row) * call.columns + column, call.dtype, values[turn]);
      top = max(top, largest_bits(values[turn]));
    }
    const float scale = scale_of(largest_of_block(top), call.cast);
#pragma unroll
    for (uint32_t turn = 0; turn < kTurns; ++turn) {
      const uint32_t row = first_row + turn * kRowsAtOnce;
      const uint2 q = to_e4m3x8(values[turn], scale);
      if (call.is_turned)
        turned.put(row % kTile, column % kTile, q);
      else if (row < call.rows && column < call.columns)
        *reinterpret_cast<uint2*>(call.out.q + (expert_rows + row) * call.columns + column) = q;
    }
    if (call.is_turned)
      turned.take_out(
          call.out.q + (expert * call.columns + column_tile * kTile) * call.rows + row_tile * kTile,
          call.rows);
    if (threadIdx.x == 0)
      call.out.scales[call.is_turned ? (expert * column_tiles + column_tile) * row_tiles + row_tile
                                     : tile] = scale;
  }
}

// A block per 128 rows and 128 columns.
extern "C" __global__ void __launch_bounds__(kTileThreads) retile_columns(RetileCall call) {
  __shared__ TurnedTile turned;
  // One column of each lane side by side; a group's odd number of such lines takes the other half
  // of a warp to the other half of the banks.
  __shared__ uint32_t tops[kRowsAtOnce][kColumns + 1][kLanesPerTile];
  const uint32_t column_tiles = call.hidden / kTile;
  const uint64_t tiles = uint64_t(call.num_rows / kTile) * column_tiles;
  const uint32_t lane = threadIdx.x % kLanesPerTile, in_tile = lane * kColumns;
  for (uint64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const uint64_t row_tile = tile / column_tiles, column_tile = tile % column_tiles;
    const uint64_t first_row = row_tile * kTile + threadIdx.x / kLanesPerTile;
    const uint64_t column = column_tile * kTile + in_tile;
    float values[kTurns][8];
    uint32_t top[kColumns] = {};
#pragma unroll
    for (uint32_t turn = 0; turn < kTurns; ++turn) {
      const uint64_t row = first_row + turn * kRowsAtOnce;
      unpack_e4m3x8(call.x.q + row * call.hidden + column,
                    call.x.scales[row * column_tiles + column_tile], values[turn]);
#pragma unroll
      for (uint32_t i = 0; i < kColumns; ++i) {
        const uint32_t magnitude = __float_as_uint(values[turn][i]) & 0x7fffffffu;
        top[i] = max(top[i], magnitude <= 0x7f800000u ? magnitude : 0u);
      }
    }
    __syncthreads();  // the tile before has been read
#pragma unroll
    for (uint32_t i = 0; i < kColumns; ++i) tops[threadIdx.x / kLanesPerTile][i][lane] = top[i];
    __syncthreads();
    float scales[kColumns];
#pragma unroll
    for (uint32_t i = 0; i < kColumns; ++i) {
      uint32_t most = 0;
#pragma unroll
      for (uint32_t group = 0; group < kRowsAtOnce; ++group) most = max(most, tops[group][i][lane]);
      scales[i] = scale_of(most, call.cast);
      if (threadIdx.x / kLanesPerTile == 0)
        call.out.scales[row_tile * call.hidden + column + i] = scales[i];
    }
#pragma unroll
    for (uint32_t turn = 0; turn < kTurns; ++turn) {
      float q[8];
#pragma unroll
      for (uint32_t i = 0; i < kColumns; ++i) q[i] = __fdiv_rn(values[turn][i], scales[i]);
      const uint64_t row = first_row + turn * kRowsAtOnce;
      const uint2 eight = pack_e4m3x8(q);
      if (call.is_turned)
        turned.put(uint32_t(row % kTile), in_tile, eight);
      else
        *reinterpret_cast<uint2*>(call.out.q + row * call.hidden + column) = eight;
    }
    if (call.is_turned)
      turned.take_out(call.out.q + column_tile * kTile * call.num_rows + row_tile * kTile,
                      call.num_rows);
  }
}

}  // namespace commlib::cuda
