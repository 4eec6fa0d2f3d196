#include "proxy/fabric.hpp"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <thread>

#include "common/backoff.hpp"

namespace commlib {
namespace {

constexpr uint64_t kMagic = 0x31626c6d6d6f63ull;  // "commlb1"
constexpr double kGoodbyeS = 2.0;
// What a provider does before it comes back with a fault; it may wait for a caller's kernels.
constexpr double kVerdictS = 5.0;

// Head of the address blob; the addresses of the transports follow, one for each proxy thread.
struct AddressHead {
  uint64_t magic = kMagic;
  uint64_t config_digest = 0;
  ArenaAddress arena;
  int32_t rank = -1;
  int32_t num_transports = 0;
  uint32_t transport_bytes[kMaxProxyThreads] = {};
};

bool is_ours(const AddressHead& head, int rank, size_t bytes) {
  if (head.magic != kMagic || head.rank != rank) return false;
  if (head.num_transports < 0 || head.num_transports > kMaxProxyThreads) return false;
  size_t expected = sizeof head;
  for (int i = 0; i < head.num_transports; ++i) expected += head.transport_bytes[i];
  return bytes == expected;
}

std::vector<uint8_t> transport_address(const AddressHead& head, const std::vector<uint8_t>& blob,
                                       int thread) {
  size_t begin = sizeof head;
  for (int i = 0; i < thread; ++i) begin += head.transport_bytes[i];
  const auto from = blob.begin() + ptrdiff_t(begin);
  return {from, from + ptrdiff_t(head.transport_bytes[thread])};
}

// Commands name 32 bits of bytes and 32 bits of units inside the registered regions of both ends.
void check_addresses(const FabricConfig& config, const Group& group, const MemoryConfig& memory) {
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
  if (config.largest_put > 0xffffffffu)
    throw ConfigException("chunk_bytes=" + std::to_string(config.largest_put) +
                          " is 4 GiB or more");
}

void check_rings(const DeviceRegion& rings, const RegisteredRegion& registered) {
  if (rings.base != nullptr && rings.bytes != registered.ring_memory_bytes())
    throw ConfigException(std::to_string(rings.bytes) + " bytes for rings, which take " +
                          std::to_string(registered.ring_memory_bytes()));
}

}  // namespace

Fabric::Fabric(const FabricConfig& config) : config_(config), pid_(getpid()) {
  board_.set_stop_word(config.stop_word);
  Group group(config.rank, config.node_of_rank, config.num_experts);
  const MemoryConfig memory{config.exchange_row_bytes, config.ring_bytes};
  check_addresses(config, group, memory);
  check_rings(config.rings, RegisteredRegion(group, config.rank, memory));
  const bool has_scale_out = group.num_nodes() > 1;
  mesh_ = std::make_unique<Mesh>(std::move(group), memory, config.arena_bytes,
                                 config.max_arena_bytes, static_cast<uint8_t*>(config.rings.base));
  proxy_ = std::make_unique<Proxy>(*mesh_, board_, config.num_writers, config.num_proxy_threads);
  std::vector<std::unique_ptr<Transport>> transports(size_t(proxy_->num_threads()));
  if (has_scale_out) {
    TransportOptions options = config.transport_options;
    options.local_rank = mesh_->group().local_rank_of(config.rank);
    options.node = mesh_->group().node();
    options.has_device_region = has_device_rings();
    for (int thread = 0; thread < proxy_->num_threads(); ++thread) {
      auto& transport = transports[size_t(thread)];
      PutListener* listener = proxy_->listener(thread);
      transport = config.make_transport
                      ? config.make_transport(listener, config.rank)
                      : make_transport(config.transport, listener, config.rank, options);
      transport->register_region(mesh_->memory().base(), mesh_->memory().bytes());
      if (has_device_rings()) transport->register_device_region(config.rings);
    }
  }
  proxy_->set_transports(std::move(transports), config.heartbeat_timeout_s);
  proxy_->set_cpus(config.proxy_cpus);
  proxy_->set_thread_setup(config.thread_setup);
  proxy_->set_channels(ChannelTable(mesh_->group(), [this](int peer) -> const RegisteredRegion& {
    return mesh_->registered_of(peer);
  }));
}

Fabric::~Fabric() {
  if (!is_foreign()) return;  // else thread and connections are the parent's
  (void)proxy_.release();
  (void)mesh_.release();
}

bool Fabric::is_foreign() const { return getpid() != pid_; }

std::vector<uint8_t> Fabric::address() const {
  AddressHead head;
  head.config_digest = config_.config_digest;
  head.arena = mesh_->arena()->address();
  head.rank = config_.rank;
  std::vector<uint8_t> blob(sizeof head);
  if (has_transports())
    for (int thread = 0; thread < proxy_->num_threads(); ++thread) {
      const std::vector<uint8_t> each = proxy_->transport(thread)->address();
      head.transport_bytes[head.num_transports++] = uint32_t(each.size());
      blob.insert(blob.end(), each.begin(), each.end());
    }
  std::memcpy(blob.data(), &head, sizeof head);
  return blob;
}

void Fabric::connect(const std::vector<std::vector<uint8_t>>& addresses) {
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
    if (!is_ours(head, int(rank), addresses[rank].size()))
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
    const int thread = proxy_->thread_of(rank);
    proxy_->transport(thread)->connect(
        rank, transport_address(heads[size_t(rank)], addresses[size_t(rank)], thread));
  }
  if (has_transports()) transport_text_ = describe_threads();
  is_connected_ = true;
}

