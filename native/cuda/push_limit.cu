// What the wire and the SMs give: a plain bulk push of rows to all other ranks, with nothing else.
#include "cuda/bulk.cuh"

namespace commlib::cuda {

struct PushLimitCall {
  const uint8_t* rows;
  uint64_t landing[kMaxRanks];  // of this rank at each peer
  uint32_t num_peers;
  uint32_t num_rows;  // to each peer
  uint32_t row_bytes;
  uint32_t piece_bytes;
};

extern "C" __global__ void __launch_bounds__(512, 1)
    push_limit(const __grid_constant__ PushLimitCall call) {
  uint8_t* memory = dynamic_shared();
  const uint32_t warps = blockDim.x / 32, warp = uint32_t(warp_id());
  RowPipe<4, 3, 1> pipe;
  const uint32_t warp_bytes = uint32_t(
      align_up(4 * call.piece_bytes + RowPipe<4, 3, 1>::kTableBytes, RowPipe<4, 3, 1>::kAlignment));
  pipe.init(memory + warp * warp_bytes, call.piece_bytes);
  NoTransform as_it_is;
  for (uint32_t i = blockIdx.x + gridDim.x * warp; i < call.num_rows * call.num_peers;
       i += gridDim.x * warps) {
    const uint32_t peer = i % call.num_peers, row = i / call.num_peers;
    const uint64_t target = call.landing[peer] + uint64_t(row) * call.row_bytes;
    for (uint32_t begin = 0; begin < call.row_bytes; begin += call.piece_bytes) {
      pipe.make_room(as_it_is);
      pipe.put(call.rows + uint64_t(row) * call.row_bytes + begin,
               min(call.piece_bytes, call.row_bytes - begin), lane_id() == 0 ? target + begin : 0);
    }
  }
  pipe.drain(as_it_is);
}

}  // namespace commlib::cuda
