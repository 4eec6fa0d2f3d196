// The head of every operation: count the own tokens, publish one row to all ranks, wait for theirs,
// and settle where everything goes. Blocks count; the last of them to finish does the rest, the
// others wait for its word. All blocks of a kernel are resident.
#pragma once

#include "cuda/plan.cuh"

namespace commlib::cuda {

// True in all threads of the block that comes last. Its reads of what the other blocks wrote are
// ordered by the fences on both sides of the counter.
__device__ inline bool is_last_block(const Mesh& mesh) {
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

__device__ inline void report_to_host(const Mesh& mesh, const ExchangeCall& call,
                                      const Ledger& ledger) {
  const int ranks = mesh.num_ranks, threads = int(blockDim.x), thread = int(threadIdx.x);
  uint32_t* headers = reinterpret_cast<uint32_t*>(call.result->headers);
  for (int i = thread; i < ranks * kHeaderWords; i += threads) headers[i] = ledger.headers[i];
  if (!has_counts(call)) return;
  uint32_t* rank_counts = reinterpret_cast<uint32_t*>(call.result + 1);
  uint32_t* rows_per_expert = rank_counts + ranks * ranks;
  uint32_t* load = rows_per_expert + mesh.experts_per_rank;
  for (int i = thread; i < ranks * ranks; i += threads) rank_counts[i] = ledger.rank_counts[i];
  if (mesh.fabric != nullptr)
    for (int i = thread; i < ranks * mesh.fabric->num_nodes; i += threads)
      load[mesh.num_experts + i] = call.tables.node_counts[i];
  for (int e = thread; e < mesh.num_experts; e += threads) {
    uint32_t sum = 0;
    for (int source = 0; source < ranks; ++source) sum += ledger.rows[source * ledger.columns + e];
    load[e] = sum;
    const int local = e - mesh.rank * mesh.experts_per_rank;
    if (local >= 0 && local < mesh.experts_per_rank) rows_per_expert[local] = sum;
  }
}

// Calls that nobody waits for: the host looks for refusals when it comes by.
__device__ inline void keep_refusal(const ExchangeCall& call) {
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
    store_release(&call.refused->ticket, call.ticket);  // partner: the host's look
  }
}

// Tells the other blocks (and with the end of the kernel, later ones) what was settled.
__device__ inline void conclude(const Mesh& mesh, const ExchangeCall& call, uint64_t epoch,
                                Verdict verdict) {
  Workspace& workspace = *mesh.workspace;
  const bool has_handle = call.call.kind == kDispatch && call.tables.state != nullptr;
  if (has_handle && verdict != kGo) clear_tables(mesh, call);
  __syncthreads();
  if (threadIdx.x != 0) return;
  if (has_handle) *call.tables.state = verdict != kGo;
  if (verdict == kOverflow) workspace.overflowed = 1;
  workspace.plan.go = verdict == kGo;
  workspace.plan.epoch = uint32_t(epoch);
  workspace.next_push = workspace.next_own = workspace.next_expand = workspace.next_reduce =
      workspace.next_final = 0;
  workspace.epoch = epoch;
  call.result->verdict = verdict;
  fence_device();                            // what all threads of this block wrote
  store_release(&workspace.settled, epoch);  // partner: the load in settle() of the other blocks
}

// The part of the block that comes last. Returns once the others know; the host hears of it later.
__device__ inline void settle_alone(const Mesh& mesh, const ExchangeCall& call, uint32_t* memory,
                                    uint64_t epoch) {
  __shared__ uint32_t verdict;
  const Ledger ledger(mesh, call, memory);
  if (threadIdx.x == 0 && is_faulty(mesh)) adopt_fault(mesh);
  if (threadIdx.x == 0) verdict = kFaulty;
  bool is_there = !is_faulty(mesh) && !is_ending(mesh);
  is_there = __syncthreads_and(is_there) != 0;
  if (is_there) is_there = __syncthreads_and(publish(mesh, call, ledger, epoch)) != 0;
  if (is_there) is_there = gather(mesh, call, ledger, epoch);
  if (is_there) {
    if (has_counts(call)) place_experts(mesh, call, ledger);
    __syncthreads();
    if (has_counts(call)) place_blocks(mesh, call, ledger);
    if (warp_id() == 0) {
      const Verdict made = make_plan(mesh, call, ledger);
      if (lane_id() == 0) verdict = made;
    }
    __syncthreads();
  }
  conclude(mesh, call, epoch, Verdict(verdict));
  if (is_there) report_to_host(mesh, call, ledger);
  __syncthreads();
  if (threadIdx.x == 0) {
    fence_system();
    store_release(&call.result->ticket, call.ticket);  // partner: the host's poll
  }
  if (call.refused != nullptr && (verdict == kRefused || verdict == kNoRoom)) {
    __syncthreads();
    keep_refusal(call);
  }
  __syncthreads();  // the caller may use the memory
}

// The last block's own waits have deadlines, so this one ends first only if that block never runs:
// the kernel has more blocks than are resident.
__device__ inline bool wait_settled(const Mesh& mesh, uint64_t epoch) {
  const uint64_t start = now_ns();
  while (load_acquire(&mesh.workspace->settled) < epoch) {
    __nanosleep(64);
    if (now_ns() - start <= 2 * mesh.timeout_ns + 1000000000) continue;
    raise_timeout(mesh, {kExchange, mesh.rank, epoch, epoch}, mesh.workspace->settled);
    return false;
  }
  return true;
}

// Every thread of every block calls it. True: the plan of this operation is made and data moves.
__device__ inline bool settle(const Mesh& mesh, const ExchangeCall& call, uint32_t* memory) {
  __shared__ uint64_t epoch;
  __shared__ uint32_t is_settled;
  if (threadIdx.x == 0) epoch = mesh.workspace->epoch + 1;  // goes on when every block has come
  if (has_counts(call)) count_tokens(mesh, call, memory);
  if (has_counts(call) && mesh.fabric != nullptr) count_nodes(mesh, call);
  if (is_last_block(mesh)) {
    settle_alone(mesh, call, memory, epoch);
  } else {
    if (threadIdx.x == 0) is_settled = wait_settled(mesh, epoch);
    __syncthreads();
    if (is_settled == 0) return false;
  }
  return mesh.workspace->plan.go != 0;
}

}  // namespace commlib::cuda
