// The proxy threads of a rank. Each has a transport and some of the other nodes: a channel's
// commands all pass through one thread, in order. Every writer has a FIFO to each of them.
#pragma once

#include <algorithm>
#include <memory>
#include <optional>
#include <vector>

#include "channel/device_fabric.hpp"
#include "proxy/channel_table.hpp"
#include "proxy/command_writer.hpp"
#include "proxy/proxy_thread.hpp"

namespace commlib {

constexpr int kMaxProxyThreads = kMaxFabricThreads;

// Memory of all FIFOs of a rank in one piece, so that a GPU can map it: [writer][thread].
class FifoBank {
 public:
  static constexpr uint64_t kCapacity = 1024;
  static constexpr size_t kTail = kCapacity * sizeof(Command);  // offset in a FIFO's part
  static constexpr size_t kStride = kTail + kLine;

  explicit FifoBank(int count) : memory_(align_up(size_t(count) * kStride, 4096)) {}
  FifoMemory fifo(int index) const {
    uint8_t* base = memory_.base() + size_t(index) * kStride;
    return {reinterpret_cast<Command*>(base), reinterpret_cast<uint64_t*>(base + kTail), kCapacity};
  }
  const RegisteredMemory& memory() const { return memory_; }

 private:
  RegisteredMemory memory_;
};

// Which thread serves the connection of two nodes, the same whichever of them asks. As in a
// tournament in which everybody meets everybody, a node meets another one in each round (with an
// odd number of nodes it sits one out), and threads take the rounds in turn.
inline int proxy_thread_of(int node, int peer_node, int num_nodes, int num_threads) {
  const int rounds = num_nodes - 1 + num_nodes % 2;
  const int low = std::min(node, peer_node), high = std::max(node, peer_node);
  return (high == rounds ? 2 * low : low + high) % rounds % num_threads;
}

class Proxy {
 public:
  // A writer is an executor thread or a block of a kernel. More threads than other nodes are of no
  // use and not made.
  Proxy(Mesh& mesh, FaultBoard& board, int num_writers, int num_threads = 1);
  ~Proxy() { stop(false, 0); }

  int num_threads() const { return int(threads_.size()); }
  // Who hears of the puts of a thread's transport.
  PutListener* listener(int thread = 0) { return threads_[size_t(thread)].get(); }
  // [thread]; once, before start(). nullptr: one node.
  void set_transports(std::vector<std::unique_ptr<Transport>> transports,
                      double heartbeat_timeout_s);
  void set_channels(ChannelTable table);
  void set_cpus(const std::vector<int>& cpus);
  void set_thread_setup(const ThreadSetup& setup);
  // Before start(): see ProxyThread.
  void set_first_puts();
  bool is_ready() const;  // all threads are
  const ChannelTable& channels() const { return *table_; }
  int thread_of(int peer) const {
    const Group& group = mesh_.group();
    return proxy_thread_of(group.node(), group.node_of(peer), group.num_nodes(), num_threads());
  }
  // [channel]
  const std::vector<uint8_t>& thread_of_channel() const { return thread_of_channel_; }
  void start();
  // Drains the FIFOs, says good-bye if `is_clean`, shuts the transports down, joins. Idempotent.
  void stop(bool is_clean, double timeout_s);

  CommandWriter writer(int index);
  const RegisteredMemory& fifo_memory() const { return fifos_.memory(); }
  // [channel] line: what completed() returns.
  const RegisteredMemory& completions() const { return *completions_; }
  // Commands of the channel whose local bytes may be reused: all those numbered below this.
  uint64_t completed(uint32_t channel) const {
    return load_acquire(channels_[channel]->completed);  // partner: on_put_complete
  }
  // Operations under way: while there are any the threads yield, else they sleep between ticks.
  void set_busy(bool is_busy);
  // Before start(): never sleeps. For commands that come from a GPU, which wakes nobody.
  void set_eager();
  // Test hook: the threads stand still, as in a stopped process: no puts, no progress, no beat.
  void set_frozen(bool is_frozen);
  ProxyCounters counters() const;  // of all threads
  Transport* transport(int thread = 0) const { return threads_[size_t(thread)]->transport(); }

 private:
  Mesh& mesh_;
  FifoBank fifos_;
  std::unique_ptr<RegisteredMemory> completions_;
  std::vector<std::unique_ptr<ProxyChannel>> channels_;
  std::vector<uint8_t> thread_of_channel_;
  std::optional<ChannelTable> table_;
  FaultStage fault_stage_;
  std::vector<std::unique_ptr<ProxyThread>> threads_;
};

}  // namespace commlib
