// The executor: threads that run the operations of one Runtime, one after the other.
#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "cpu/combine_roles.hpp"
#include "cpu/dispatch_roles.hpp"
#include "cpu/exchange.hpp"
#include "cpu/op.hpp"

namespace commlib {

struct ExecutorConfig {
  size_t hidden = 0;
  int num_topk = 0;
  int num_threads = 1;
  int chunk_tokens = 32;
  size_t chunk_bytes = 0;
  size_t ring_bytes = 0;
  int max_in_flight = 8;
  double timeout_s = 300;
};

class Executor {
 public:
  Executor(Mesh& mesh, Proxy& proxy, FaultBoard& board, const ExecutorConfig& config);
  ~Executor();

  void start();
  // Ends the threads; queued operations finish with `outcome`. Idempotent.
  void stop(const Outcome& outcome);

  // Waits while max_in_flight operations are queued or running; their deadlines bound that. Throws
  // ConfigException once stopped.
  void submit(std::shared_ptr<Op> op);
  // The barrier of close(), behind whatever is queued; no limit applies.
  void submit_last(std::shared_ptr<Op> op);

  std::map<std::string, RoleCounters> counters() const;
  // Test hook: called with the role's name before each of its steps and with "exchange" before each
  // step of an exchange; returning false makes the step a stand-still.
  void set_step_filter(std::function<bool(const char*)> filter) { filter_ = std::move(filter); }

 private:
  // Roles of the running operation and the threads' way through them.
  struct Phase {
    std::vector<std::unique_ptr<Role>> roles;
    const char* op_name = "";
    std::atomic<int> num_running{0};  // threads that still have undone roles
    std::atomic<bool> is_aborted{false};
  };

  void coordinate();
  void help(int thread);
  Outcome run(Op& op);
  Outcome run_exchange(Op& op, ExchangeHeader header, const OwnCounts* counts,
                       ExchangeTable* table);
  Outcome run_dispatch(Op& op, OwnCounts own, const ExchangeTable& table, uint64_t epoch);
  Outcome run_combine(Op& op, const ExchangeTable& table, uint64_t epoch);
  Outcome run_roles(Op& op, std::vector<std::unique_ptr<Role>> roles, uint64_t epoch);
  void run_share(Phase& phase, int thread, uint64_t epoch);
  bool step_urgent(const std::vector<Role*>& mine);
  bool step_roles(Phase& phase, int thread, uint64_t epoch);
  void count(const Phase& phase, Op& op);

  Outcome negotiate(Op& op, OwnCounts* own, ExchangeTable* table, uint64_t* epoch);
  Outcome fault_outcome(const char* op_name, const char* role, const Wait& wait) const;
  void raise_failure(const char* name, const char* what);
  void raise_timeout(const char* op_name, const char* role, const Wait& wait, uint64_t epoch,
                     double waited_s);
  bool may_step(const char* name) const { return !filter_ || filter_(name); }

  Mesh& mesh_;
  Proxy& proxy_;
  FaultBoard& board_;
  ExecutorConfig config_;
  RingTotals totals_;
  std::vector<CommandWriter> writers_;
  uint64_t epoch_ = 0;
  std::shared_ptr<Slab> grant_;
  std::function<bool(const char*)> filter_;

  std::mutex mutex_;  // queue_, running_, stop_, phase_
  std::condition_variable wake_;
  std::condition_variable room_;  // an operation is over
  std::deque<std::shared_ptr<Op>> queue_;
  bool is_running_ = false;
  bool stop_ = false;
  Outcome stop_outcome_;
  Phase* phase_ = nullptr;
  uint64_t phase_number_ = 0;
  uint64_t phase_epoch_ = 0;
  std::vector<std::thread> threads_;

  mutable std::mutex counters_mutex_;
  std::map<std::string, RoleCounters> counters_;
};

}  // namespace commlib
