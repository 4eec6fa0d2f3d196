// SwiGLU with a weight per row between two casts to FP8: commlib/quant/swiglu.py, in one pass. All
// scales are powers of two. Gate and up are [rows, width].
#include "cuda/quant_tile.cuh"

namespace commlib::cuda {

struct SwigluCall {
  const void *gate, *up;  // BF16 or FP32
  const float* row_weights;
  Fp8Out inner, kept_gate, kept_up;
  uint32_t num_rows, width, dtype, reserved;
};

struct SwigluAgainCall {
  Fp8In gate, up;
  const float* row_weights;
  Fp8Out inner;
  uint32_t num_rows, width;
};

struct SwigluBackwardCall {
  const void* grad_inner;  // BF16 or FP32
  Fp8In gate, up;
  const float* row_weights;
  Fp8Out grad_gate, grad_up;
  float* grad_row_weights;
  uint32_t num_rows, width, dtype, reserved;
};

namespace {

__device__ inline float sigmoid(float x) { return __fdiv_rn(1.0f, 1.0f + expf(-x)); }

// silu(gate) * up
__device__ inline float swiglu(float gate, float up) {
  return __fdiv_rn(gate, 1.0f + expf(-gate)) * up;
}

__device__ inline void store_inner(const Fp8Out& inner, uint64_t at, uint64_t tile,
                                   const float (&gate)[8], const float (&up)[8], float weight,
                                   bool is_here) {
  float values[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) values[i] = swiglu(gate[i], up[i]) * weight;
  store_tile(inner, at, tile, values, kCastPow2, is_here);
}

}  // namespace

extern "C" __global__ void __launch_bounds__(512, 2) swiglu_cast(SwigluCall call) {
  for_each_row(
      call.num_rows, call.width,
      [&](uint32_t row, uint64_t at, uint64_t tile, bool is_here) {
        float gate[8], up[8];
        load8(call.gate, at, call.dtype, gate);
        load8(call.up, at, call.dtype, up);
        store_tile(call.kept_gate, at, tile, gate, kCastPow2, is_here);
        store_tile(call.kept_up, at, tile, up, kCastPow2, is_here);
        store_inner(call.inner, at, tile, gate, up, call.row_weights[row], is_here);
      },
      [](uint32_t) {});
}

extern "C" __global__ void __launch_bounds__(512, 2) swiglu_again(SwigluAgainCall call) {
  for_each_row(
      call.num_rows, call.width,
      [&](uint32_t row, uint64_t at, uint64_t tile, bool is_here) {
        float gate[8], up[8];
        unpack_e4m3x8(call.gate.q + at, call.gate.scales[tile], gate);
        unpack_e4m3x8(call.up.q + at, call.up.scales[tile], up);
        store_inner(call.inner, at, tile, gate, up, call.row_weights[row], is_here);
      },
      [](uint32_t) {});
}

extern "C" __global__ void __launch_bounds__(512, 2) swiglu_backward(SwigluBackwardCall call) {
  float sum = 0.0f;
  for_each_row(
      call.num_rows, call.width,
      [&](uint32_t row, uint64_t at, uint64_t tile, bool is_here) {
        float grad[8], gate[8], up[8];
        load8(call.grad_inner, at, call.dtype, grad);
        unpack_e4m3x8(call.gate.q + at, call.gate.scales[tile], gate);
        unpack_e4m3x8(call.up.q + at, call.up.scales[tile], up);
        const float weight = call.row_weights[row];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          if (is_here) sum += grad[i] * swiglu(gate[i], up[i]);
          const float s = sigmoid(gate[i]), weighted = grad[i] * weight;
          const float grad_up = weighted * gate[i] * s;
          gate[i] = weighted * up[i] * s * (1.0f + gate[i] * (1.0f - s));
          up[i] = grad_up;
        }
        store_tile(call.grad_gate, at, tile, gate, kCastPow2, is_here);
        store_tile(call.grad_up, at, tile, up, kCastPow2, is_here);
      },
      [&](uint32_t row) {
#pragma unroll
        for (uint32_t delta = 16; delta > 0; delta /= 2)
          sum += __shfl_xor_sync(kAllLanes, sum, delta);
        if (threadIdx.x % 32 == 0) call.grad_row_weights[row] = sum;
        sum = 0.0f;
      });
}

}  // namespace commlib::cuda
