// Operations that move no rows: barriers, refusals, growth.
#include "cuda/settle.cuh"

namespace commlib::cuda {

extern "C" __global__ void __launch_bounds__(512, 1)
    exchange(const __grid_constant__ Mesh mesh, const __grid_constant__ ExchangeCall call) {
  uint8_t* memory = dynamic_shared();
  settle(mesh, call, reinterpret_cast<uint32_t*>(memory));
}

}  // namespace commlib::cuda
