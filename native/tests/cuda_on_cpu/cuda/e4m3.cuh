// In place of native/cuda/e4m3.cuh on a CPU.
#pragma once

#include <cmath>

#include "common/types.hpp"

namespace commlib::cuda {

inline float from_e4m3(uint32_t bits) {
  const int exponent = int(bits >> 3 & 15), mantissa = int(bits & 7);
  float value = exponent == 0 ? std::ldexp(float(mantissa), -9)
                              : std::ldexp(float(8 + mantissa), exponent - 10);
  if (exponent == 15 && mantissa == 7) value = NAN;
  return bits & 0x80 ? -value : value;
}

// To nearest, ties to even; what is too large becomes 448.
inline uint32_t to_e4m3(float value) {
  if (std::isnan(value)) return 0x7f;
  uint32_t best = 0;
  float least = INFINITY;
  for (uint32_t bits = 0; bits < 0x7f; ++bits) {
    const float distance = std::fabs(from_e4m3(bits) - std::fmin(std::fabs(value), 448.0f));
    if (distance < least || (distance == least && bits % 2 == 0)) least = distance, best = bits;
  }
  return best | (std::signbit(value) ? 0x80 : 0);
}

inline uint32_t to_e4m3x2(float low, float high) { return to_e4m3(low) | to_e4m3(high) << 8; }

inline void from_e4m3x2(uint32_t pair, float* low, float* high) {
  *low = from_e4m3(pair & 0xff);
  *high = from_e4m3(pair >> 8 & 0xff);
}

}  // namespace commlib::cuda
