// The region tables: what lies where in a rank's arena head (written by node peers) and in its
// registered region (written by scale-out peers). One list each; offsets follow from it, and the
// same functions give a peer's offsets.
#pragma once

#include <vector>

#include "common/fault.hpp"
#include "common/group.hpp"

namespace commlib {

struct MemoryConfig {
  size_t exchange_row_bytes = 0;
  size_t ring_bytes = 0;
};

// Arena head. Indices are ranks of the whole group.
struct ControlRegion {
  size_t heartbeat = 0;
  size_t fault_count = 0;  // [rank] line: number of records that rank has written here (0 or 1)
  size_t fault_record = 0;
  size_t exchange_epoch = 0;    // [rank] line: newest epoch whose row lies here
  size_t exchange_row = 0;      // [generation][rank]
  size_t dispatch_arrived = 0;  // [source] line: ticket
  size_t combine_arrived = 0;   // [source][local rank of writer] line: ticket
  size_t total_bytes = 0;

  ControlRegion(const Group& group, const MemoryConfig& config)
      : num_ranks_(static_cast<size_t>(group.num_ranks())),
        max_local_(static_cast<size_t>(group.max_local_ranks())),
        row_bytes_(config.exchange_row_bytes) {
    size_t offset = 0;
    const auto take = [&offset](size_t bytes) {
      const size_t at = offset;
      offset = align_up(offset + bytes, kLine);
      return at;
    };
    heartbeat = take(kLine);
    fault_count = take(num_ranks_ * kLine);
    fault_record = take(num_ranks_ * sizeof(FaultRecord));
    exchange_epoch = take(num_ranks_ * kLine);
    exchange_row = take(2 * num_ranks_ * row_bytes_);
    dispatch_arrived = take(num_ranks_ * kLine);
    combine_arrived = take(num_ranks_ * max_local_ * kLine);
    total_bytes = align_up(offset, 4096);
  }

  size_t fault_count_of(int rank) const { return fault_count + kLine * size_t(rank); }
  size_t fault_record_of(int rank) const {
    return fault_record + sizeof(FaultRecord) * size_t(rank);
  }
  size_t exchange_epoch_of(int rank) const { return exchange_epoch + kLine * size_t(rank); }
  size_t exchange_row_of(uint64_t epoch, int rank) const {
    return exchange_row + ((epoch & 1) * num_ranks_ + size_t(rank)) * row_bytes_;
  }
  size_t dispatch_arrived_of(int source) const { return dispatch_arrived + kLine * size_t(source); }
  size_t combine_arrived_of(int source, int writer_local) const {
    return combine_arrived + kLine * (size_t(source) * max_local_ + size_t(writer_local));
  }

 private:
  size_t num_ranks_;
  size_t max_local_;
  size_t row_bytes_;
};

// Registered region of one rank. Indices: rank = any rank, node = any node (unused entries cost a
// line each and keep the table simple); rings exist only for real partners. What lies from
// control_bytes on may be device memory.
struct RegisteredRegion {
  size_t heartbeat_in = 0;     // [rank]
  size_t heartbeat_out = 0;    // source words of our own puts
  size_t fault_count_in = 0;   // [rank]
  size_t fault_record_in = 0;  // [rank]
  size_t fault_record_out = 0;
  size_t exchange_count_in = 0;   // [source] rows that arrived
  size_t exchange_row_in = 0;     // [generation][source]
  size_t exchange_row_out = 0;    // [generation]
  size_t dispatch_count_in = 0;   // [source] chunks that arrived
  size_t dispatch_credit_in = 0;  // [node] chunks that the rail there has drained
  size_t combine_count_in = 0;    // [node] chunks that arrived from the rail there
  size_t combine_credit_in = 0;   // [source] chunks that the source has drained
  size_t first_put_in = 0;        // [rank] 1 once its first put has come, see ProxyThread
  size_t control_bytes = 0;       // of all above
  size_t dispatch_recv_ring = 0;  // [in_source index]
  size_t dispatch_send_ring = 0;  // [remote node index]
  size_t combine_recv_ring = 0;   // [remote node index]
  size_t combine_send_ring = 0;   // [in_source index]
  size_t total_bytes = 0;
  size_t ring_bytes = 0;

  RegisteredRegion(const Group& group, int rank, const MemoryConfig& config)
      : ring_bytes(align_up(config.ring_bytes, kLine)),  // commands address rings in units
        num_ranks_(static_cast<size_t>(group.num_ranks())),
        row_bytes_(config.exchange_row_bytes),
        in_sources_(group.in_sources(rank)),
        remote_nodes_(group.remote_nodes(rank)) {
    const size_t nodes = static_cast<size_t>(group.num_nodes());
    size_t offset = 0;
    const auto take = [&offset](size_t bytes) {
      const size_t at = offset;
      offset = align_up(offset + bytes, kLine);
      return at;
    };
    heartbeat_in = take(num_ranks_ * kLine);
    heartbeat_out = take(kLine);
    fault_count_in = take(num_ranks_ * kLine);
    fault_record_in = take(num_ranks_ * sizeof(FaultRecord));
    fault_record_out = take(sizeof(FaultRecord));
    exchange_count_in = take(num_ranks_ * kLine);
    exchange_row_in = take(2 * num_ranks_ * row_bytes_);
    exchange_row_out = take(2 * row_bytes_);
    dispatch_count_in = take(num_ranks_ * kLine);
    dispatch_credit_in = take(nodes * kLine);
    combine_count_in = take(nodes * kLine);
    combine_credit_in = take(num_ranks_ * kLine);
    first_put_in = take(num_ranks_ * kLine);
    offset = control_bytes = align_up(offset, 4096);
    dispatch_recv_ring = take(in_sources_.size() * ring_bytes);
    dispatch_send_ring = take(remote_nodes_.size() * ring_bytes);
    combine_recv_ring = take(remote_nodes_.size() * ring_bytes);
    combine_send_ring = take(in_sources_.size() * ring_bytes);
    total_bytes = align_up(offset, 4096);
  }

  // From control_bytes on.
  size_t ring_memory_bytes() const { return total_bytes - control_bytes; }
  static size_t line(size_t base, int index) { return base + kLine * size_t(index); }
  size_t fault_record_in_of(int rank) const {
    return fault_record_in + sizeof(FaultRecord) * size_t(rank);
  }
  size_t exchange_row_in_of(uint64_t epoch, int source) const {
    return exchange_row_in + ((epoch & 1) * num_ranks_ + size_t(source)) * row_bytes_;
  }
  size_t exchange_row_out_of(uint64_t epoch) const {
    return exchange_row_out + (epoch & 1) * row_bytes_;
  }
  size_t dispatch_recv_ring_of(int source) const {
    return dispatch_recv_ring + ring_bytes * index_of(in_sources_, source);
  }
  size_t dispatch_send_ring_of(int node) const {
    return dispatch_send_ring + ring_bytes * index_of(remote_nodes_, node);
  }
  size_t combine_recv_ring_of(int node) const {
    return combine_recv_ring + ring_bytes * index_of(remote_nodes_, node);
  }
  size_t combine_send_ring_of(int source) const {
    return combine_send_ring + ring_bytes * index_of(in_sources_, source);
  }

 private:
  static size_t index_of(const std::vector<int>& list, int value) {
    return static_cast<size_t>(std::find(list.begin(), list.end(), value) - list.begin());
  }

  size_t num_ranks_;
  size_t row_bytes_;
  std::vector<int> in_sources_;
  std::vector<int> remote_nodes_;
};

}  // namespace commlib
