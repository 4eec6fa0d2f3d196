// Heartbeats and the spreading of fault records. Runs on the proxy thread, so a process that is
// stopped, dead or wedged stops beating; a rank that is merely slow does not.
#pragma once

#include <mutex>
#include <vector>

#include "memory/mesh.hpp"
#include "proxy/fault_board.hpp"
#include "transport/transport.hpp"

namespace commlib {

// The record that goes to other nodes lies once in the registered region, and several threads put
// it.
using FaultStage = std::once_flag;

// What one of a rank's proxy threads looks after.
struct MonitorShare {
  double heartbeat_timeout_s = 10;
  std::vector<int> remote_peers;
  bool has_node_peers = true;  // the ranks of the own node, and the own beat there
  FaultStage* fault_stage = nullptr;
};

class Monitor {
 public:
  Monitor(Mesh& mesh, Transport* transport, FaultBoard& board, const MonitorShare& share);

  // Call often; does its work at most once a period. Returns true if it did. Once a fault has been
  // told, only the ranks of the node still get our beats.
  bool tick(double now);
  // Takes over a fault that a peer has told of.
  void collect_faults();
  // Tells the peers that silence from now on is not a failure.
  void say_closed();
  // A peer that said so.
  bool is_closed(int peer) const;
  bool are_remote_peers_closed() const;
  double period_s() const { return period_s_; }

 private:
  struct Peer {
    int rank;
    bool is_local;
    uint64_t last_beat;
    double last_change;
  };

  uint64_t read_beat(const Peer& peer) const;
  void beat(uint64_t value);
  void check_beats(double now);
  void spread_fault();

  Mesh& mesh_;
  Transport* transport_;  // nullptr on one node
  FaultBoard& board_;
  double heartbeat_timeout_s_;
  bool has_node_peers_;
  FaultStage* fault_stage_;
  double period_s_;
  double next_tick_ = 0;
  double last_tick_ = 0;
  uint64_t beats_ = 0;
  bool spread_ = false;
  std::vector<Peer> peers_;
};

}  // namespace commlib
