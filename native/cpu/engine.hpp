// One Runtime's native side: memory, proxy, executor. What the bindings and the native tests see.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "cpu/executor.hpp"
#include "proxy/fabric.hpp"

namespace commlib {

struct EngineConfig {
  int rank = 0;
  std::vector<int> node_of_rank;
  size_t hidden = 0;
  int num_experts = 0;
  int num_topk = 0;
  int num_threads = 1;
  int num_proxy_threads = 1;
  int chunk_tokens = 32;
  size_t chunk_bytes = 64 << 10;
  size_t ring_bytes = 1 << 20;
  size_t arena_bytes = 64 << 20;
  size_t max_arena_bytes = size_t(64) << 30;
  int max_in_flight = 8;
  double timeout_s = 300;
  double heartbeat_timeout_s = 10;
  uint64_t config_digest = 0;  // ranks that disagree are told so in connect()
  std::string transport = "ucx";
  TransportOptions transport_options;  // see FabricConfig
  // Test hooks: the rings in other memory that the processor reaches; transports.
  DeviceRegion rings;
  std::function<std::unique_ptr<Transport>(PutListener*, int rank)> make_transport;
};

struct MemoryReport {
  size_t registered_bytes = 0;
  size_t arena_bytes = 0;
  size_t arena_used_bytes = 0;
};

class Engine {
 public:
  explicit Engine(const EngineConfig& config);
  ~Engine();

  // Opaque; every rank gives it to every rank.
  std::vector<uint8_t> address() const { return fabric_->address(); }
  // Maps the peers, connects the transport, starts the threads. Once. All ranks must have their
  // addresses until the slowest has connected (a barrier of the bootstrap follows).
  void connect(const std::vector<std::vector<uint8_t>>& addresses);

  // Waits for room in the queue. Throws ConfigException after close() and in a forked child.
  void submit(std::shared_ptr<Op> op);
  // Barrier among all ranks (skipped after a fault), then everything stops. Idempotent. The outcome
  // of the barrier.
  Outcome close();
  // Stops without a barrier: peers learn that this rank has gone. Idempotent; never waits for them.
  void abandon() { stop(false); }

  const Group& group() const { return fabric_->mesh().group(); }
  // What the next operation would meet, without waiting: kDone or kFault.
  Outcome status() const;
  bool has_fault() const { return fabric_->board().raised(); }
  FaultRecord fault() const { return fabric_->board().record(); }
  std::string describe_transport() const { return fabric_->describe_transport(); }
  ProxyCounters proxy_counters() const { return fabric_->proxy().counters(); }
  std::map<std::string, RoleCounters> role_counters() const { return executor_->counters(); }
  MemoryReport memory() const;
  Executor& executor() { return *executor_; }  // for the test hooks, as is proxy()
  Proxy& proxy() { return fabric_->proxy(); }

 private:
  void stop(bool is_clean);
  bool is_foreign() const;  // this process is a fork of the one that built the engine

  EngineConfig config_;
  int64_t pid_;
  std::unique_ptr<Fabric> fabric_;
  std::unique_ptr<Executor> executor_;
  bool is_closed_ = false;
};

}  // namespace commlib
