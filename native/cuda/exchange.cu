// Every operation starts here: count the own tokens, publish one row to all ranks, wait for theirs,
// and settle where everything goes. Blocks count; the last of them to finish does the rest, so no
// block waits for another one of its grid.
#include "channel/counter.hpp"
#include "cuda/wait.cuh"
#include "layout/record.hpp"

namespace commlib::cuda {
namespace {

constexpr uint64_t kNoError = ~0ull;
constexpr uint64_t kHeapAlignment = 256;
constexpr int kPrefetch = 8;  // tokens whose choices a warp loads ahead

// A rank whose host rejected the call publishes no counts.
__device__ bool has_counts(const ExchangeCall& call) {
  return call.call.kind == kDispatch && call.status == kOk;
}

__device__ uint32_t* row_counts(uint8_t* row) {
  return reinterpret_cast<uint32_t*>(row + sizeof(ExchangeHeader));
}

__device__ ExchangeHeader* row_header(uint8_t* row) {
  return reinterpret_cast<ExchangeHeader*>(row);
}

__device__ void report(const Mesh& mesh, uint32_t index, Status status) {
  atomicMin(reinterpret_cast<unsigned long long*>(&mesh.workspace->input_error),
            static_cast<unsigned long long>(index) << 8 | status);
}

// One token: its slots get their place among the warp's tokens, in token order.
__device__ void count_token(const Mesh& mesh, const ExchangeCall& call, uint32_t* warp_counts,
                            uint32_t token, int64_t expert, float weight) {
  const int lane = lane_id();
  const int num_topk = mesh.num_topk;
  const uint32_t index = token * uint32_t(num_topk) + uint32_t(lane);
  const bool is_slot = lane < num_topk && expert != -1;
  const bool is_valid = is_slot && expert >= 0 && expert < mesh.num_experts;
  const uint32_t same = __match_any_sync(0xffffffffu, is_valid ? int(expert) : -1 - lane);
  if (is_slot && !is_valid) report(mesh, index, kBadExpert);
  if (is_valid && __ffs(int(same)) - 1 != lane) report(mesh, index, kDuplicate);
  if (is_valid && !isfinite(weight)) report(mesh, index, kBadWeight);

  const int rank = is_valid ? int(expert) / mesh.experts_per_rank : -1 - lane;
  const int leader = __ffs(int(__match_any_sync(0xffffffffu, rank))) - 1;
  uint32_t in_expert = 0, in_rank = 0;
  if (is_valid) in_expert = warp_counts[expert]++;  // experts of a token differ
  if (is_valid && leader == lane) in_rank = warp_counts[mesh.num_experts + rank]++;
  in_rank = __shfl_sync(0xffffffffu, in_rank, leader);
  if (lane < num_topk) call.slots[index] = make_uint2(in_expert, in_rank);
  __syncwarp();
}

struct TokenRange {
  uint32_t begin, end;
};

__device__ TokenRange tokens_of_warp(const ExchangeCall& call) {
  const uint32_t warps = blockDim.x / 32;
  const uint32_t per_warp = (call.tokens_per_block + warps - 1) / warps;
  const uint32_t block_begin = blockIdx.x * call.tokens_per_block;
  const uint32_t block_end = min(block_begin + call.tokens_per_block, call.num_tokens);
  const uint32_t begin = block_begin + uint32_t(warp_id()) * per_warp;
  return {min(begin, block_end), min(begin + per_warp, block_end)};
}

// Role of every block: counts of its tokens, and each slot's place among them.
__device__ void count_tokens(const Mesh& mesh, const ExchangeCall& call, uint32_t* counts) {
  const int columns = mesh.num_experts + mesh.num_ranks;
  const int warps = int(blockDim.x / 32);
  for (int i = int(threadIdx.x); i < columns * warps; i += int(blockDim.x)) counts[i] = 0;
  __syncthreads();

  uint32_t* own = counts + warp_id() * columns;
  const TokenRange range = tokens_of_warp(call);
  const int lane = lane_id();
  for (uint32_t first = range.begin; first < range.end; first += kPrefetch) {
    int64_t experts[kPrefetch];
    float weights[kPrefetch];
#pragma unroll
    for (int i = 0; i < kPrefetch; ++i) {
      const bool is_there = first + i < range.end && lane < mesh.num_topk;
      const uint64_t index = uint64_t(first + i) * mesh.num_topk + lane;
      experts[i] = is_there ? call.topk_idx[index] : -1;
      weights[i] = is_there && call.topk_weights != nullptr ? call.topk_weights[index] : 1.0f;
    }
#pragma unroll
    for (int i = 0; i < kPrefetch; ++i)
      if (first + i < range.end) count_token(mesh, call, own, first + i, experts[i], weights[i]);
  }
  __syncthreads();

  // Counts of the warps below, in place, and of the whole block.
  for (int c = int(threadIdx.x); c < columns; c += int(blockDim.x)) {
    uint32_t sum = 0;
    for (int w = 0; w < warps; ++w) {
      const uint32_t count = counts[w * columns + c];
      counts[w * columns + c] = sum;
      sum += count;
    }
    call.block_base[blockIdx.x * columns + c] = sum;
  }
  __syncthreads();

  const uint32_t num_topk = uint32_t(mesh.num_topk);
  const uint32_t end = range.end * num_topk;
  for (uint32_t first = range.begin * num_topk + lane; first < end; first += 32 * kPrefetch) {
    int64_t experts[kPrefetch];
    uint2 slots[kPrefetch];
#pragma unroll
    for (int i = 0; i < kPrefetch; ++i) {
      experts[i] = -1;
      if (first + i * 32 < end)
        experts[i] = call.topk_idx[first + i * 32], slots[i] = call.slots[first + i * 32];
    }
#pragma unroll
    for (int i = 0; i < kPrefetch; ++i) {
      if (experts[i] < 0 || experts[i] >= mesh.num_experts) continue;
      slots[i].x += own[experts[i]];
      slots[i].y += own[mesh.num_experts + experts[i] / mesh.experts_per_rank];
      call.slots[first + i * 32] = slots[i];
    }
  }
}

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

// Calls `use(block, sum of `sum` and the counts of the blocks below)` for one column. Loads of
// several blocks are under way together.
template <typename Use>
__device__ uint32_t sum_blocks(const Mesh& mesh, const ExchangeCall& call, int column, uint32_t sum,
                               Use use) {
  constexpr uint32_t kTogether = 8;
  const int columns = mesh.num_experts + mesh.num_ranks;
  for (uint32_t first = 0; first < gridDim.x; first += kTogether) {
    uint32_t counts[kTogether];
#pragma unroll
    for (uint32_t i = 0; i < kTogether; ++i)
      counts[i] = first + i < gridDim.x ? call.block_base[(first + i) * columns + column] : 0;
#pragma unroll
    for (uint32_t i = 0; i < kTogether; ++i) {
      if (first + i < gridDim.x) use(first + i, sum);
      sum += counts[i];
    }
  }
  return sum;
}

__device__ void publish(const Mesh& mesh, const ExchangeCall& call, uint64_t epoch) {
  const int columns = mesh.num_experts + mesh.num_ranks;
  for (int c = int(threadIdx.x); c < columns; c += int(blockDim.x)) {
    const uint32_t sum =
        has_counts(call) ? sum_blocks(mesh, call, c, 0, [](uint32_t, uint32_t) {}) : 0;
    for (int rank = 0; rank < mesh.num_ranks; ++rank)
      row_counts(exchange_row(mesh, rank, epoch, mesh.rank))[c] = sum;
  }
  const uint64_t error = mesh.workspace->input_error;
  if (int(threadIdx.x) < mesh.num_ranks) {
    ExchangeHeader* header = row_header(exchange_row(mesh, int(threadIdx.x), epoch, mesh.rank));
    header->epoch = epoch;
    header->grant_offset = call.grant_offset;
    header->grant_bytes = call.grant_bytes;
    header->call = call.call;
    const bool is_bad = has_counts(call) && error != kNoError;
    const uint32_t index = uint32_t(error >> 8);
    header->status = call.status != kOk ? call.status : is_bad ? uint32_t(error & 0xff) : kOk;
    header->bad_index = index;
    header->bad_value = 0;
    if (is_bad)
      header->bad_value = (error & 0xff) == kBadWeight
                              ? int64_t(__float_as_uint(call.topk_weights[index]))
                              : call.topk_idx[index];
    if (call.status == kRejected)
      for (int i = 0; i < kTextWords; ++i) header->text[i] = call.text[i];
  }
  __syncthreads();
  if (threadIdx.x == 0) mesh.workspace->input_error = kNoError;
  if (int(threadIdx.x) < mesh.num_ranks) {
    // Publishes what all threads of this block wrote. Partner: the load in gather() at that rank.
    fence_system();
    store_release(at<uint64_t>(mesh, int(threadIdx.x), mesh.exchange_epoch + kLine * mesh.rank),
                  epoch);
  }
}

__device__ bool gather(const Mesh& mesh, uint64_t epoch) {
  bool has_come = true;
  const int source = int(threadIdx.x);
  if (source < mesh.num_ranks) {
    const uint64_t* word = at<uint64_t>(mesh, mesh.rank, mesh.exchange_epoch + kLine * source);
    has_come = wait_until(mesh, {kExchange, source, epoch, epoch}, [=](uint64_t* seen) {
      *seen = load_acquire(word);  // partner: the store in publish() at the source
      return *seen >= epoch;
    });
  }
  return __syncthreads_and(has_come) != 0;
}

__device__ uint32_t warp_inclusive_sum(uint32_t value) {
  for (int delta = 1; delta < 32; delta *= 2) {
    const uint32_t below = __shfl_up_sync(0xffffffffu, value, delta);
    if (lane_id() >= delta) value += below;
  }
  return value;
}

// A warp per rank: where its experts start, and where this rank's rows start in each of them.
__device__ void place_experts(const Mesh& mesh, const ExchangeCall& call, uint64_t epoch,
                              uint32_t* first_row) {
  const int per_rank = mesh.experts_per_rank;
  const uint32_t alignment = call.call.alignment;
  for (int rank = warp_id(); rank < mesh.num_ranks; rank += int(blockDim.x / 32)) {
    uint32_t offset = 0;
    for (int j = lane_id(); j - lane_id() < per_rank; j += 32) {
      uint32_t total = 0, before = 0;
#pragma unroll 4
      for (int source = 0; source < mesh.num_ranks; ++source) {
        if (j >= per_rank) continue;
        if (source == mesh.rank) before = total;
        total += row_counts(exchange_row(mesh, mesh.rank, epoch, source))[rank * per_rank + j];
      }
      const uint32_t aligned = (total + alignment - 1) / alignment * alignment;
      const uint32_t end = offset + warp_inclusive_sum(aligned);
      if (j < per_rank) first_row[rank * per_rank + j] = end - aligned + before;
      if (j < per_rank && rank == mesh.rank) {
        call.tables.rows_per_expert[j] = total;
        call.tables.expert_offset[j] = end - aligned;
        if (j == per_rank - 1) call.tables.expert_offset[per_rank] = end;
      }
      offset = __shfl_sync(0xffffffffu, end, 31);
    }
    uint32_t records = 0;
    if (lane_id() < mesh.num_ranks)
      records =
          row_counts(exchange_row(mesh, mesh.rank, epoch, lane_id()))[mesh.num_experts + rank];
    if (lane_id() < mesh.num_ranks)
      call.tables.rank_counts[lane_id() * mesh.num_ranks + rank] = records;
    const uint32_t num_records = __reduce_add_sync(0xffffffffu, records);
    if (lane_id() == 0)
      call.tables.num_rows[rank] = call.call.layout == kRows ? num_records : offset;
  }
}

// Fresh dispatch: fills the handle's tables and turns counts of blocks into first rows of blocks.
__device__ void fill_tables(const Mesh& mesh, const ExchangeCall& call, uint64_t epoch,
                            uint32_t* first_row) {
  place_experts(mesh, call, epoch, first_row);
  __syncthreads();
  const int columns = mesh.num_experts + mesh.num_ranks;
  for (int c = int(threadIdx.x); c < columns; c += int(blockDim.x)) {
    const uint32_t first = c < mesh.num_experts ? first_row[c] : 0;
    sum_blocks(mesh, call, c, first,
               [&](uint32_t block, uint32_t sum) { call.block_base[block * columns + c] = sum; });
  }
}

__device__ uint64_t align_heap(uint64_t bytes) { return align_up(bytes, kHeapAlignment); }

__device__ Landing dispatch_landing(const Mesh& mesh, const ExchangeCall& call, uint64_t num_rows,
                                    uint64_t num_records) {
  Landing landing;
  const bool is_fresh = call.call.kind == kDispatch;
  const bool is_rows = call.call.layout == kRows;
  const uint64_t slots = num_records * uint64_t(mesh.num_topk);
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

// One warp, a lane per peer: what the exchanged rows mean for the data kernel. Returns the verdict.
__device__ Verdict make_plan(const Mesh& mesh, const ExchangeCall& call, uint64_t epoch) {
  const int peer = lane_id(), me = mesh.rank, ranks = mesh.num_ranks;
  Plan& plan = mesh.workspace->plan;
  const bool is_dispatch = call.call.kind == kDispatch || call.call.kind == kCachedDispatch;
  const uint32_t* counts = call.tables.rank_counts;
  uint64_t needed = 0;
  bool is_ok = true, has_room = true;
  if (peer < ranks) {
    const ExchangeHeader& header = *row_header(exchange_row(mesh, me, epoch, peer));
    const ExchangeHeader& first = *row_header(exchange_row(mesh, me, epoch, 0));
    const uint32_t* words = reinterpret_cast<const uint32_t*>(&header.call);
    for (int i = 0; i < int(sizeof(CallWords) / 4); ++i)
      is_ok &= words[i] == reinterpret_cast<const uint32_t*>(&first.call)[i];
    is_ok &= header.status == kOk;
  }
  is_ok = __all_sync(0xffffffffu, is_ok);
  if (is_ok && peer < ranks && call.call.kind != kBarrier) {
    const ExchangeHeader& header = *row_header(exchange_row(mesh, me, epoch, peer));
    uint8_t* grant = mesh.base[peer] + header.grant_offset;
    PeerPlan own{};
    uint64_t from = 0, partial_out = 0, partial_in = 0;
#pragma unroll 4
    for (int r = 0; r < ranks; ++r) {
      if (r < me) own.record_base += counts[r * ranks + peer];
      if (r < peer) own.first_from += counts[r * ranks + me];
      if (r < me) partial_out += align_heap(counts[peer * ranks + r] * call.slot_bytes);
      if (r < peer) partial_in += align_heap(counts[me * ranks + r] * call.slot_bytes);
      from += counts[r * ranks + peer];
    }
    own.num_from = counts[peer * ranks + me];
    if (is_dispatch) {
      const Landing landing = dispatch_landing(mesh, call, call.tables.num_rows[peer], from);
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
    } else {
      for (int w = 0; w < ranks; ++w)
        needed += align_heap(counts[peer * ranks + w] * call.slot_bytes);
      own.partial_out = grant + partial_out;
      own.partial_in = mesh.base[me] + call.grant_offset + partial_in;
    }
    plan.peer[peer] = own;
    has_room = needed <= header.grant_bytes;
    call.result->needed[peer] = needed;
  }
  has_room = __all_sync(0xffffffffu, has_room);
  return !is_ok ? kRefused : !has_room ? kNoRoom : kGo;
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
  if (threadIdx.x == 0) {
    workspace.plan.go = verdict == kGo;
    workspace.plan.epoch = uint32_t(epoch);
    workspace.next_push = workspace.next_expand = workspace.next_reduce = workspace.next_final = 0;
    workspace.epoch = epoch;
    call.result->verdict = verdict;
    fence_system();
    commlib::store_release(&call.result->epoch, epoch);  // partner: the host's poll
  }
}

}  // namespace commlib::cuda
