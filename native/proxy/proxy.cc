#include "proxy/proxy.hpp"

#include <algorithm>

namespace commlib {
namespace {

int useful_threads(const Group& group, int num_threads) {
  if (num_threads < 1 || num_threads > kMaxProxyThreads)
    throw ConfigException("num_proxy_threads=" + std::to_string(num_threads) + " is not in 1.." +
                          std::to_string(kMaxProxyThreads));
  return std::clamp(group.num_nodes() - 1, 1, num_threads);
}

}  // namespace

Proxy::Proxy(Mesh& mesh, FaultBoard& board, int num_writers, int num_threads)
    : mesh_(mesh), fifos_(num_writers * useful_threads(mesh.group(), num_threads)) {
  const int count = useful_threads(mesh.group(), num_threads);
  for (int thread = 0; thread < count; ++thread) {
    std::vector<FifoMemory> mine;
    for (int writer = 0; writer < num_writers; ++writer)
      mine.push_back(fifos_.fifo(writer * count + thread));
    threads_.push_back(std::make_unique<ProxyThread>(mesh, board, std::move(mine)));
  }
}

void Proxy::set_transports(std::vector<std::unique_ptr<Transport>> transports,
                           double heartbeat_timeout_s) {
  for (int thread = 0; thread < num_threads(); ++thread) {
    MonitorShare share;
    share.heartbeat_timeout_s = heartbeat_timeout_s;
    share.fault_stage = &fault_stage_;
    share.has_node_peers = thread == 0;
    for (int peer : mesh_.group().scale_out_peers(mesh_.group().rank()))
      if (thread_of(peer) == thread) share.remote_peers.push_back(peer);
    threads_[size_t(thread)]->set_transport(std::move(transports[size_t(thread)]), share);
  }
}

void Proxy::set_channels(ChannelTable table) {
  table_.emplace(std::move(table));
  const size_t count = table_->specs().size();
  completions_ = std::make_unique<RegisteredMemory>(align_up((count + 1) * kLine, 4096));
  std::vector<std::vector<ProxyChannel*>> shares(threads_.size(),
                                                 std::vector<ProxyChannel*>(count));
  for (size_t i = 0; i < count; ++i) {
    channels_.push_back(std::make_unique<ProxyChannel>());
    channels_.back()->spec = table_->specs()[i];
    channels_.back()->completed = reinterpret_cast<uint64_t*>(completions_->base() + i * kLine);
    thread_of_channel_.push_back(uint8_t(thread_of(channels_.back()->spec.peer)));
    shares[thread_of_channel_.back()][i] = channels_.back().get();
  }
  for (size_t thread = 0; thread < threads_.size(); ++thread)
    threads_[thread]->set_channels(std::move(shares[thread]));
}

void Proxy::set_cpus(const std::vector<int>& cpus) {
  for (auto& thread : threads_) thread->set_cpus(cpus);
}

void Proxy::set_thread_setup(const ThreadSetup& setup) {
  for (auto& thread : threads_) thread->set_thread_setup(setup);
}

void Proxy::set_first_puts() {
  std::vector<std::vector<int>> shares(threads_.size());
  for (int peer : mesh_.group().scale_out_peers(mesh_.group().rank()))
    shares[size_t(thread_of(peer))].push_back(peer);
  for (size_t i = 0; i < shares.size(); ++i) threads_[i]->set_first_puts(std::move(shares[i]));
}

bool Proxy::is_ready() const {
  return std::all_of(threads_.begin(), threads_.end(),
                     [](const auto& thread) { return thread->is_ready(); });
}

CommandWriter Proxy::writer(int index) {
  std::vector<FifoProducer> mine;
  for (int thread = 0; thread < num_threads(); ++thread)
    mine.push_back(FifoProducer{fifos_.fifo(index * num_threads() + thread)});
  return CommandWriter(std::move(mine), thread_of_channel_);
}

void Proxy::start() {
  for (auto& thread : threads_) thread->start();
}

void Proxy::stop(bool is_clean, double timeout_s) {
  for (auto& thread : threads_) thread->begin_stop(is_clean, timeout_s);
  for (auto& thread : threads_) thread->join();
}

void Proxy::set_busy(bool is_busy) {
  for (auto& thread : threads_) thread->set_busy(is_busy);
}

void Proxy::set_eager() {
  for (auto& thread : threads_) thread->set_eager();
}

void Proxy::set_frozen(bool is_frozen) {
  for (auto& thread : threads_) thread->set_frozen(is_frozen);
}

ProxyCounters Proxy::counters() const {
  ProxyCounters sum;
  for (const auto& thread : threads_) {
    const ProxyCounters each = thread->counters();
    sum.commands += each.commands;
    sum.data_bytes += each.data_bytes;
    sum.exchange_bytes += each.exchange_bytes;
    sum.signals += each.signals;
  }
  return sum;
}

}  // namespace commlib
