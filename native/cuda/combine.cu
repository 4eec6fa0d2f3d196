// Brings the experts' outputs home: reduce (one partial row per record, pushed to its source) and
// final_reduce (one sum per own token). Reduce waits for nobody, so every final_reduce is served.
#include "cuda/bulk.cuh"
#include "layout/record.hpp"

namespace commlib::cuda {
namespace {

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

using Pipe = RowPipe<kStages, 1>;
using Tellers = Announcer<1, 4, 6>;

struct WarpMemory {
  Pipe pipe;
  Tellers announcer;
  uint32_t* is_last;
  float* weights;
};

// Shared memory: the same for every warp. commlib/cuda/launch.py computes the total.
__device__ WarpMemory carve(const CombineCall& call, uint8_t* memory) {
  const uint32_t pipe_bytes =
      kStages * call.piece_bytes + uint32_t(align_up(Pipe::kTableBytes, 16));
  const uint32_t warp_bytes =
      uint32_t(align_up(pipe_bytes + Tellers::kBytes + kStages * 8, Pipe::kAlignment));
  uint32_t given;
  asm("mov.u32 %0, %dynamic_smem_size;" : "=r"(given));
  if (blockDim.x / 32 * warp_bytes > given || call.piece_bytes > kVectors * 512) __trap();
  uint8_t* mine = memory + uint32_t(warp_id()) * warp_bytes;
  WarpMemory own;
  own.pipe.init(mine, call.piece_bytes);
  own.announcer.init(mine + pipe_bytes);
  own.is_last = reinterpret_cast<uint32_t*>(mine + pipe_bytes + Tellers::kBytes);
  own.weights = reinterpret_cast<float*>(own.is_last + kStages);
  return own;
}

// Puts the sum of the warp's terms on its way to `to`: lane i holds the address (and weight) of
// term i.
template <typename Sum>
__device__ void sum_rows(const CombineCall& call, WarpMemory& own, Sum& sum, uint8_t* to,
                         uint64_t term, float weight, int num_terms) {
  for (uint32_t begin = 0; begin < call.row_bytes; begin += call.piece_bytes) {
    const uint32_t bytes = min(call.piece_bytes, call.row_bytes - begin);
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
__device__ int order_lanes(int key, int* ordered) {
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

// Which record a ticket of reduce means: sources take turns, this rank first.
struct Turn {
  uint32_t source, number;
  bool is_there;   // false: this source has fewer records than others
  uint32_t index;  // among all records here
};

__device__ Turn turn_of(const Mesh& mesh, uint32_t ticket) {
  const uint32_t ranks = uint32_t(mesh.num_ranks);
  Turn turn{(uint32_t(mesh.rank) + ticket) % ranks, ticket / ranks, false, 0};
  const PeerPlan& peer = mesh.workspace->plan.peer[turn.source];
  turn.is_there = turn.number < peer.num_from;
  turn.index = peer.first_from + turn.number;
  return turn;
}

// One ticket on its way: entry first, then the weight of the lane's row, then the sum. Loads of the
// next two are under way while one is summed.
struct Job {
  uint32_t ticket;
  int32_t expert;  // of this lane; -1: none here
  int32_t row;
  float weight;
};

__device__ Job make_job(const Mesh& mesh, const CombineCall& call, uint32_t ticket) {
  Job job{ticket, -1, -1, 1.0f};
  const Turn turn = turn_of(mesh, ticket);
  if (!turn.is_there || lane_id() >= mesh.num_topk) return job;
  const RecordEntry* entry =
      record_entries(call.records + uint64_t(turn.index) * record_bytes(mesh.num_topk)) + lane_id();
  job.expert = entry->expert;
  job.row = call.layout == kRows ? int32_t(turn.index) : entry->row;
  return job;
}

// Keeps what is on this rank and loads its weight.
__device__ void load_weight(const Mesh& mesh, const CombineCall& call, Job& job) {
  if (job.expert >= 0 && job.expert / mesh.experts_per_rank != mesh.rank) job.expert = -1;
  if (job.expert >= 0 && call.weights != nullptr) job.weight = call.weights[job.row];
}

// One partial row: the local rows of the record's token, local experts (and so rows) ascending.
template <typename Sum>
__device__ void reduce_record(const Mesh& mesh, const CombineCall& call, WarpMemory& own, Sum& sum,
                              const Job& job, const Turn& turn) {
  const int lane = lane_id();
  const bool is_here = job.expert >= 0;
  uint8_t* to =
      mesh.workspace->plan.peer[turn.source].partial_out + uint64_t(turn.number) * call.slot_bytes;
  if (call.weight_grads != nullptr && is_here) {
    const uint64_t place =
        call.layout == kRows ? uint64_t(turn.index) * mesh.num_topk + lane : uint64_t(job.row);
    reinterpret_cast<float*>(to + call.row_bytes)[lane] = call.weight_grads[place];
  }
  // In the rows layout all lanes with a slot here share one row: the first of them stands for it.
  const uint32_t here = __ballot_sync(0xffffffffu, is_here);
  const bool is_term = is_here && (call.layout == kGrouped || lane == __ffs(int(here)) - 1);
  int from = 0;
  const int count = order_lanes(is_term ? job.row : kNothing, &from);
  const uint64_t row = uint64_t(__shfl_sync(0xffffffffu, job.row, from));
  const float weight = __shfl_sync(0xffffffffu, job.weight, from);
  sum_rows(call, own, sum, to, reinterpret_cast<uint64_t>(call.y + row * call.row_bytes), weight,
           count);
}

// Role: a partial row for every record, in record order, sources taking turns. Each rank begins
// with itself and goes on to the next, so that no source is written by all at once.
template <typename Sum>
__device__ void reduce(const Mesh& mesh, const CombineCall& call, WarpMemory& own) {
  const Plan& plan = mesh.workspace->plan;
  const uint32_t most = __reduce_max_sync(
      0xffffffffu, lane_id() < mesh.num_ranks ? plan.peer[lane_id()].num_from : 0u);
  const uint32_t end = most * uint32_t(mesh.num_ranks);
  Sum sum(own.is_last, own.weights);
  Tickets tickets(&mesh.workspace->next_reduce);
  Job job = make_job(mesh, call, tickets.take());
  load_weight(mesh, call, job);
  Job next = make_job(mesh, call, tickets.take());
  while (job.ticket < end) {
    const Job after = make_job(mesh, call, tickets.take());
    load_weight(mesh, call, next);
    const Turn turn = turn_of(mesh, job.ticket);
    if (turn.is_there) {
      reduce_record(mesh, call, own, sum, job, turn);
      own.announcer.add(Tellers::place(int(turn.source), int(turn.number)), own.pipe.loaded);
      own.announcer.tell(mesh, mesh.combine_arrived, plan.epoch, own.pipe);
    }
    job = next;
    next = after;
  }
  own.pipe.drain(sum);
  own.announcer.tell_all(mesh, mesh.combine_arrived, plan.epoch);
}

__device__ Route load_route(const Mesh& mesh, const CombineCall& call, uint32_t token) {
  if (lane_id() >= mesh.num_topk || token >= call.num_tokens) return {-1, -1, -1, -1};
  return call.routes[uint64_t(token) * mesh.num_topk + lane_id()];
}

// Role: the own tokens, each as soon as its partial rows are here; ranks ascending.
template <typename T>
__device__ void final_reduce(const Mesh& mesh, const CombineCall& call, WarpMemory& own) {
  const int lane = lane_id();
  const Plan& plan = mesh.workspace->plan;
  Summer<T, false> sum(own.is_last, own.weights);
  Tickets tickets(&mesh.workspace->next_final);
  uint32_t token = tickets.take();
  Route route = load_route(mesh, call, token);
  while (token < call.num_tokens) {
    const uint32_t next_token = tickets.take();
    const Route next_route = load_route(mesh, call, next_token);
    const uint32_t same = __match_any_sync(0xffffffffu, route.rank >= 0 ? route.rank : -1 - lane);
    const bool is_first = route.rank >= 0 && __ffs(int(same)) - 1 == lane;
    bool has_come = true;
    if (is_first)
      has_come = wait_arrived(mesh,
                              at<uint32_t>(mesh, mesh.rank, mesh.combine_arrived) +
                                  uint64_t(route.rank) * mesh.max_tokens + route.record,
                              plan.epoch, kFinalReduce, route.rank);
    if (!__all_sync(0xffffffffu, has_come)) break;
    fence_async_global();  // what the acquire made visible, before the bulk loads
    __syncwarp();
    const uint8_t* partial = nullptr;
    if (route.rank >= 0)
      partial = plan.peer[route.rank].partial_in + uint64_t(route.record) * call.slot_bytes;
    if (call.out_weight_grads != nullptr && lane < mesh.num_topk)
      call.out_weight_grads[uint64_t(token) * mesh.num_topk + lane] =
          partial == nullptr ? 0.0f
                             : reinterpret_cast<const float*>(partial + call.row_bytes)[lane];
    int from = 0;
    const int count = order_lanes(is_first ? route.rank : kNothing, &from);
    const uint64_t term = __shfl_sync(0xffffffffu, reinterpret_cast<uint64_t>(partial), from);
    uint8_t* out = call.out + uint64_t(token) * call.row_bytes;
    for (uint32_t i = lane * 16; count == 0 && i < call.row_bytes; i += 512)
      *reinterpret_cast<uint4*>(out + i) = make_uint4(0, 0, 0, 0);
    sum_rows(call, own, sum, out, term, 1.0f, count);
    token = next_token;
    route = next_route;
  }
  own.pipe.drain(sum);
}

template <typename T>
__device__ void combine(const Mesh& mesh, const CombineCall& call) {
  extern __shared__ __align__(128) uint8_t memory[];
  if (mesh.workspace->plan.go == 0) return;
  WarpMemory own = carve(call, memory);
  if (uint32_t(warp_id()) >= call.final_warps) {
    if (call.weights != nullptr)
      reduce<Summer<T, true>>(mesh, call, own);
    else
      reduce<Summer<T, false>>(mesh, call, own);
  }
  final_reduce<T>(mesh, call, own);
}

}  // namespace

extern "C" __global__ void __launch_bounds__(480, 1)
    combine_bf16(const __grid_constant__ Mesh mesh, const __grid_constant__ CombineCall call) {
  combine<uint16_t>(mesh, call);
}

extern "C" __global__ void __launch_bounds__(480, 1)
    combine_f32(const __grid_constant__ Mesh mesh, const __grid_constant__ CombineCall call) {
  combine<float>(mesh, call);
}

}  // namespace commlib::cuda
