// The exchange between nodes: tokens per node are counted, the own row goes to every other node's
// rail as a put, and rows that came for this rank's node are handed to its ranks.
#pragma once

#include "channel/counter.hpp"
#include "cuda/count.cuh"

namespace commlib::cuda {

__device__ inline uint32_t* row_counts(uint8_t* row) {
  return reinterpret_cast<uint32_t*>(row + sizeof(ExchangeHeader));
}

template <typename T>
__device__ inline T* registered(const Mesh& mesh, uint64_t offset) {
  return reinterpret_cast<T*>(mesh.fabric->memory + offset);
}

// Rings may lie in other memory than the words and rows before them.
__device__ inline uint8_t* ring_at(const Mesh& mesh, uint64_t offset) {
  return mesh.fabric->rings + (offset - mesh.fabric->control_bytes);
}

// Puts of a channel whose local bytes may be reused. Partner: the proxy's on_put_complete.
__device__ inline uint64_t completed_puts(const Mesh& mesh, uint32_t channel) {
  return commlib::load_acquire(
      reinterpret_cast<const uint64_t*>(mesh.fabric->completions + kLine * channel));
}

// One thread. Waits while the FIFO is full. Of a writer's FIFOs that to the channel's proxy thread.
__device__ inline bool push_command(const Mesh& mesh, int writer, const Command& command) {
  DeviceFabric& fabric = *mesh.fabric;
  const int fifo = writer * fabric.num_proxy_threads + fabric.proxy_thread_of[channel_of(command)];
  uint8_t* base = fabric.fifos + uint64_t(fifo) * fabric.fifo_stride;
  FifoProducer producer{
      {reinterpret_cast<Command*>(base), reinterpret_cast<uint64_t*>(base + fabric.fifo_tail),
       fabric.fifo_capacity},
      fabric.state.fifo_head[fifo],
      fabric.state.fifo_cached_tail[fifo]};
  const WaitFor what{kScaleOut, mesh.rank, mesh.workspace->epoch, producer.head};
  const bool is_pushed = wait_until(mesh, what, [&](uint64_t* seen) {
    if (producer.push(command)) return true;
    *seen = producer.cached_tail;
    __nanosleep(200);
    return false;
  });
  fabric.state.fifo_head[fifo] = producer.head;
  fabric.state.fifo_cached_tail[fifo] = producer.cached_tail;
  return is_pushed;
}

// Role of every block: which nodes want each of its tokens, and how many tokens each node gets.
__device__ inline void count_nodes(const Mesh& mesh, const ExchangeCall& call) {
  DeviceFabric& fabric = *mesh.fabric;
  const uint32_t begin = blockIdx.x * call.tokens_per_block;
  const uint32_t end = min(begin + call.tokens_per_block, call.num_tokens);
  for (uint32_t first = begin; first < end; first += blockDim.x) {
    const uint32_t token = first + threadIdx.x;
    uint32_t mask = 0;
    for (int k = 0; k < mesh.num_topk && token < end; ++k) {
      const int64_t expert = call.topk_idx[uint64_t(token) * mesh.num_topk + k];
      if (expert >= 0 && expert < mesh.num_experts)
        mask |= 1u << fabric.node_of[int(expert) / mesh.experts_per_rank];
    }
    if (token < end) call.node_masks[token] = mask;
    for (int node = 0; node < fabric.num_nodes; ++node) {
      const uint32_t wanting = __ballot_sync(0xffffffffu, (mask >> node & 1) != 0);
      if (lane_id() == 0 && wanting != 0)
        atomicAdd(&fabric.state.node_totals[node], uint32_t(__popc(wanting)));
    }
  }
}

// Behind the counts of experts and ranks.
__device__ inline void publish_node_counts(const Mesh& mesh, const ExchangeCall& call,
                                           uint64_t epoch) {
  DeviceFabric& fabric = *mesh.fabric;
  const int node = int(threadIdx.x), columns = mesh.num_experts + mesh.num_ranks;
  if (node >= fabric.num_nodes) return;
  const uint32_t count = has_counts(call) ? fabric.state.node_totals[node] : 0;
  fabric.state.node_totals[node] = 0;
  for (int rank = 0; rank < mesh.num_ranks; ++rank)
    if (mesh.base[rank] != nullptr)
      row_counts(exchange_row(mesh, rank, epoch, mesh.rank))[columns + node] = count;
}

// The row in the own control region goes to the rails.
__device__ inline bool send_rows(const Mesh& mesh, uint64_t epoch) {
  DeviceFabric& fabric = *mesh.fabric;
  const int thread = int(threadIdx.x);
  bool is_free = true;
  if (thread < fabric.num_nodes && thread != fabric.node) {
    // The staging of two epochs ago is long consumed, but its put must have completed here, too.
    const uint32_t channel = fabric.exchange_channel[thread];
    is_free = wait_until(mesh, {kExchange, fabric.rail[mesh.rank][thread], epoch, epoch - 2},
                         [=](uint64_t* seen) {
                           *seen = completed_puts(mesh, channel);
                           return *seen + 2 >= epoch;
                         });
  }
  if (__syncthreads_and(is_free) == 0) return false;
  const uint64_t out = fabric.exchange_out[epoch & 1];
  const uint64_t* from =
      reinterpret_cast<const uint64_t*>(exchange_row(mesh, mesh.rank, epoch, mesh.rank));
  for (uint32_t i = threadIdx.x; i < mesh.exchange_row_bytes / 8; i += blockDim.x)
    registered<uint64_t>(mesh, out)[i] = from[i];
  fence_system();  // the row before the commands
  __syncthreads();
  bool is_sent = true;
  if (thread == 0)
    for (int node = 0; node < fabric.num_nodes && is_sent; ++node)
      if (node != fabric.node)
        is_sent = push_command(mesh, 0,
                               encode({CommandKind::kPut, fabric.exchange_channel[node], 1,
                                       uint32_t(mesh.exchange_row_bytes), out,
                                       fabric.exchange_remote[epoch & 1][node]}));
  return is_sent;
}

// Rows that came for this node, a warp each, to all its ranks.
__device__ inline bool relay_rows(const Mesh& mesh, uint64_t epoch) {
  DeviceFabric& fabric = *mesh.fabric;
  bool is_relayed = true;
  for (int i = warp_id(); i < fabric.num_in_sources && is_relayed; i += int(blockDim.x / 32)) {
    const int source = fabric.in_sources[i];
    const uint64_t* count = registered<uint64_t>(mesh, fabric.exchange_count[source]);
    // Rows come one per epoch, from epoch 1. Partner: the put_signal of the source's proxy.
    is_relayed =
        lane_id() != 0 || wait_until(mesh, {kExchange, source, epoch, epoch}, [=](uint64_t* seen) {
          *seen = commlib::load_acquire(count);
          if (*seen < epoch) __nanosleep(200);
          return *seen >= epoch;
        });
    is_relayed = __all_sync(0xffffffffu, is_relayed) != 0;
    if (!is_relayed) break;
    const uint64_t* from = registered<uint64_t>(mesh, fabric.exchange_in[epoch & 1][source]);
    for (uint32_t word = uint32_t(lane_id()); word < mesh.exchange_row_bytes / 8; word += 32) {
      const uint64_t value = commlib::load_relaxed(from + word);
      for (int rank = 0; rank < mesh.num_ranks; ++rank)
        if (mesh.base[rank] != nullptr)
          reinterpret_cast<uint64_t*>(exchange_row(mesh, rank, epoch, source))[word] = value;
    }
    fence_system();
    __syncwarp();
    if (lane_id() < mesh.num_ranks && mesh.base[lane_id()] != nullptr) {
      fence_system();
      // Partner: the load in gather() at that rank.
      commlib::store_release(
          at<uint64_t>(mesh, lane_id(), mesh.exchange_epoch + kLine * uint64_t(source)), epoch);
    }
  }
  return is_relayed;
}

__device__ inline void keep_node_counts(const Mesh& mesh, const ExchangeCall& call,
                                        uint64_t epoch) {
  const int nodes = mesh.fabric->num_nodes, columns = mesh.num_experts + mesh.num_ranks;
  if (call.status != kOk) return;  // it has no tables
  for (int i = int(threadIdx.x); i < mesh.num_ranks * nodes; i += int(blockDim.x)) {
    uint8_t* row = exchange_row(mesh, mesh.rank, epoch, i / nodes);
    call.tables.node_counts[i] = row_counts(row)[columns + i % nodes];
  }
}

}  // namespace commlib::cuda
