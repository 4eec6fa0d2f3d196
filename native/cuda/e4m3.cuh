// Two numbers at a time between FP32 and E4M3. native/tests/cuda_on_cpu has the same for a CPU.
#pragma once

#include "common/types.hpp"

namespace commlib::cuda {

__device__ inline uint32_t to_e4m3x2(float low, float high) {
  uint16_t pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
  return pair;
}

__device__ inline void from_e4m3x2(uint32_t pair, float* low, float* high) {
  uint32_t halves;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(uint16_t(pair)));
  asm("{.reg .f16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}"
      : "=f"(*low), "=f"(*high)
      : "r"(halves));
}

}  // namespace commlib::cuda
