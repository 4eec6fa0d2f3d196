// What every executor stands on: memory, fault board, proxy and transport of one rank. The CPU
// executor is an Engine around it; a GPU executor uses it by itself.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "channel/device_fabric.hpp"
#include "proxy/proxy.hpp"

namespace commlib {

struct FabricConfig {
  int rank = 0;
  std::vector<int> node_of_rank;
  int num_experts = 0;
  int num_writers = 1;  // threads or blocks that give commands
  int num_proxy_threads = 1;
  std::vector<int> proxy_cpus;  // on which these may run; empty: anywhere
  size_t exchange_row_bytes = 0;
  size_t ring_bytes = 1 << 20;
  size_t largest_put = 64 << 10;  // a chunk, or a row if that is larger
  size_t arena_bytes = 4096;
  size_t max_arena_bytes = 4096;
  double heartbeat_timeout_s = 10;
  uint64_t config_digest = 0;  // ranks that disagree are told so in connect()
  std::string transport = "ucx";
  TransportOptions transport_options;  // what depends on the rest is filled in here
  // Memory of the rings, ring_memory_bytes of RegisteredRegion, under the condition of
  // Transport::register_device_region; nullptr: host memory of the fabric's own.
  DeviceRegion rings;
  ThreadSetup thread_setup;
  uint64_t* stop_word = nullptr;  // of FaultBoard; must outlive the Fabric
  // Test hook: makes the transport of each proxy thread in place of the provider named above.
  std::function<std::unique_ptr<Transport>(PutListener*, int rank)> make_transport;
};

// Where a device sees the host memory of a Fabric.
struct FabricView {
  uint64_t memory = 0;
  uint64_t fifos = 0;
  uint64_t completions = 0;
};

class Fabric {
 public:
  explicit Fabric(const FabricConfig& config);
  ~Fabric();

  // Opaque; every rank gives it to every rank.
  std::vector<uint8_t> address() const;
  // Maps the peers and connects the transport. Once; then start() the proxy.
  void connect(const std::vector<std::vector<uint8_t>>& addresses);
  bool is_connected() const { return is_connected_; }
  void start() { proxy_->start(); }
  // For kernels: proxy threads never sleep. If rings are device memory, whole rings go to and fro
  // first, since a provider may map a peer's memory at the first put, which must not wait for a
  // kernel that waits for the put; then no command may come before all ranks are ready.
  void start_for_device();
  // Whether this rank is: polls for at most timeout_s, or until there is a fault.
  bool wait_ready(double timeout_s) const;
  // Stops the proxy and unmaps the peers. Not clean: peers learn that this rank has gone. Nothing
  // may push commands any more. Idempotent; nothing in a forked child, where there is no thread.
  void stop(bool is_clean);

  Mesh& mesh() { return *mesh_; }
  const Mesh& mesh() const { return *mesh_; }
  Proxy& proxy() { return *proxy_; }
  const Proxy& proxy() const { return *proxy_; }
  FaultBoard& board() { return board_; }
  const FaultBoard& board() const { return board_; }
  // Has all peers told, unless they know of another fault: that this rank leaves without them, that
  // the process of `peer` has ended.
  void raise_left();
  void raise_lost(int peer);
  // The fault, if there is one. Kernels may have ended for one that the proxy still looks into:
  // waits for what it finds.
  std::optional<FaultRecord> fault();
  std::string describe_transport() const;
  // Of the peers' whose rings are reached worst; kDirect where there are no other nodes.
  DeviceReach ring_reach() const;

  // For kernels; throws ConfigException if there are more ranks than they serve.
  DeviceFabric device_view(const FabricView& view, size_t chunk_bytes) const;

 private:
  bool has_transports() const;
  bool has_device_rings() const { return config_.rings.base != nullptr; }
  std::string describe_threads() const;
  bool is_foreign() const;  // this process is a fork of the one that built it

  FabricConfig config_;
  int64_t pid_;
  FaultBoard board_;
  std::unique_ptr<Mesh> mesh_;
  std::unique_ptr<Proxy> proxy_;
  std::string transport_text_;
  bool is_connected_ = false;
  bool is_stopped_ = false;
};

}  // namespace commlib
