// The kernels of native/cuda/quant.cu, swiglu.cu and e5m6.cu as functions of a shared library.
// Built and called by tests/unit/test_quant_kernels_on_cpu.py.
// clang-format off: the emulation comes first
#include "tests/cuda_on_cpu/cuda_on_cpu.hpp"
#include "cuda/e5m6.cu"
#include "cuda/quant.cu"
#include "cuda/swiglu.cu"
// clang-format on

using namespace commlib::cuda;

#define COMMLIB_RUN(kernel, Call)                                                     \
  extern "C" void run_##kernel(const Call* call, unsigned blocks, unsigned threads) { \
    cuda_on_cpu::launch(kernel, *call, blocks, threads);                              \
  }

COMMLIB_RUN(cast_rows, CastRowsCall)
COMMLIB_RUN(cast_weight, CastWeightCall)
COMMLIB_RUN(retile_columns, RetileCall)
COMMLIB_RUN(cast_e5m6, CastE5m6Call)
COMMLIB_RUN(uncast_e5m6, UncastE5m6Call)
COMMLIB_RUN(swiglu_cast, SwigluCall)
COMMLIB_RUN(swiglu_again, SwigluAgainCall)
COMMLIB_RUN(swiglu_backward, SwigluBackwardCall)
