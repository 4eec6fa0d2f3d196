// Proxies without executors: one over the fake transport, or a pair over the loopback provider.
#pragma once

#include <sched.h>

#include <memory>
#include <vector>

#include "cpu/ring_ends.hpp"
#include "memory/mesh.hpp"
#include "proxy/proxy.hpp"
#include "tests/fake_transport.hpp"
#include "tests/wait_until.hpp"
#include "transport/providers.hpp"

namespace commlib::testing {

// Memory, fault board and proxy of one rank; what an Engine has without its executor.
class ProxyEnd {
 public:
  ProxyEnd(int rank, std::vector<int> node_of_rank, size_t ring_bytes, int num_writers = 1,
           int num_threads = 1)
      : mesh_(group_of(rank, std::move(node_of_rank)), MemoryConfig{256, ring_bytes}, 4096,
              1 << 20),
        proxy_(mesh_, board_, num_writers, num_threads),
        writer_(proxy_.writer(0)),
        totals_(mesh_.group()) {}

  void set_transport(std::unique_ptr<Transport> transport, double heartbeat_timeout_s = 60) {
    std::vector<std::unique_ptr<Transport>> transports;
    transports.push_back(std::move(transport));
    set_transports(std::move(transports), heartbeat_timeout_s);
  }
  // One for each thread.
  void set_transports(std::vector<std::unique_ptr<Transport>> transports,
                      double heartbeat_timeout_s = 60) {
    proxy_.set_transports(std::move(transports), heartbeat_timeout_s);
    proxy_.set_channels(ChannelTable(mesh_.group(), [this](int peer) -> const RegisteredRegion& {
      return mesh_.registered_of(peer);
    }));
  }
  FakeTransport& use_fake(double heartbeat_timeout_s = 60) {
    auto transport = std::make_unique<FakeTransport>(proxy_.listener());
    FakeTransport& fake = *transport;
    fake.register_region(mesh_.memory().base(), mesh_.memory().bytes());
    set_transport(std::move(transport), heartbeat_timeout_s);
    return fake;
  }

  Mesh& mesh() { return mesh_; }
  FaultBoard& board() { return board_; }
  Proxy& proxy() { return proxy_; }
  CommandWriter& writer() { return writer_; }
  RingTotals& totals() { return totals_; }

  // A word of the registered region that a peer writes.
  uint64_t* word(size_t base, int index) {
    return mesh_.registered_word(RegisteredRegion::line(base, index));
  }
  // Ends of the dispatch rings, as the roles place them.
  SendRing::Place send_place(int node) {
    const Group& group = mesh_.group();
    const size_t local = mesh_.registered().dispatch_send_ring_of(node);
    return {mesh_.ring(local),
            local,
            mesh_.registered_of(group.rail(group.rank(), node)).dispatch_recv_ring_of(group.rank()),
            word(mesh_.registered().dispatch_credit_in, node),
            proxy_.channels().to_node(ChannelPurpose::kDispatchData, node),
            &totals_.dispatch_sent[size_t(node)]};
  }
  RecvRing::Place recv_place(int source) {
    return {mesh_.ring(mesh_.registered().dispatch_recv_ring_of(source)),
            word(mesh_.registered().dispatch_count_in, source),
            proxy_.channels().to_source(ChannelPurpose::kDispatchCredit, source),
            &totals_.dispatch_received[size_t(source)]};
  }

 private:
  static Group group_of(int rank, std::vector<int> node_of_rank) {
    const int experts = int(node_of_rank.size());
    return Group(rank, std::move(node_of_rank), experts);
  }

  Mesh mesh_;
  FaultBoard board_;
  Proxy proxy_;
  CommandWriter writer_;
  RingTotals totals_;
};

// Ranks 0 and 1 on two nodes, connected and running.
class ProxyPair {
 public:
  explicit ProxyPair(size_t ring_bytes, LoopbackOptions options = {})
      : ends_{std::make_unique<ProxyEnd>(0, std::vector<int>{0, 1}, ring_bytes),
              std::make_unique<ProxyEnd>(1, std::vector<int>{0, 1}, ring_bytes)} {
    for (int rank : {0, 1}) {
      ProxyEnd& end = *ends_[rank];
      auto transport = make_loopback(end.proxy().listener(), rank, options);
      transport->register_region(end.mesh().memory().base(), end.mesh().memory().bytes());
      end.set_transport(std::move(transport));
    }
    for (int rank : {0, 1})
      ends_[rank]->proxy().transport()->connect(1 - rank,
                                                ends_[1 - rank]->proxy().transport()->address());
    for (auto& end : ends_) {
      end->proxy().start();
      end->proxy().set_busy(true);
    }
  }
  ProxyEnd& end(int rank) { return *ends_[rank]; }

 private:
  std::unique_ptr<ProxyEnd> ends_[2];
};

inline uint64_t slot_word(uint64_t seed, uint64_t slot, uint64_t word) {
  return (seed << 48) + (slot << 16) + word;
}

// One operation's worth of slots from rank 0 to rank 1. Both return early if `deadline` passes.
inline bool send_slots(ProxyEnd& end, const RingGeometry& geometry, uint64_t num_slots,
                       uint64_t seed, double deadline) {
  SendRing ring(geometry, num_slots, end.send_place(1), end.proxy(), end.writer());
  while (!ring.is_done()) {
    ring.flush();
    uint8_t* slot = ring.next_slot();
    if (slot == nullptr) {
      if (now_s() > deadline) return false;
      sched_yield();
      continue;
    }
    auto* words = reinterpret_cast<uint64_t*>(slot);
    for (uint64_t w = 0; w < geometry.slot_bytes / 8; ++w)
      words[w] = slot_word(seed, ring.written(), w);
    ring.commit();
  }
  return true;
}

// Number of wrong words, or ~0 after the deadline.
inline uint64_t receive_slots(ProxyEnd& end, const RingGeometry& geometry, uint64_t num_slots,
                              uint64_t seed, double deadline) {
  RecvRing ring(geometry, num_slots, end.recv_place(0), end.writer());
  uint64_t wrong = 0;
  uint64_t consumed = 0;
  while (consumed < num_slots || !ring.is_drained()) {
    const uint64_t available = ring.available();
    if (consumed == available) {
      if (now_s() > deadline) return ~0ull;
      sched_yield();
    }
    for (; consumed < available; ++consumed) {
      const auto* words = reinterpret_cast<const uint64_t*>(ring.slot(consumed));
      for (uint64_t w = 0; w < geometry.slot_bytes / 8; ++w)
        wrong += words[w] != slot_word(seed, consumed, w);
    }
    ring.release(consumed);
  }
  return wrong;
}

}  // namespace commlib::testing
