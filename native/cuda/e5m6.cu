// 12 bits and a power of two per 128 columns: commlib/quant/e5m6.py. 8 columns of a row are 12
// bytes, the work of a lane. Every byte is read once and written once.
#include "cuda/quant_tile.cuh"

namespace commlib::cuda {

struct CastE5m6Call {
  const void* x;     // [rows, hidden] BF16 or FP32
  uint32_t* packed;  // [rows, hidden * 3 / 8]
  float* scales;     // [rows, hidden / 128]
  uint32_t num_rows, hidden, dtype, reserved;
};

struct UncastE5m6Call {
  const uint32_t* packed;
  const float* scales;
  void* x;
  uint32_t num_rows, hidden, dtype, reserved;
};

namespace {

constexpr float kE5m6Max = 65024.0f;
constexpr uint32_t kE5m6Last = (30u << 6) + 63, kE5m6Nan = (31u << 6) + 32;
constexpr uint32_t kExponentShift = 127 - 15;  // from the bias of FP32 to that of E5M6

__device__ inline uint32_t to_e5m6(float value) {
  const uint32_t bits = __float_as_uint(value), magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return kE5m6Nan;
  uint32_t code;
  if (magnitude < (kExponentShift + 1) << 23) {
    // Multiples of 2^-20: in 2^23 + n the last bits are n, rounded to even.
    const float units = __fmul_rn(__uint_as_float(magnitude), 1048576.0f);
    code = __float_as_uint(units + 8388608.0f) - 0x4b000000u;
  } else {
    code = ((magnitude + 0xffffu + (magnitude >> 17 & 1)) >> 17) - (kExponentShift << 6);
  }
  return min(code, kE5m6Last) | bits >> 31 << 11;
}

__device__ inline float from_e5m6(uint32_t code) {
  const uint32_t exponent = code >> 6 & 31, mantissa = code & 63;
  float value = __uint_as_float((exponent + kExponentShift) << 23 | mantissa << 17);
  if (exponent == 0) value = __fmul_rn(float(mantissa), 0x1p-20f);
  if (exponent == 31) value = __uint_as_float(0x7fc00000u);
  return code >> 11 & 1 ? -value : value;
}

// As IEEE rounds; a NaN stays one.
__device__ inline uint32_t to_bf16(float value) {
  const uint32_t bits = __float_as_uint(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0u;
  return (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
}

__device__ inline void store8(void* x, uint64_t at, uint32_t dtype, const float (&values)[8]) {
  if (dtype == uint32_t(Dtype::kBf16)) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      words[i] = to_bf16(values[2 * i]) | to_bf16(values[2 * i + 1]) << 16;
    *reinterpret_cast<uint4*>(static_cast<uint8_t*>(x) + at * 2) = {words[0], words[1], words[2],
                                                                    words[3]};
    return;
  }
  uint4* to = reinterpret_cast<uint4*>(static_cast<uint8_t*>(x) + at * 4);
#pragma unroll
  for (int i = 0; i < 2; ++i)
    to[i] = {__float_as_uint(values[4 * i]), __float_as_uint(values[4 * i + 1]),
             __float_as_uint(values[4 * i + 2]), __float_as_uint(values[4 * i + 3])};
}

}  // namespace

extern "C" __global__ void __launch_bounds__(512, 2) cast_e5m6(CastE5m6Call call) {
  for_each_row(
      call.num_rows, call.hidden,
      [&](uint32_t, uint64_t at, uint64_t tile, bool is_here) {
        float values[8];
        load8(call.x, at, call.dtype, values);
        const float scale = scale_of(largest_of_tile(values), kCastPow2, kE5m6Max);
        if (!is_here) return;
        // The reciprocal of a power of two is exact, that of infinity 0: infinity times 0 is NaN.
        const float inverse = __frcp_rn(scale);
        uint32_t codes[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) codes[i] = to_e5m6(__fmul_rn(values[i], inverse));
        uint32_t* to = call.packed + at / 8 * 3;
        to[0] = codes[0] | codes[1] << 12 | codes[2] << 24;
        to[1] = codes[2] >> 8 | codes[3] << 4 | codes[4] << 16 | codes[5] << 28;
        to[2] = codes[5] >> 4 | codes[6] << 8 | codes[7] << 20;
        if (threadIdx.x % kLanesPerTile == 0) call.scales[tile] = scale;
      },
      [](uint32_t) {});
}

extern "C" __global__ void __launch_bounds__(512, 2) uncast_e5m6(UncastE5m6Call call) {
  for_each_row(
      call.num_rows, call.hidden,
      [&](uint32_t, uint64_t at, uint64_t tile, bool is_here) {
        if (!is_here) return;
        const uint32_t* from = call.packed + at / 8 * 3;
        const uint32_t words[3] = {from[0], from[1], from[2]};
        const uint32_t codes[8] = {words[0],      words[0] >> 12, words[0] >> 24 | words[1] << 8,
                                   words[1] >> 4, words[1] >> 16, words[1] >> 28 | words[2] << 4,
                                   words[2] >> 8, words[2] >> 20};
        const float scale = call.scales[tile];
        float values[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) values[i] = __fmul_rn(from_e5m6(codes[i] & 0xfffu), scale);
        store8(call.x, at, call.dtype, values);
      },
      [](uint32_t) {});
}

}  // namespace commlib::cuda