void Fabric::raise_left() {
  if (board_.raised()) return;
  FaultRecord fault;
  fault.kind = FaultKind::kPeerLost;
  fault.rank = config_.rank;
  fault.peer = config_.rank;
  fault.set_phase("close");
  fault.set_detail("closed without a barrier");
  board_.raise(fault);
}

void Fabric::raise_lost(int peer) {
  FaultRecord fault;
  fault.kind = FaultKind::kPeerLost;
  fault.rank = config_.rank;
  fault.peer = peer;
  fault.set_phase("process");
  fault.set_detail("its process has ended");
  board_.raise(fault);
}

std::optional<FaultRecord> Fabric::fault() {
  const double limit = now_s() + kVerdictS;
  while (board_.is_stopping()) {
    if (now_s() < limit) {
      std::this_thread::sleep_for(std::chrono::microseconds(100));
      continue;
    }
    FaultRecord fault;
    fault.kind = FaultKind::kTransport;
    fault.rank = config_.rank;
    fault.set_phase("transport");
    fault.set_detail("the provider has found a fault and not come back to tell which");
    board_.raise(fault);
  }
  if (!board_.raised()) return std::nullopt;
  return board_.record();
}

void Fabric::stop(bool is_clean) {
  if (is_stopped_ || is_foreign()) return;
  is_stopped_ = true;
  proxy_->stop(is_clean, kGoodbyeS);
  mesh_->unmap_peers();
}

bool Fabric::has_transports() const { return proxy_->transport() != nullptr; }

std::string Fabric::describe_threads() const {
  std::string text = proxy_->transport()->describe();
  if (proxy_->num_threads() > 1) text = std::to_string(proxy_->num_threads()) + " threads: " + text;
  for (int thread = 1; thread < proxy_->num_threads(); ++thread)
    text += "; " + proxy_->transport(thread)->describe();
  if (!config_.proxy_cpus.empty())
    text += ", on " + std::to_string(config_.proxy_cpus.size()) + " CPUs near the device";
  return text;
}

void Fabric::start_for_device() {
  proxy_->set_eager();
  if (has_device_rings()) proxy_->set_first_puts();
  start();
}

bool Fabric::wait_ready(double timeout_s) const {
  const double deadline = now_s() + timeout_s;
  while (!proxy_->is_ready() && !board_.raised() && now_s() < deadline)
    std::this_thread::sleep_for(std::chrono::microseconds(100));
  return proxy_->is_ready();
}

DeviceReach Fabric::ring_reach() const {
  DeviceReach worst = DeviceReach::kDirect;
  for (int peer : mesh_->group().scale_out_peers(mesh_->group().rank()))
    worst = std::min(worst, proxy_->transport(proxy_->thread_of(peer))->device_reach(peer));
  return worst;
}

