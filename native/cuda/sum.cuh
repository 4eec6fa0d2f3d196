// Sums of rows in registers: FP32, in order of loading, rounded once at the end.
#pragma once

#include "cuda/bulk.cuh"

namespace commlib::cuda {

constexpr int kStages = 4;
constexpr int kVectors =
    7;  // of 16 bytes per lane in one piece: its columns are summed in registers
constexpr int kNothing = 0x7fffffff;

template <typename T>
struct Vector;  // 16 bytes of a row

template <>
struct Vector<uint16_t> {  // BF16
  static constexpr int kColumns = 8;
  static __device__ void unpack(const uint4& v, float (&f)[8]) {
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      f[2 * i] = __uint_as_float(words[i] << 16);
      f[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
  }
  static __device__ uint4 pack(const float (&f)[8]) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      words[i] = to_bf16x2(f[2 * i], f[2 * i + 1]);
    return make_uint4(words[0], words[1], words[2], words[3]);
  }
};

template <>
struct Vector<float> {
  static constexpr int kColumns = 4;
  static __device__ void unpack(const uint4& v, float (&f)[4]) {
    f[0] = __uint_as_float(v.x), f[1] = __uint_as_float(v.y);
    f[2] = __uint_as_float(v.z), f[3] = __uint_as_float(v.w);
  }
  static __device__ uint4 pack(const float (&f)[4]) {
    return make_uint4(__float_as_uint(f[0]), __float_as_uint(f[1]), __float_as_uint(f[2]),
                      __float_as_uint(f[3]));
  }
};

// Adds a loaded piece to the sums in registers: FP32, in order of loading. Sums start at -0, which
// leaves the first term (or product) as it is, sign of zero included. The last term's stage takes
// the sum, rounded.
template <typename T, bool kWeighted>
struct Summer {
  uint32_t* is_last;  // [stage]
  float* weights;     // [stage]
  float acc[kVectors][Vector<T>::kColumns];

  __device__ Summer(uint32_t* last, float* stage_weights) : is_last(last), weights(stage_weights) {
    clear();
  }

  __device__ void clear() {
#pragma unroll
    for (int v = 0; v < kVectors; ++v)
#pragma unroll
      for (int c = 0; c < Vector<T>::kColumns; ++c) acc[v][c] = -0.0f;
  }

  __device__ uint32_t operator()(uint8_t* piece, uint32_t bytes, int stage) {
    const float weight = kWeighted ? weights[stage] : 1.0f;
    const bool is_end = is_last[stage] != 0;
    uint4* own = reinterpret_cast<uint4*>(piece + lane_id() * 16);
    // Whole pieces without a branch per vector, so that their loads are under way together.
    if (bytes == kVectors * 512) {
      add<true>(own, weight, kVectors);
      if (is_end) put<true>(own, kVectors);
    } else {
      const int num_vectors = int((bytes - min(bytes, uint32_t(lane_id() * 16)) + 511) / 512);
      add<false>(own, weight, num_vectors);
      if (is_end) put<false>(own, num_vectors);
    }
    if (is_end) {
      clear();
      fence_async_shared();  // the sum before the bulk store that reads it
    }
    __syncwarp();
    return bytes;
  }

  template <bool kWhole>
  __device__ void add(const uint4* own, float weight, int num_vectors) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (!kWhole && v >= num_vectors) continue;
      float f[Vector<T>::kColumns];
      Vector<T>::unpack(own[v * 32], f);
#pragma unroll
      for (int c = 0; c < Vector<T>::kColumns; ++c)
        acc[v][c] = kWeighted ? __fmaf_rn(weight, f[c], acc[v][c]) : __fadd_rn(acc[v][c], f[c]);
    }
  }

  template <bool kWhole>
  __device__ void put(uint4* own, int num_vectors) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v)
      if (kWhole || v < num_vectors) own[v * 32] = Vector<T>::pack(acc[v]);
  }
};

using Pipe = RowPipe<kStages, 3, 1>;
using Tellers = Announcer<1, 4, 6, 16>;

struct WarpMemory {
  Pipe pipe;
  Tellers announcer;
  uint32_t* is_last;
  float* weights;
};

// Shared memory: the same for every warp. commlib/cuda/launch.py computes the total.
__device__ inline WarpMemory carve_sums(uint32_t piece_bytes, uint8_t* memory) {
  const uint32_t pipe_bytes = kStages * piece_bytes + uint32_t(align_up(Pipe::kTableBytes, 16));
  const uint32_t warp_bytes =
      uint32_t(align_up(pipe_bytes + Tellers::kBytes + kStages * 8, Pipe::kAlignment));
  const uint32_t given = dynamic_shared_bytes();
  if (blockDim.x / 32 * warp_bytes > given || piece_bytes > kVectors * 512) __trap();
  uint8_t* mine = memory + uint32_t(warp_id()) * warp_bytes;
  WarpMemory own;
  own.pipe.init(mine, piece_bytes);
  own.announcer.init(mine + pipe_bytes);
  own.is_last = reinterpret_cast<uint32_t*>(mine + pipe_bytes + Tellers::kBytes);
  own.weights = reinterpret_cast<float*>(own.is_last + kStages);
  return own;
}

// The partial row that this rank itself gives for an own token lies in `out`, in the place of the
// sum that will take it in; or, one row with nothing to multiply or to round, where the caller has
// it.
__device__ inline bool is_own_row_partial(const CombineCall& call) {
  return call.layout == kRows && call.weights == nullptr;
}

// Puts bytes [first, end) of the sum of the warp's terms on their way to `to`: lane i holds the
// address (and weight) of term i.
template <typename Sum>
__device__ void sum_rows(uint32_t first, uint32_t end, WarpMemory& own, Sum& sum, uint8_t* to,
                         uint64_t term, float weight, int num_terms) {
  const uint32_t piece_bytes = own.pipe.piece_bytes;
  for (uint32_t begin = first; begin < end; begin += piece_bytes) {
    const uint32_t bytes = min(piece_bytes, end - begin);
    for (int i = 0; i < num_terms; ++i) {
      const uint8_t* from = reinterpret_cast<const uint8_t*>(__shfl_sync(0xffffffffu, term, i));
      const float w = __shfl_sync(0xffffffffu, weight, i);
      own.pipe.make_room(sum);
      const uint32_t stage = own.pipe.loaded % kStages;
      if (lane_id() == 0) {
        own.is_last[stage] = i == num_terms - 1;
        own.weights[stage] = w;
      }
      const bool is_target = i == num_terms - 1 && lane_id() == 0;
      own.pipe.put(from + begin, bytes, is_target ? reinterpret_cast<uint64_t>(to + begin) : 0);
    }
  }
}

// The lanes with a key, keys ascending: lane i gets the number of the i-th. Returns how many there
// are.
__device__ inline int order_lanes(int key, int* ordered) {
  int count = 0;
  *ordered = 0;
  for (;;) {
    const int least = __reduce_min_sync(0xffffffffu, key);
    if (least == kNothing) return count;
    const int from = __ffs(int(__ballot_sync(0xffffffffu, key == least))) - 1;
    if (lane_id() == count) *ordered = from;
    if (key == least) key = kNothing;
    ++count;
  }
}

}  // namespace commlib::cuda
