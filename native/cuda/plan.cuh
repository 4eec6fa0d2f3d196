// From the exchanged rows to where everything goes: the same sums on every rank.
#pragma once

#include "cuda/tier_plan.cuh"
#include "layout/record.hpp"

namespace commlib::cuda {

__device__ inline uint32_t warp_inclusive_sum(uint32_t value) {
  for (int delta = 1; delta < 32; delta *= 2) {
    const uint32_t below = __shfl_up_sync(0xffffffffu, value, delta);
    if (lane_id() >= delta) value += below;
  }
  return value;
}

// A warp per rank: where its experts start, and where this rank's rows start in each of them.
__device__ inline void place_experts(const Mesh& mesh, const ExchangeCall& call,
                                     const Ledger& ledger) {
  const int per_rank = mesh.experts_per_rank, ranks = mesh.num_ranks;
  const uint32_t alignment = call.call.alignment;
  for (int rank = warp_id(); rank < ranks; rank += int(blockDim.x / 32)) {
    uint32_t offset = 0;
    for (int j = lane_id(); j - lane_id() < per_rank; j += 32) {
      uint32_t total = 0, before = 0;
      for (int source = 0; source < ranks && j < per_rank; ++source) {
        if (source == mesh.rank) before = total;
        total += ledger.rows[source * ledger.columns + rank * per_rank + j];
      }
      const uint32_t aligned = (total + alignment - 1) / alignment * alignment;
      const uint32_t end = offset + warp_inclusive_sum(aligned);
      if (j < per_rank) ledger.first_row[rank * per_rank + j] = end - aligned + before;
      if (j < per_rank && rank == mesh.rank) {
        call.tables.rows_per_expert[j] = total;
        call.tables.expert_offset[j] = end - aligned;
        if (j == per_rank - 1) call.tables.expert_offset[per_rank] = end;
      }
      offset = __shfl_sync(0xffffffffu, end, 31);
    }
    uint32_t records = 0;
    if (lane_id() < ranks)
      records = ledger.rows[lane_id() * ledger.columns + mesh.num_experts + rank];
    if (lane_id() < ranks) {
      ledger.rank_counts[lane_id() * ranks + rank] = records;
      call.tables.rank_counts[lane_id() * ranks + rank] = records;
    }
    const uint32_t num_records = __reduce_add_sync(0xffffffffu, records);
    const uint32_t num_rows = call.call.layout == kRows ? num_records : offset;
    if (lane_id() == 0) ledger.num_rows[rank] = call.tables.num_rows[rank] = num_rows;
  }
}

// The first row and record of each block that counted.
__device__ inline void place_blocks(const Mesh& mesh, const ExchangeCall& call,
                                    const Ledger& ledger) {
  for (uint32_t i = threadIdx.x; i < call.count_blocks * ledger.columns; i += blockDim.x) {
    const int column = int(i) % ledger.columns;
    const uint32_t first = column < mesh.num_experts ? ledger.first_row[column] : 0;
    call.block_base[i] = first + ledger.before[i];
  }
}

__device__ inline Landing dispatch_landing(const Mesh& mesh, const ExchangeCall& call,
                                           uint64_t num_rows, uint64_t num_records) {
  Landing landing;
  const bool is_fresh = call.call.kind == kDispatch;
  const bool is_rows = call.call.layout == kRows;
  const uint64_t slots = num_rows * uint64_t(mesh.num_topk);  // of the rows layout
  landing.num_rows = num_rows;
  landing.num_records = num_records;
  landing.rows = 0;
  landing.scales = align_heap(num_rows * call.row_bytes);
  landing.weights = landing.scales + align_heap(num_rows * call.scales_bytes);
  landing.topk_idx =
      landing.weights + (is_fresh ? align_heap((is_rows ? slots : num_rows) * 4) : 0);
  landing.output_bytes = landing.topk_idx + (is_fresh && is_rows ? align_heap(slots * 8) : 0);
  landing.records = landing.output_bytes;
  landing.total_bytes =
      landing.records + (is_fresh ? align_heap(num_records * record_bytes(mesh.num_topk)) : 0);
  return landing;
}

// One warp. By handle: whether the dispatch that made it did.
__device__ inline bool overflows(const ExchangeCall& call, const Ledger& ledger, int ranks) {
  if (call.call.kind == kBarrier || call.call.kind == kGrow) return false;
  if (call.call.kind != kDispatch) return *call.tables.state != 0;
  const bool is_over = call.call.capacity != 0 && lane_id() < ranks &&
                       ledger.num_rows[lane_id()] > call.call.capacity;
  return __any_sync(0xffffffffu, is_over);
}

// Nothing comes of this dispatch: all counts are 0, so that nobody reads what is not there.
__device__ inline void clear_tables(const Mesh& mesh, const ExchangeCall& call) {
  const int ranks = mesh.num_ranks;
  for (int i = int(threadIdx.x); i < ranks * ranks; i += int(blockDim.x))
    call.tables.rank_counts[i] = 0;
  for (int i = int(threadIdx.x); i < ranks; i += int(blockDim.x)) call.tables.num_rows[i] = 0;
  for (int i = int(threadIdx.x); i <= mesh.experts_per_rank; i += int(blockDim.x)) {
    if (i < mesh.experts_per_rank) call.tables.rows_per_expert[i] = 0;
    call.tables.expert_offset[i] = 0;
  }
}

// One warp, a lane per peer: what the exchanged rows mean for the data kernel. Returns the verdict.
__device__ inline Verdict make_plan(const Mesh& mesh, const ExchangeCall& call,
                                    const Ledger& ledger) {
  const int peer = lane_id(), me = mesh.rank, ranks = mesh.num_ranks;
  Plan& plan = mesh.workspace->plan;
  const bool is_dispatch = call.call.kind == kDispatch || call.call.kind == kCachedDispatch;
  const uint32_t* counts = ledger.rank_counts;
  uint64_t needed = 0;
  bool is_ok = true, has_room = true;
  if (peer < ranks) {
    const ExchangeHeader& header = ledger.header(peer);
    const ExchangeHeader& first = ledger.header(0);
    const uint32_t* words = reinterpret_cast<const uint32_t*>(&header.call);
    for (int i = 0; i < int(sizeof(CallWords) / 4); ++i)
      is_ok &= words[i] == reinterpret_cast<const uint32_t*>(&first.call)[i];
    is_ok &= header.status == kOk;
  }
  is_ok = __all_sync(0xffffffffu, is_ok);
  if (is_ok && peer < ranks && call.call.kind <= kCombine) {
    const ExchangeHeader& header = ledger.header(peer);
    uint8_t* grant = mesh.heap[peer] + header.grant_offset;
    PeerPlan own{};
    uint64_t from = 0, partial_out = 0, partial_in = 0;
#pragma unroll 4
    for (int r = 0; r < ranks; ++r) {
      if (r < me) own.record_base += counts[r * ranks + peer];
      if (r < peer) own.first_from += counts[r * ranks + me];
      // A rank's own partial rows of its own tokens do not travel.
      if (r < me && r != peer)
        partial_out += align_heap(counts[peer * ranks + r] * call.slot_bytes);
      if (r < peer && r != me) partial_in += align_heap(counts[me * ranks + r] * call.slot_bytes);
      from += counts[r * ranks + peer];
    }
    own.num_from = counts[peer * ranks + me];
    if (is_dispatch) {
      const uint64_t capacity = call.call.capacity;
      const Landing landing =
          capacity == 0
              ? dispatch_landing(mesh, call, ledger.num_rows[peer], from)
              : dispatch_landing(mesh, call, capacity, uint64_t(ranks) * uint64_t(mesh.max_tokens));
      needed = landing.total_bytes;
      own.rows = grant;
      own.scales = reinterpret_cast<float*>(grant + landing.scales);
      own.records = grant + landing.records + own.record_base * record_bytes(mesh.num_topk);
      if (peer == me) {
        plan.weights = reinterpret_cast<float*>(grant + landing.weights);
        plan.topk_idx = reinterpret_cast<int64_t*>(grant + landing.topk_idx);
        plan.records = grant + landing.records;
        call.result->landing = landing;
      }
    } else if (mesh.fabric != nullptr) {
      needed = place_partials(mesh, call, ledger, peer, own);
    } else {
      for (int w = 0; w < ranks; ++w)
        if (w != peer) needed += align_heap(counts[peer * ranks + w] * call.slot_bytes);
      own.partial_out = grant + partial_out;
      own.partial_in = mesh.heap[me] + call.grant_offset + partial_in;
    }
    plan.peer[peer] = own;
    has_room = needed <= header.grant_bytes;
    call.result->needed[peer] = needed;
  }
  has_room = __all_sync(0xffffffffu, has_room);
  return !is_ok ? kRefused : overflows(call, ledger, ranks) ? kOverflow : !has_room ? kNoRoom : kGo;
}

}  // namespace commlib::cuda
