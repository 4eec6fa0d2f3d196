// Combine, FP32 rows: a file of its own, because it takes a while to compile.
#include "cuda/combine_body.cuh"

namespace commlib::cuda {

extern "C" __global__ void __launch_bounds__(480, 1)
    combine_f32(const __grid_constant__ Mesh mesh, const __grid_constant__ ExchangeCall exchange,
                const __grid_constant__ CombineCall call) {
  combine<float>(mesh, exchange, call);
}

}  // namespace commlib::cuda
