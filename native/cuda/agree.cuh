// One row to all ranks, one from each: what every operation starts with.
#pragma once

#include "channel/counter.hpp"
#include "cuda/count.cuh"

namespace commlib::cuda {

constexpr uint64_t kNoError = ~0ull;  // of Workspace::input_error

__device__ inline uint32_t* row_counts(uint8_t* row) {
  return reinterpret_cast<uint32_t*>(row + sizeof(ExchangeHeader));
}

__device__ inline ExchangeHeader* row_header(uint8_t* row) {
  return reinterpret_cast<ExchangeHeader*>(row);
}

__device__ inline void publish(const Mesh& mesh, const ExchangeCall& call, uint64_t epoch) {
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
    if (call.status == kRejected || call.call.kind == kGrow)
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

__device__ inline bool gather(const Mesh& mesh, uint64_t epoch) {
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

}  // namespace commlib::cuda
