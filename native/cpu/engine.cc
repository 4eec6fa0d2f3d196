#include "cpu/engine.hpp"

#include <unistd.h>

#include <algorithm>

namespace commlib {
namespace {

void check_counts(const EngineConfig& config) {
  if (config.num_topk < 1 || config.num_topk > kMaxTopk)
    throw ConfigException("num_topk=" + std::to_string(config.num_topk) + " is not in 1.." +
                          std::to_string(kMaxTopk));
  if (config.num_threads < 1)
    throw ConfigException("num_threads=" + std::to_string(config.num_threads) + " is below 1");
}

// The most that a call can ask for: an FP32 row with scales and record.
size_t largest_slot(const EngineConfig& config) {
  return make_slot(config.hidden * 4, config.hidden / kScaleBlock * 4,
                   record_bytes(config.num_topk))
      .slot_bytes;
}

// A ring holds two of the largest slots.
void check_ring(const EngineConfig& config) {
  const size_t slot = largest_slot(config);
  const size_t chunk = std::max(config.chunk_bytes, slot);
  if (config.ring_bytes < 2 * chunk)
    throw ConfigException("ring_bytes=" + std::to_string(config.ring_bytes) +
                          " is less than two chunks of " + std::to_string(chunk) +
                          " bytes (chunk_bytes=" + std::to_string(config.chunk_bytes) +
                          ", largest slot " + std::to_string(slot) + ")");
}

FabricConfig fabric_config(const EngineConfig& config) {
  const Group group(config.rank, config.node_of_rank, config.num_experts);
  FabricConfig out;
  out.rank = config.rank;
  out.node_of_rank = config.node_of_rank;
  out.num_experts = config.num_experts;
  out.num_writers = config.num_threads;
  out.num_proxy_threads = config.num_proxy_threads;
  out.exchange_row_bytes = exchange_row_bytes(group);
  out.ring_bytes = config.ring_bytes;
  out.largest_put = std::max(config.chunk_bytes, largest_slot(config));
  out.arena_bytes = config.arena_bytes;
  out.max_arena_bytes = config.max_arena_bytes;
  out.heartbeat_timeout_s = config.heartbeat_timeout_s;
  out.config_digest = config.config_digest;
  out.transport = config.transport;
  out.transport_options = config.transport_options;
  out.rings = config.rings;
  out.make_transport = config.make_transport;
  return out;
}

}  // namespace

Engine::Engine(const EngineConfig& config) : config_(config), pid_(getpid()) {
  check_counts(config);
  check_ring(config);
  fabric_ = std::make_unique<Fabric>(fabric_config(config));
  ExecutorConfig executor;
  executor.hidden = config.hidden;
  executor.num_topk = config.num_topk;
  executor.num_threads = config.num_threads;
  executor.chunk_tokens = config.chunk_tokens;
  executor.chunk_bytes = config.chunk_bytes;
  executor.ring_bytes = config.ring_bytes;
  executor.max_in_flight = config.max_in_flight;
  executor.timeout_s = config.timeout_s;
  executor_ =
      std::make_unique<Executor>(fabric_->mesh(), fabric_->proxy(), fabric_->board(), executor);
}

Engine::~Engine() {
  if (is_foreign()) {  // threads and connections are the parent's: leave everything as it is
    (void)executor_.release();
    (void)fabric_.release();
    return;
  }
  stop(false);
}

bool Engine::is_foreign() const { return getpid() != pid_; }

void Engine::submit(std::shared_ptr<Op> op) {
  if (is_foreign())
    throw ConfigException("this Runtime belongs to process " + std::to_string(pid_) +
                          ", which forked this one; build another");
  executor_->submit(std::move(op));
}

void Engine::connect(const std::vector<std::vector<uint8_t>>& addresses) {
  fabric_->connect(addresses);
  fabric_->start();
  executor_->start();
}

Outcome Engine::status() const {
  Outcome outcome;
  outcome.kind = has_fault() ? OutcomeKind::kFault : OutcomeKind::kDone;
  outcome.fault = fault();
  outcome.waited_phase = "no operation";
  return outcome;
}

Outcome Engine::close() {
  Outcome outcome;
  outcome.kind = OutcomeKind::kDone;
  if (is_closed_ || is_foreign()) return outcome;
  if (fabric_->is_connected() && !has_fault()) {
    auto barrier = std::make_shared<Op>();
    barrier->kind = OpKind::kBarrier;
    executor_->submit_last(barrier);
    outcome = barrier->wait();
  }
  stop(fabric_->is_connected() && outcome.kind == OutcomeKind::kDone && !has_fault());
  return outcome;
}

void Engine::stop(bool is_clean) {
  if (is_closed_ || is_foreign()) return;
  is_closed_ = true;
  Outcome outcome;
  outcome.kind = OutcomeKind::kRejected;
  outcome.message = "the Runtime was closed while operations were queued";
  // Unblock the executor: nobody will finish a running operation any more.
  if (!is_clean && fabric_->is_connected()) fabric_->raise_left();
  executor_->stop(outcome);
  fabric_->stop(is_clean);
}

MemoryReport Engine::memory() const {
  const Mesh& mesh = fabric_->mesh();
  return {mesh.group().num_nodes() > 1 ? mesh.registered().total_bytes : 0,
          mesh.arena()->committed_bytes(), mesh.arena()->heap().used_bytes()};
}

}  // namespace commlib
