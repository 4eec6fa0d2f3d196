// Every operation starts here: count the own tokens, publish one row to all ranks, wait for theirs,
// and settle where everything goes. Blocks count; the last of them to finish does the rest, so no
// block waits for another one of its grid.
#include "cuda/plan.cuh"

namespace commlib::cuda {
namespace {

// True in all threads of the block that finishes last. Its reads of what the other blocks wrote are
// ordered by the fences on both sides of the counter.
__device__ bool is_last_block(const Mesh& mesh) {
  __shared__ uint32_t is_last;
  __syncthreads();
  if (threadIdx.x == 0) {
    fence_device();
    is_last = atomicInc(&mesh.workspace->blocks_done, gridDim.x - 1) == gridDim.x - 1;
    fence_device();
  }
  __syncthreads();
  return is_last != 0;
}

__device__ void report_to_host(const Mesh& mesh, const ExchangeCall& call, uint64_t epoch) {
  const int words = int(sizeof(ExchangeHeader) / 4);
  for (int i = int(threadIdx.x); i < mesh.num_ranks * words; i += int(blockDim.x)) {
    const uint8_t* row = exchange_row(mesh, mesh.rank, epoch, i / words);
    reinterpret_cast<uint32_t*>(call.result->headers + i / words)[i % words] =
        reinterpret_cast<const uint32_t*>(row)[i % words];
  }
  if (!has_counts(call)) return;
  uint32_t* rank_counts = reinterpret_cast<uint32_t*>(call.result + 1);
  uint32_t* rows_per_expert = rank_counts + mesh.num_ranks * mesh.num_ranks;
  uint32_t* load = rows_per_expert + mesh.experts_per_rank;
  for (int i = int(threadIdx.x); i < mesh.num_ranks * mesh.num_ranks; i += int(blockDim.x))
    rank_counts[i] = call.tables.rank_counts[i];
  for (int i = int(threadIdx.x); i < mesh.experts_per_rank; i += int(blockDim.x))
    rows_per_expert[i] = call.tables.rows_per_expert[i];
  for (int e = int(threadIdx.x); e < mesh.num_experts; e += int(blockDim.x)) {
    uint32_t sum = 0;
#pragma unroll 4
    for (int source = 0; source < mesh.num_ranks; ++source)
      sum += row_counts(exchange_row(mesh, mesh.rank, epoch, source))[e];
    load[e] = sum;
  }
}

// Calls that nobody waits for: the host looks for refusals when it comes by.
__device__ void keep_refusal(const ExchangeCall& call) {
  __shared__ uint32_t is_first;
  if (threadIdx.x == 0) is_first = load_acquire(&call.refused->ticket) == 0;
  __syncthreads();
  if (is_first == 0) return;
  const uint32_t* from = reinterpret_cast<const uint32_t*>(call.result);
  uint32_t* to = reinterpret_cast<uint32_t*>(call.refused);
  for (int i = 2 + int(threadIdx.x); i < int(sizeof(HostResult) / 4); i += int(blockDim.x))
    to[i] = from[i];
  __syncthreads();
  if (threadIdx.x == 0) {
    fence_system();
    commlib::store_release(&call.refused->ticket, call.ticket);  // partner: the host's look
  }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(512, 1)
    exchange(const __grid_constant__ Mesh mesh, const __grid_constant__ ExchangeCall call) {
  extern __shared__ uint32_t counts[];
  __shared__ uint32_t verdict;
  Workspace& workspace = *mesh.workspace;
  const uint64_t epoch = workspace.epoch + 1;  // the last block advances it when all have read it
  if (has_counts(call)) count_tokens(mesh, call, counts);
  if (!is_last_block(mesh)) return;

  if (threadIdx.x == 0 && is_faulty(mesh)) adopt_fault(mesh);
  bool is_there = !is_faulty(mesh) && workspace.is_faulty == 0;
  is_there = __syncthreads_and(is_there) != 0;
  if (is_there) publish(mesh, call, epoch);
  if (is_there) is_there = gather(mesh, epoch);
  if (threadIdx.x == 0) verdict = kFaulty;
  __syncthreads();
  if (is_there) {
    if (has_counts(call)) fill_tables(mesh, call, epoch, counts);
    __syncthreads();
    if (warp_id() == 0) {
      const Verdict made = make_plan(mesh, call, epoch);
      if (lane_id() == 0) verdict = made;
    }
    report_to_host(mesh, call, epoch);
    __syncthreads();
  }
  const bool has_handle = call.call.kind == kDispatch && call.tables.state != nullptr;
  if (has_handle && verdict != kGo) clear_tables(mesh, call);
  if (threadIdx.x == 0) {
    if (has_handle) *call.tables.state = verdict != kGo;
    if (verdict == kOverflow) workspace.overflowed = 1;
    workspace.plan.go = verdict == kGo;
    workspace.plan.epoch = uint32_t(epoch);
    workspace.next_push = workspace.next_expand = workspace.next_reduce = workspace.next_final = 0;
    workspace.epoch = epoch;
    call.result->verdict = verdict;
    fence_system();
    commlib::store_release(&call.result->ticket, call.ticket);  // partner: the host's poll
  }
  __syncthreads();
  if (call.refused != nullptr && (verdict == kRefused || verdict == kNoRoom)) keep_refusal(call);
}

}  // namespace commlib::cuda
