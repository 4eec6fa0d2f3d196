// Integer names and the host/device marker. Compiles under a host compiler, nvcc and NVRTC
// (NVRTC has no standard headers, so the names are spelled out there).
#pragma once

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#define COMMLIB_HD __host__ __device__ inline
#else
#define COMMLIB_HD inline
#endif

#if defined(__CUDACC_RTC__)
namespace commlib {
using int32_t = int;
using uint8_t = unsigned char;
using uint16_t = unsigned short;
using uint32_t = unsigned int;
using int64_t = long;
using uint64_t = unsigned long;
using size_t = unsigned long;
}  // namespace commlib
#else
#include <cstddef>
#include <cstdint>
namespace commlib {
using std::int32_t;
using std::int64_t;
using std::size_t;
using std::uint16_t;
using std::uint32_t;
using std::uint64_t;
using std::uint8_t;
}  // namespace commlib
#endif

namespace commlib {

COMMLIB_HD constexpr size_t align_up(size_t value, size_t alignment) {
  return (value + alignment - 1) / alignment * alignment;
}

// Counters that different ranks write sit on lines of their own.
constexpr size_t kLine = 64;

enum class Dtype : uint32_t { kF32 = 0, kBf16 = 1, kE4m3 = 2 };

COMMLIB_HD constexpr size_t dtype_bytes(Dtype dtype) {
  return dtype == Dtype::kF32 ? 4 : dtype == Dtype::kBf16 ? 2 : 1;
}

// Channels quantised together: one FP32 scale per 1 x 128 block of a row.
constexpr size_t kScaleBlock = 128;

}  // namespace commlib
