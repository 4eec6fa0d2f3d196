// BF16 written down once more, by the definition instead of by bits.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

namespace commlib::testing {

inline float from_bf16(uint16_t value) { return std::bit_cast<float>(uint32_t(value) << 16); }

// Nearest by comparing distances in FP64, ties to the even one. Finite values only.
inline uint16_t to_bf16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint16_t down = uint16_t(bits >> 16);
  if ((bits & 0xffff) == 0) return down;
  const auto real = [](uint32_t half) {  // one step past the largest is 2^128 here
    const int exponent = int(half >> 7 & 0xff);
    const double mantissa = double(half & 0x7f) / 128;
    return exponent == 0 ? std::ldexp(mantissa, -126) : std::ldexp(1 + mantissa, exponent - 127);
  };
  const double magnitude = std::fabs(double(value));
  const double below = magnitude - real(down & 0x7fffu);
  const double above = real((down & 0x7fffu) + 1u) - magnitude;
  if (below == above) return down % 2 == 0 ? down : uint16_t(down + 1);
  return below < above ? down : uint16_t(down + 1);
}

}  // namespace commlib::testing
