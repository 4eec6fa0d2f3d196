// Brings the experts' outputs home: reduce (one partial row per record, pushed to its source) and
// final_reduce (one sum per own token). Reduce waits for nobody, so every final_reduce is served.
#include "cuda/wait.cuh"
#include "layout/record.hpp"

namespace commlib::cuda {
namespace {

constexpr int kVectors = 4;       // 16-byte loads of one row under way per lane
constexpr int kReduceBatch = 2;   // partial rows announced together
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
      asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(words[i]) : "f"(f[2 * i + 1]), "f"(f[2 * i]));
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

__device__ uint4 load_row(const uint8_t* from) {
  uint4 v;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from)
               : "memory");
  return v;
}

// `to` = sum of the warp's terms: lane i holds the address (and weight) of term i. FP32, in order of
// lanes, the first assigned; no terms: zeros.
template <typename T, bool kWeighted>
__device__ void sum_rows(uint8_t* to, uint64_t term, float weight, int num_terms, uint32_t row_bytes) {
  constexpr int kColumns = Vector<T>::kColumns;
  for (uint32_t first = uint32_t(lane_id()) * 16; first - uint32_t(lane_id()) * 16 < row_bytes;
       first += kVectors * 512) {
    float acc[kVectors][kColumns] = {};
    for (int i = 0; i < num_terms; ++i) {
      const uint8_t* from = reinterpret_cast<const uint8_t*>(__shfl_sync(0xffffffffu, term, i));
      const float w = kWeighted ? __shfl_sync(0xffffffffu, weight, i) : 1.0f;
      uint4 v[kVectors];
#pragma unroll
      for (int u = 0; u < kVectors; ++u)
        if (first + u * 512 < row_bytes) v[u] = load_row(from + first + u * 512);
#pragma unroll
      for (int u = 0; u < kVectors; ++u) {
        float f[kColumns];
        Vector<T>::unpack(v[u], f);
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          if (kWeighted) acc[u][c] = i == 0 ? __fmul_rn(w, f[c]) : __fmaf_rn(w, f[c], acc[u][c]);
          else acc[u][c] = i == 0 ? f[c] : __fadd_rn(acc[u][c], f[c]);
        }
      }
    }
#pragma unroll
    for (int u = 0; u < kVectors; ++u)
      if (first + u * 512 < row_bytes) *reinterpret_cast<uint4*>(to + first + u * 512) = Vector<T>::pack(acc[u]);
  }
}

// Moves the values of lanes with a key to the lowest lanes, keys ascending; returns how many there are.
__device__ int order_lanes(int key, int* sorted_key) {
  int count = 0;
  *sorted_key = kNothing;
  for (;;) {
    const int least = __reduce_min_sync(0xffffffffu, key);
    if (least == kNothing) return count;
    if (lane_id() == count) *sorted_key = least;
    if (key == least) key = kNothing;
    ++count;
  }
}

// One partial row: the local rows of the record's token, local experts (and so rows) ascending.
template <typename T>
__device__ void reduce_record(const Mesh& mesh, const CombineCall& call, uint64_t index, uint8_t* to) {
  const int lane = lane_id(), per_rank = experts_per_rank(mesh);
  const uint8_t* record = call.records + index * record_bytes(mesh.num_topk);
  RecordEntry entry{-1, -1, 0.0f};
  if (lane < mesh.num_topk) entry = record_entries(record)[lane];
  const bool is_here = entry.expert >= 0 && entry.expert / per_rank == mesh.rank;
  const uint64_t own_row = call.layout == kRows ? index : uint64_t(entry.row);
  if (call.weight_grads != nullptr && is_here) {
    const uint64_t place = call.layout == kRows ? index * mesh.num_topk + lane : own_row;
    reinterpret_cast<float*>(to + call.row_bytes)[lane] = call.weight_grads[place];
  }
  int row = kNothing;
  const int key = !is_here ? kNothing : call.layout == kRows ? int(index) : entry.row;
  const int count = order_lanes(key, &row);
  uint64_t term = 0;
  float weight = 1.0f;
  if (lane < count) {
    term = reinterpret_cast<uint64_t>(call.y + uint64_t(row) * call.row_bytes);
    if (call.weights != nullptr) weight = call.weights[row];
  }
  if (call.weights != nullptr) sum_rows<T, true>(to, term, weight, count, call.row_bytes);
  else sum_rows<T, false>(to, term, 1.0f, count, call.row_bytes);
}

