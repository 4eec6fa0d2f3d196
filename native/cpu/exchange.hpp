// P1: every rank publishes one row to all ranks; all reach the same verdict from the same rows.
#pragma once

#include <string>
#include <vector>

#include "cpu/handle.hpp"
#include "cpu/role.hpp"
#include "cpu/routing_plan.hpp"
#include "memory/mesh.hpp"
#include "proxy/proxy.hpp"

namespace commlib {

enum class RowStatus : uint32_t { kOk = 0, kRejected = 1, kCapacity = 2 };

struct ExchangeHeader {
  uint64_t epoch = 0;
  RowStatus status = RowStatus::kOk;
  uint32_t has_counts = 0;
  uint64_t config_hash = 0;  // of `text` when the status is kOk
  uint64_t grant_offset = 0;
  uint64_t grant_bytes = 0;
  uint64_t needed = 0;  // kCapacity
  char text[232] = {};  // what this rank calls (kOk) or why it refuses
};
static_assert(sizeof(ExchangeHeader) % 8 == 0);

// Header, then for a fresh dispatch uint32 counts per expert, rank and node.
inline size_t exchange_row_bytes(int num_ranks, int num_nodes, int num_experts) {
  const size_t counts = size_t(num_experts) + size_t(num_ranks) + size_t(num_nodes);
  return align_up(sizeof(ExchangeHeader) + counts * sizeof(uint32_t), kLine);
}
inline size_t exchange_row_bytes(const Group& group) {
  return exchange_row_bytes(group.num_ranks(), group.num_nodes(), group.num_experts());
}

struct ExchangeTable {
  std::vector<ExchangeHeader> headers;  // [rank]
  RoutingCounts counts;                 // if the rows carry counts
};

// One exchange: publish in the constructor's wake, then step() until done. Also the relay of what
// other nodes send to this rank.
class Exchange {
 public:
  Exchange(const Mesh& mesh, const Proxy& proxy, CommandWriter& writer, uint64_t epoch,
           const ExchangeHeader& header, const OwnCounts* counts);

  bool step();
  bool is_done() const {
    return is_published_ && num_relayed_ == in_sources_.size() && is_gathered_;
  }
  Wait waits_for() const;
  ExchangeTable table() const;

 private:
  bool publish();
  bool relay();
  bool gather();
  void deliver(int source, const uint8_t* row) const;

  const Mesh& mesh_;
  const Proxy& proxy_;
  CommandWriter& writer_;
  uint64_t epoch_;
  size_t row_bytes_;
  std::vector<uint8_t> row_;
  std::vector<int> in_sources_;
  std::vector<int> remote_nodes_;
  std::vector<bool> is_relayed_;
  size_t num_relayed_ = 0;
  size_t num_posted_ = 0;  // remote nodes whose command is in the FIFO
  bool is_delivered_ = false;
  bool is_published_ = false;
  bool is_gathered_ = false;
};

uint64_t hash_text(const char* text);

}  // namespace commlib
