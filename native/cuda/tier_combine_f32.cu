// Combine among several nodes, FP32 rows: a file of its own, because it takes a while to compile.
#include "cuda/tier_combine_body.cuh"

namespace commlib::cuda {

extern "C" __global__ void __launch_bounds__(384, 1)
    tier_combine_f32(const __grid_constant__ Mesh mesh,
                     const __grid_constant__ ExchangeCall exchange,
                     const __grid_constant__ CombineCall call,
                     const __grid_constant__ TierCall tier) {
  combine<float>(mesh, exchange, call, tier);
}

}  // namespace commlib::cuda