// Role: a partial row for every record, in record order, sources taking turns. Each rank begins with
// itself and goes on to the next, so that no source is written by all at once.
template <typename T>
__device__ void reduce(const Mesh& mesh, const CombineCall& call) {
  const int lane = lane_id();
  const uint32_t ranks = uint32_t(mesh.num_ranks);
  const Plan& plan = mesh.workspace->plan;
  const uint32_t most =
      __reduce_max_sync(0xffffffffu, lane < mesh.num_ranks ? plan.peer[lane].num_from : 0u);
  for (;;) {
    uint32_t ticket = 0;
    if (lane == 0) ticket = atomicAdd(&mesh.workspace->next_reduce, kReduceBatch);
    ticket = __shfl_sync(0xffffffffu, ticket, 0);
    if (ticket >= most * ranks) return;
    for (uint32_t i = ticket; i < ticket + kReduceBatch; ++i) {
      const PeerPlan& peer = plan.peer[(uint32_t(mesh.rank) + i) % ranks];
      if (i / ranks < peer.num_from)
        reduce_record<T>(mesh, call, peer.first_from + i / ranks,
                         peer.partial_out + uint64_t(i / ranks) * call.slot_bytes);
    }
    __syncwarp();
    fence_system();  // partner: the acquire in wait_arrived at the source (publish_partials)
    const uint32_t mine = ticket + uint32_t(lane);
    const uint32_t source = (uint32_t(mesh.rank) + mine) % ranks;
    if (lane < kReduceBatch && mine / ranks < plan.peer[source].num_from)
      store_relaxed(at<uint32_t>(mesh, int(source), mesh.combine_arrived) +
                        uint64_t(mesh.rank) * mesh.max_tokens + mine / ranks,
                    plan.epoch);
  }
}

// Role: the own tokens, each as soon as its partial rows are here; ranks ascending.
template <typename T>
__device__ void final_reduce(const Mesh& mesh, const CombineCall& call) {
  const int lane = lane_id();
  const Plan& plan = mesh.workspace->plan;
  for (;;) {
    uint32_t token = 0;
    if (lane == 0) token = atomicAdd(&mesh.workspace->next_final, 1u);
    token = __shfl_sync(0xffffffffu, token, 0);
    if (token >= call.num_tokens) return;
    Route route{-1, -1, -1, -1};
    if (lane < mesh.num_topk) route = call.routes[uint64_t(token) * mesh.num_topk + lane];
    const uint32_t same = __match_any_sync(0xffffffffu, route.rank >= 0 ? route.rank : -1 - lane);
    const bool is_first = route.rank >= 0 && __ffs(int(same)) - 1 == lane;
    bool has_come = true;
    if (is_first)
      has_come = wait_arrived(mesh,
                              at<uint32_t>(mesh, mesh.rank, mesh.combine_arrived) +
                                  uint64_t(route.rank) * mesh.max_tokens + route.record,
                              plan.epoch, kFinalReduce, route.rank);
    if (!__all_sync(0xffffffffu, has_come)) return;
    __syncwarp();
    const uint8_t* partial = nullptr;
    if (route.rank >= 0) partial = plan.peer[route.rank].partial_in + uint64_t(route.record) * call.slot_bytes;
    if (call.out_weight_grads != nullptr && lane < mesh.num_topk)
      call.out_weight_grads[uint64_t(token) * mesh.num_topk + lane] =
          partial == nullptr ? 0.0f : reinterpret_cast<const float*>(partial + call.row_bytes)[lane];
    int key = kNothing;
    const int count = order_lanes(is_first ? route.rank * 32 + lane : kNothing, &key);
    const uint64_t term = __shfl_sync(0xffffffffu, reinterpret_cast<uint64_t>(partial), key & 31);
    sum_rows<T, false>(call.out + uint64_t(token) * call.row_bytes, term, 1.0f, count, call.row_bytes);
  }
}

template <typename T>
__device__ void combine(const Mesh& mesh, const CombineCall& call) {
  if (mesh.workspace->plan.go == 0) return;
  if (uint32_t(warp_id()) >= call.final_warps) reduce<T>(mesh, call);
  final_reduce<T>(mesh, call);
}

}  // namespace

extern "C" __global__ void __launch_bounds__(512, 1)
    combine_bf16(const __grid_constant__ Mesh mesh, const __grid_constant__ CombineCall call) {
  combine<uint16_t>(mesh, call);
}

extern "C" __global__ void __launch_bounds__(512, 1)
    combine_f32(const __grid_constant__ Mesh mesh, const __grid_constant__ CombineCall call) {
  combine<float>(mesh, call);
}

}  // namespace commlib::cuda
