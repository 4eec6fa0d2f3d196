// One row to all ranks, one from each: what every operation starts with.
#pragma once

#include "channel/counter.hpp"
#include "cuda/tier_exchange.cuh"

namespace commlib::cuda {

constexpr uint64_t kNoError = ~0ull;  // of Workspace::input_error
constexpr int kHeaderWords = int(sizeof(ExchangeHeader) / 4);

// Shared memory of the block that settles an operation, in words; commlib/cuda/launch.py computes
// the total. It overlays what the block has counted in.
struct Ledger {
  uint32_t* before;       // [block][E + R] counts of the blocks below
  uint32_t* rows;         // [source][E + R] as exchanged
  uint32_t* headers;      // [source] ExchangeHeader
  uint32_t* first_row;    // [expert] of this rank's tokens, at the expert's rank
  uint32_t* rank_counts;  // [source][rank] distinct tokens
  uint32_t* num_rows;     // [rank]
  int columns;

  __device__ Ledger(const Mesh& mesh, const ExchangeCall& call, uint32_t* memory)
      : columns(mesh.num_experts + mesh.num_ranks) {
    const int ranks = mesh.num_ranks;
    headers = memory;  // first: aligned to 8 bytes
    before = headers + ranks * kHeaderWords;
    rows = before + call.count_blocks * columns;
    first_row = rows + ranks * columns;
    rank_counts = first_row + mesh.num_experts;
    num_rows = rank_counts + ranks * ranks;
  }
  __device__ const ExchangeHeader& header(int source) const {
    return reinterpret_cast<const ExchangeHeader*>(headers)[source];
  }
};

// Keeps the sums of the blocks below each block; returns the sum of all. Loads of many blocks are
// under way together.
__device__ inline uint32_t sum_blocks(const ExchangeCall& call, const Ledger& ledger, int column) {
  constexpr uint32_t kTogether = 12;
  uint32_t sum = 0;
  for (uint32_t first = 0; first < call.count_blocks; first += kTogether) {
    uint32_t counts[kTogether];
#pragma unroll
    for (uint32_t i = 0; i < kTogether; ++i) {
      const bool is_block = first + i < call.count_blocks;
      counts[i] = is_block ? call.block_base[(first + i) * ledger.columns + column] : 0;
    }
#pragma unroll
    for (uint32_t i = 0; i < kTogether; ++i) {
      if (first + i < call.count_blocks) ledger.before[(first + i) * ledger.columns + column] = sum;
      sum += counts[i];
    }
  }
  return sum;
}

__device__ inline void publish_header(const Mesh& mesh, const ExchangeCall& call, uint64_t epoch,
                                      int rank) {
  const uint64_t error = mesh.workspace->input_error;
  const uint32_t index = uint32_t(error >> 8);
  const bool is_bad = has_counts(call) && error != kNoError;
  uint8_t* row = exchange_row(mesh, rank, epoch, mesh.rank);
  ExchangeHeader* header = reinterpret_cast<ExchangeHeader*>(row);
  header->epoch = epoch;
  header->grant_offset = call.grant_offset;
  header->grant_bytes = call.grant_bytes;
  header->call = call.call;
  header->status = call.status != kOk ? call.status : is_bad ? uint32_t(error & 0xff) : kOk;
  header->bad_index = index;
  header->bad_value = 0;
  if (is_bad)
    header->bad_value = (error & 0xff) == kBadWeight
                            ? int64_t(__float_as_uint(call.topk_weights[index]))
                            : call.topk_idx[index];
  if (call.status == kRejected || call.call.kind == kGrow)
    for (int i = 0; i < kTextWords; ++i) header->text[i] = call.text[i];
}

// False: a wait was in vain.
__device__ inline bool publish(const Mesh& mesh, const ExchangeCall& call, const Ledger& ledger,
                               uint64_t epoch) {
  const bool is_peer = int(threadIdx.x) < mesh.num_ranks && mesh.base[threadIdx.x] != nullptr;
  if (is_peer) publish_header(mesh, call, epoch, int(threadIdx.x));
  for (int c = int(threadIdx.x); c < ledger.columns; c += int(blockDim.x)) {
    const uint32_t sum = has_counts(call) ? sum_blocks(call, ledger, c) : 0;
    for (int rank = 0; rank < mesh.num_ranks; ++rank)
      if (mesh.base[rank] != nullptr)
        row_counts(exchange_row(mesh, rank, epoch, mesh.rank))[c] = sum;
  }
  if (mesh.fabric != nullptr) publish_node_counts(mesh, call, epoch);
  __syncthreads();
  if (threadIdx.x == 0) mesh.workspace->input_error = kNoError;
  if (is_peer) {
    // Publishes what all threads of this block wrote. Partner: the load in gather() at that rank.
    fence_system();
    store_release(at<uint64_t>(mesh, int(threadIdx.x), mesh.exchange_epoch + kLine * mesh.rank),
                  epoch);
  }
  return mesh.fabric == nullptr || send_rows(mesh, epoch);
}

__device__ inline bool wait_row(const Mesh& mesh, int source, uint64_t epoch) {
  const uint64_t* word = at<uint64_t>(mesh, mesh.rank, mesh.exchange_epoch + kLine * source);
  return wait_until(mesh, {kExchange, source, epoch, epoch}, [=](uint64_t* seen) {
    *seen = load_acquire(word);  // partner: the store in publish() at the source, in relay_rows()
    return *seen >= epoch;
  });
}

// Waits for every rank's row and brings all of them to shared memory.
__device__ inline bool gather(const Mesh& mesh, const ExchangeCall& call, const Ledger& ledger,
                              uint64_t epoch) {
  const int source = int(threadIdx.x), ranks = mesh.num_ranks;
  const bool is_here = source < ranks && mesh.base[source] != nullptr;
  bool has_come = mesh.fabric == nullptr || relay_rows(mesh, epoch);
  if (has_come && is_here) has_come = wait_row(mesh, source, epoch);
  if (mesh.fabric != nullptr) {
    // Ranks of the own node first: one that stands still also holds back what it relays, and the
    // sources it relays for would be blamed in its place.
    has_come = __syncthreads_and(has_come) != 0;
    if (has_come && source < ranks && !is_here) has_come = wait_row(mesh, source, epoch);
  }
  if (__syncthreads_and(has_come) == 0) return false;
  for (int i = int(threadIdx.x); i < ranks * kHeaderWords; i += int(blockDim.x)) {
    const uint8_t* row = exchange_row(mesh, mesh.rank, epoch, i / kHeaderWords);
    ledger.headers[i] = reinterpret_cast<const uint32_t*>(row)[i % kHeaderWords];
  }
  const int columns = call.call.kind == kDispatch ? ledger.columns : 0;
  for (int i = int(threadIdx.x); i < ranks * columns; i += int(blockDim.x)) {
    uint8_t* row = exchange_row(mesh, mesh.rank, epoch, i / columns);
    ledger.rows[i] = row_counts(row)[i % columns];
  }
  if (mesh.fabric != nullptr && call.call.kind == kDispatch) keep_node_counts(mesh, call, epoch);
  // By handle the counts are those of the dispatch that made it.
  const bool is_by_handle = call.call.kind == kCachedDispatch || call.call.kind == kCombine;
  if (is_by_handle && call.status == kOk) {
    for (int i = int(threadIdx.x); i < ranks * ranks; i += int(blockDim.x))
      ledger.rank_counts[i] = call.tables.rank_counts[i];
    if (int(threadIdx.x) < ranks) ledger.num_rows[threadIdx.x] = call.tables.num_rows[threadIdx.x];
  }
  __syncthreads();
  return true;
}

}  // namespace commlib::cuda
