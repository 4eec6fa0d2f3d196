#include "cpu/engine.hpp"

#include <unistd.h>

#include <algorithm>
#include <cstring>

namespace commlib {
namespace {

constexpr uint64_t kMagic = 0x31626c6d6d6f63ull;  // "commlb1"

// Head of the address blob; the transport's own address follows.
struct AddressHead {
  uint64_t magic = kMagic;
  uint64_t config_digest = 0;
  ArenaAddress arena;
  int32_t rank = -1;
  uint32_t transport_bytes = 0;
};

MemoryConfig memory_config(const EngineConfig& config, const Group& group) {
  return {exchange_row_bytes(group), config.ring_bytes};
}

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

// Commands name 32 bits of bytes and 32 bits of units inside the registered regions of both ends.
void check_addresses(const EngineConfig& config, const Group& group, const MemoryConfig& memory) {
  std::vector<int> ends = group.scale_out_peers(group.rank());
  if (ends.empty()) return;
  ends.push_back(group.rank());
  for (int rank : ends) {
    const size_t bytes = RegisteredRegion(group, rank, memory).total_bytes;
    if (bytes > kCommandUnit << 32)
      throw ConfigException("ring_bytes=" + std::to_string(config.ring_bytes) + " gives rank " +
                            std::to_string(rank) + " a registered region of " +
                            std::to_string(bytes) + " bytes, more than " +
                            std::to_string(kCommandUnit << 32));
  }
  const size_t chunk = std::max(config.chunk_bytes, largest_slot(config));
  if (chunk > 0xffffffffu)
    throw ConfigException("chunk_bytes=" + std::to_string(chunk) + " is 4 GiB or more");
}

}  // namespace

Engine::Engine(const EngineConfig& config) : config_(config), pid_(getpid()) {
  check_counts(config);
  check_ring(config);
  Group group(config.rank, config.node_of_rank, config.num_experts);
  const MemoryConfig memory = memory_config(config, group);
  check_addresses(config, group, memory);
  const bool has_scale_out = group.num_nodes() > 1;
  mesh_ =
      std::make_unique<Mesh>(std::move(group), memory, config.arena_bytes, config.max_arena_bytes);
  proxy_ = std::make_unique<Proxy>(*mesh_, board_, config.num_threads);
  std::unique_ptr<Transport> transport;
  if (has_scale_out) {
    TransportOptions options = config.transport_options;
    options.local_rank = mesh_->group().local_rank_of(config.rank);
    options.node = mesh_->group().node();
    transport = config.make_transport
                    ? config.make_transport(proxy_.get(), config.rank)
                    : make_transport(config.transport, proxy_.get(), config.rank, options);
    transport->register_region(mesh_->memory().base(), mesh_->memory().bytes());
  }
  proxy_->set_transport(std::move(transport), config.heartbeat_timeout_s);
  proxy_->set_channels(ChannelTable(mesh_->group(), [this](int peer) -> const RegisteredRegion& {
    return mesh_->registered_of(peer);
  }));
  ExecutorConfig executor;
  executor.hidden = config.hidden;
  executor.num_topk = config.num_topk;
  executor.num_threads = config.num_threads;
  executor.chunk_tokens = config.chunk_tokens;
  executor.chunk_bytes = config.chunk_bytes;
  executor.ring_bytes = config.ring_bytes;
  executor.max_in_flight = config.max_in_flight;
  executor.timeout_s = config.timeout_s;
  executor_ = std::make_unique<Executor>(*mesh_, *proxy_, board_, executor);
}

Engine::~Engine() {
  if (is_foreign()) {  // threads and connections are the parent's: leave everything as it is
    (void)executor_.release();
    (void)proxy_.release();
    (void)mesh_.release();
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

std::vector<uint8_t> Engine::address() const {
  AddressHead head;
  head.config_digest = config_.config_digest;
  head.arena = mesh_->arena()->address();
  head.rank = config_.rank;
  std::vector<uint8_t> transport;
  if (proxy_->transport() != nullptr) transport = proxy_->transport()->address();
  head.transport_bytes = uint32_t(transport.size());
  std::vector<uint8_t> blob(sizeof head);
  std::memcpy(blob.data(), &head, sizeof head);
  blob.insert(blob.end(), transport.begin(), transport.end());
  return blob;
}

void Engine::connect(const std::vector<std::vector<uint8_t>>& addresses) {
  const Group& group = mesh_->group();
  if (is_connected_) throw ConfigException("the engine is connected already");
  if (addresses.size() != size_t(group.num_ranks()))
    throw ConfigException(std::to_string(addresses.size()) + " addresses for " +
                          std::to_string(group.num_ranks()) + " ranks");
  std::vector<AddressHead> heads(addresses.size());
  for (size_t rank = 0; rank < addresses.size(); ++rank) {
    AddressHead& head = heads[rank];
    if (addresses[rank].size() < sizeof head)
      throw ConfigException("the address of rank " + std::to_string(rank) + " is too short");
    std::memcpy(&head, addresses[rank].data(), sizeof head);
    if (head.magic != kMagic || head.rank != int(rank) ||
        addresses[rank].size() != sizeof head + head.transport_bytes)
      throw ConfigException("the address of rank " + std::to_string(rank) +
                            " is not one of this version of commlib");
    if (head.config_digest != heads[0].config_digest)
      throw ConfigException(
          "rank " + std::to_string(rank) +
          " has another configuration than rank 0; hidden, num_experts, num_topk, "
          "ring and chunk sizes and the topology must agree");
  }
  for (int rank : group.peers())
    if (rank != group.rank()) mesh_->map_peer(rank, heads[size_t(rank)].arena);
  for (int rank : group.scale_out_peers(group.rank())) {
    const auto& blob = addresses[size_t(rank)];
    proxy_->transport()->connect(rank, {blob.begin() + sizeof(AddressHead), blob.end()});
  }
  if (proxy_->transport() != nullptr) transport_text_ = proxy_->transport()->describe();
  is_connected_ = true;
  proxy_->start();
  executor_->start();
}

Outcome Engine::status() const {
  Outcome outcome;
  outcome.kind = board_.raised() ? OutcomeKind::kFault : OutcomeKind::kDone;
  outcome.fault = board_.record();
  outcome.waited_phase = "no operation";
  return outcome;
}

Outcome Engine::close() {
  Outcome outcome;
  outcome.kind = OutcomeKind::kDone;
  if (is_closed_ || is_foreign()) return outcome;
  if (is_connected_ && !board_.raised()) {
    auto barrier = std::make_shared<Op>();
    barrier->kind = OpKind::kBarrier;
    executor_->submit_last(barrier);
    outcome = barrier->wait();
  }
  stop(is_connected_ && outcome.kind == OutcomeKind::kDone && !board_.raised());
  return outcome;
}

void Engine::stop(bool is_clean) {
  if (is_closed_ || is_foreign()) return;
  is_closed_ = true;
  Outcome outcome;
  outcome.kind = OutcomeKind::kRejected;
  outcome.message = "the Runtime was closed while operations were queued";
  if (!is_clean && is_connected_ && !board_.raised()) {
    // Unblock the executor: nobody will finish a running operation any more.
    FaultRecord fault;
    fault.kind = FaultKind::kPeerLost;
    fault.rank = config_.rank;
    fault.peer = config_.rank;
    fault.set_phase("close");
    fault.set_detail("closed without a barrier");
    board_.raise(fault);
  }
  executor_->stop(outcome);
  proxy_->stop(is_clean, 2.0);
  mesh_->unmap_peers();
}

std::string Engine::describe_transport() const {
  return transport_text_.empty() ? "none (one node)" : transport_text_;
}

MemoryReport Engine::memory() const {
  return {mesh_->group().num_nodes() > 1 ? mesh_->memory().bytes() : 0,
          mesh_->arena()->committed_bytes(), mesh_->arena()->heap().used_bytes()};
}

}  // namespace commlib