std::string Fabric::describe_transport() const {
  return transport_text_.empty() ? "none (one node)" : transport_text_;
}

DeviceFabric Fabric::device_view(const FabricView& view, size_t chunk_bytes) const {
  const Group& group = mesh_->group();
  const RegisteredRegion& here = mesh_->registered();
  const ChannelTable& channels = proxy_->channels();
  const int me = group.rank();
  if (group.num_ranks() > kMaxFabricRanks)
    throw ConfigException("num_ranks=" + std::to_string(group.num_ranks()) +
                          " is above what a warp serves: " + std::to_string(kMaxFabricRanks));
  DeviceFabric out{};
  out.num_nodes = group.num_nodes();
  out.node = group.node();
  out.max_local_ranks = group.max_local_ranks();
  out.ring_bytes = here.ring_bytes;
  out.chunk_bytes = chunk_bytes;
  out.memory = reinterpret_cast<uint8_t*>(view.memory);
  out.control_bytes = here.control_bytes;
  out.rings = has_device_rings() ? static_cast<uint8_t*>(config_.rings.base)
                                 : out.memory + here.control_bytes;
  out.fifos = reinterpret_cast<uint8_t*>(view.fifos);
  out.fifo_stride = FifoBank::kStride;
  out.fifo_tail = FifoBank::kTail;
  out.fifo_capacity = FifoBank::kCapacity;
  out.completions = reinterpret_cast<uint8_t*>(view.completions);
  for (int rank = 0; rank < group.num_ranks(); ++rank) {
    out.node_of[rank] = group.node_of(rank);
    out.local_rank_of[rank] = group.local_rank_of(rank);
    out.source_index[rank] = -1;
    for (int node = 0; node < group.num_nodes(); ++node)
      out.rail[rank][node] = uint8_t(group.rail(rank, node));
  }
  const auto line = [](size_t base, int index) { return RegisteredRegion::line(base, index); };
  for (int generation : {0, 1}) out.exchange_out[generation] = here.exchange_row_out_of(generation);
  out.num_proxy_threads = proxy_->num_threads();
  const std::vector<uint8_t>& threads = proxy_->thread_of_channel();
  std::copy(threads.begin(), threads.end(), out.proxy_thread_of);
  int num_remote = 0;
  for (int node : group.remote_nodes(me)) {
    const RegisteredRegion& there = mesh_->registered_of(group.rail(me, node));
    out.remote_nodes[num_remote++] = node;
    out.dispatch_send[node] = {here.dispatch_send_ring_of(node), there.dispatch_recv_ring_of(me),
                               line(here.dispatch_credit_in, node),
                               channels.to_node(ChannelPurpose::kDispatchData, node), 0};
    out.combine_recv[node] = {here.combine_recv_ring_of(node), line(here.combine_count_in, node),
                              channels.to_node(ChannelPurpose::kCombineCredit, node), 0};
    out.exchange_channel[node] = channels.to_node(ChannelPurpose::kExchange, node);
    for (int generation : {0, 1})
      out.exchange_remote[generation][node] = there.exchange_row_in_of(generation, me);
  }
  for (int source : group.in_sources(me)) {
    const RegisteredRegion& there = mesh_->registered_of(source);
    out.source_index[source] = out.num_in_sources;
    out.in_sources[out.num_in_sources++] = source;
    out.dispatch_recv[source] = {here.dispatch_recv_ring_of(source),
                                 line(here.dispatch_count_in, source),
                                 channels.to_source(ChannelPurpose::kDispatchCredit, source), 0};
    out.combine_send[source] = {here.combine_send_ring_of(source),
                                there.combine_recv_ring_of(group.node()),
                                line(here.combine_credit_in, source),
                                channels.to_source(ChannelPurpose::kCombineData, source), 0};
    out.exchange_count[source] = line(here.exchange_count_in, source);
    for (int generation : {0, 1})
      out.exchange_in[generation][source] = here.exchange_row_in_of(generation, source);
  }
  return out;
}

}  // namespace commlib
