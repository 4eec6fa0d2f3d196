// Combine in the latency regime: send (one partial row for every row that came) and add_up (one sum
// for every own token). Send waits for nobody's rows.
#include "cuda/latency.cuh"
#include "cuda/sum.cuh"

namespace commlib::cuda {

struct LatencyCombineCall {
  const uint8_t* y;
  const float* weights;  // [row] or nullptr
  uint8_t* out;
  const uint8_t* records;  // of the handle, see LatencyDispatchCall
  const int32_t* owners;
  const uint32_t* state;
  uint32_t num_tokens, row_bytes, piece_bytes;
  uint32_t part_bytes;  // of a row, one warp's work: pieces
  uint32_t phases;
};

namespace {

// A part of the partial row of one token that came. Entry, then weight: loads of the next two are
// under way while one is summed.
struct Job {
  uint32_t source, token, part;
  bool is_task;  // false: there are no more
  int32_t row;   // of this lane; -1: none
  float weight;
};

__device__ Job make_job(const Mesh& mesh, const LatencyRegions& regions,
                        const LatencyCombineCall& call, PartTasks& tasks) {
  const uint32_t ranks = uint32_t(mesh.num_ranks);
  // Each rank begins with itself, so that no rank is written by all at once.
  Job job{(tasks.row() + uint32_t(mesh.rank)) % ranks,
          tasks.row() / ranks,
          tasks.part(),
          tasks.has_one(),
          -1,
          1.0f};
  tasks.next();
  const uint64_t place = uint64_t(job.source) * regions.max_tokens + job.token;
  if (job.is_task && lane_id() < mesh.num_topk)
    job.row = record_entries(call.records + place * record_bytes(mesh.num_topk))[lane_id()].row;
  return job;
}

__device__ void load_weight(const LatencyCombineCall& call, Job& job) {
  if (job.row >= 0 && call.weights != nullptr) job.weight = call.weights[job.row];
}

// Role: the local rows of every token that came, local experts (and so rows) ascending.
template <typename Sum>
__device__ void send_partials(const Mesh& mesh, const LatencyRegions& regions,
                              const LatencyCombineCall& call, WarpMemory& own, uint64_t epoch) {
  const Flags flags = partial_flags(regions);
  Sum sum(own.is_last, own.weights);
  PartTasks tasks(uint32_t(mesh.num_ranks) * regions.max_tokens,
                  (call.row_bytes + call.part_bytes - 1) / call.part_bytes);
  Job job = make_job(mesh, regions, call, tasks);
  load_weight(call, job);
  Job next = make_job(mesh, regions, call, tasks);
  while (job.is_task) {
    const Job after = make_job(mesh, regions, call, tasks);
    load_weight(call, next);
    int from = 0;
    const int count = order_lanes(job.row >= 0 ? job.row : kNothing, &from);
    if (count > 0) {
      const uint64_t row = uint64_t(uint32_t(__shfl_sync(0xffffffffu, job.row, from)));
      const float weight = __shfl_sync(0xffffffffu, job.weight, from);
      const uint32_t begin = job.part * call.part_bytes;
      sum_rows(begin, min(begin + call.part_bytes, call.row_bytes), own, sum,
               partial_slot(mesh, regions, int(job.source), epoch, mesh.rank, job.token),
               reinterpret_cast<uint64_t>(call.y + row * call.row_bytes), weight, count);
      own.announcer.add(Tellers::place(int(job.source), int(job.token * kMaxParts + job.part)),
                        own.pipe.loaded);
      own.announcer.tell(mesh, flags, uint32_t(epoch), own.pipe);
    }
    job = next;
    next = after;
  }
  own.pipe.drain(sum);
  own.announcer.tell_all(mesh, flags, uint32_t(epoch));
}

// Role: the own tokens; ranks ascending; a warp per part of a row.
template <typename T>
__device__ void add_up(const Mesh& mesh, const LatencyRegions& regions,
                       const LatencyCombineCall& call, WarpMemory& own, uint64_t epoch) {
  const int lane = lane_id();
  const Flags flags = partial_flags(regions);
  Summer<T, false> sum(own.is_last, own.weights);
  PartTasks tasks(call.num_tokens, (call.row_bytes + call.part_bytes - 1) / call.part_bytes);
  for (; tasks.has_one(); tasks.next()) {
    const uint32_t token = tasks.row(), begin = tasks.part() * call.part_bytes;
    const uint32_t end = min(begin + call.part_bytes, call.row_bytes);
    int rank = -1;
    if (lane < mesh.num_topk) rank = call.owners[uint64_t(token) * mesh.num_topk + lane];
    const uint32_t same = __match_any_sync(0xffffffffu, rank >= 0 ? rank : -1 - lane);
    const bool is_first = rank >= 0 && __ffs(int(same)) - 1 == lane;
    bool has_come = true;
    if (is_first)
      has_come = wait_part(mesh, part_flag(mesh, flags, rank, token * kMaxParts + tasks.part()),
                           rank, uint32_t(epoch), kAddUp);
    if (!__all_sync(0xffffffffu, has_come)) break;
    fence_async_global();  // what the acquire made visible, before the bulk loads
    __syncwarp();
    const uint8_t* partial =
        is_first ? partial_slot(mesh, regions, mesh.rank, epoch, rank, token) : nullptr;
    int from = 0;
    const int count = order_lanes(is_first ? rank : kNothing, &from);
    const uint64_t term = __shfl_sync(0xffffffffu, reinterpret_cast<uint64_t>(partial), from);
    uint8_t* out = call.out + uint64_t(token) * call.row_bytes;
    for (uint32_t i = begin + lane * 16; count == 0 && i < end; i += 512)
      *reinterpret_cast<uint4*>(out + i) = make_uint4(0, 0, 0, 0);
    sum_rows(begin, end, own, sum, out, term, 1.0f, count);
  }
  own.pipe.drain(sum);
}

__device__ void fill_nan(const LatencyCombineCall& call) {
  const uint64_t words = uint64_t(call.num_tokens) * call.row_bytes / 4;
  for (uint64_t i = blockIdx.x * blockDim.x + threadIdx.x; i < words; i += gridDim.x * blockDim.x)
    reinterpret_cast<uint32_t*>(call.out)[i] = 0x7fc07fc0u;
}

}  // namespace

extern "C" __global__ void __launch_bounds__(384, 1)
    latency_combine(const __grid_constant__ Mesh mesh,
                    const __grid_constant__ LatencyRegions regions,
                    const __grid_constant__ LatencyCombineCall call) {
  uint8_t* memory = dynamic_shared();
  const uint64_t* epochs = start_latency(mesh, regions);
  const uint64_t sent = epochs[kCombineSent] + 1, received = epochs[kAddedUp] + 1;
  const bool is_void = *call.state != 0;  // on all ranks alike
  WarpMemory own = carve_sums(call.piece_bytes, memory);
  if (threadIdx.x == 0 && is_faulty(mesh)) adopt_fault(mesh);
  if (call.phases & kSend) {
    if (!wait_room(mesh, regions.combine_done, sent)) return;
    if (!is_void && call.weights != nullptr)
      send_partials<Summer<uint16_t, true>>(mesh, regions, call, own, sent);
    else if (!is_void)
      send_partials<Summer<uint16_t, false>>(mesh, regions, call, own, sent);
  }
  if (call.phases & kReceive) {
    if (is_void)
      fill_nan(call);
    else
      add_up<uint16_t>(mesh, regions, call, own, received);
  }
  finish_latency(mesh, regions, call.phases, kCombineSent, kAddedUp, regions.combine_done);
}

}  // namespace commlib::cuda
