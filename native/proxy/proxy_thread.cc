#include "proxy/proxy_thread.hpp"

#include <sched.h>

#include <algorithm>

#include "common/backoff.hpp"

namespace commlib {
namespace {

// To flush what is left (a fault record, the last good-bye); a peer that does not answer costs
// this.
constexpr double kShutdownS = 1.0;
constexpr int kBatch = 64;  // commands between two rounds of fence and signals, at most
// Bytes between two rounds of fence and signals, at most: if a full ring went out under one signal,
// the receiver would begin, and its credits come back, only when the link has run dry.
constexpr uint64_t kBatchBytes = 128 << 10;
constexpr uint64_t kNoChannel = ~0ull;  // token of puts that are not channel commands
constexpr uint64_t kFirstPut = ~1ull;   // likewise, of post_first()

uint64_t make_token(uint32_t channel, uint64_t index) { return uint64_t(channel) << 48 | index; }

}  // namespace

ProxyThread::ProxyThread(Mesh& mesh, FaultBoard& board, std::vector<FifoMemory> fifos)
    : mesh_(mesh), board_(board) {
  for (const FifoMemory& fifo : fifos) consumers_.push_back(FifoConsumer{fifo});
}

ProxyThread::~ProxyThread() {
  begin_stop(false, 0);
  join();
}

void ProxyThread::set_transport(std::unique_ptr<Transport> transport, const MonitorShare& share) {
  transport_ = std::move(transport);
  monitor_ = std::make_unique<Monitor>(mesh_, transport_.get(), board_, share);
}

void ProxyThread::start() {
  thread_ = std::thread([this] { loop(); });
}

void ProxyThread::set_busy(bool is_busy) {
  is_busy_.store(is_busy, std::memory_order_release);
  if (is_busy) {
    std::lock_guard<std::mutex> lock(mutex_);
    wake_.notify_one();
  }
}

void ProxyThread::begin_stop(bool is_clean, double timeout_s) {
  if (!thread_.joinable()) return;
  std::lock_guard<std::mutex> lock(mutex_);
  is_clean_stop_ = is_clean;
  stop_timeout_s_ = timeout_s;
  stop_.store(true, std::memory_order_release);
  wake_.notify_one();
}

void ProxyThread::join() {
  if (thread_.joinable()) thread_.join();
}

// Near the memory that it moves. A set that the system refuses is no reason to fail.
void ProxyThread::pin() {
  if (cpus_.empty()) return;
  cpu_set_t set;
  CPU_ZERO(&set);
  for (int cpu : cpus_)
    if (cpu >= 0 && cpu < CPU_SETSIZE) CPU_SET(cpu, &set);
  (void)sched_setaffinity(0, sizeof set, &set);
}

void ProxyThread::run_setup() {
  if (setup_.set_context == nullptr) return;
  int mode = setup_.capture_mode;  // the old one comes back here
  int code = setup_.set_context(setup_.context);
  if (code == 0) code = setup_.exchange_capture_mode(&mode);
  if (code == 0) return;
  FaultRecord record;
  record.kind = FaultKind::kTransport;
  record.rank = mesh_.group().rank();
  record.code = code;
  record.set_phase("proxy/setup");
  record.set_detail("the thread has no context of the device");
  board_.raise(record);
}

void ProxyThread::post_first() {
  const Group& group = mesh_.group();
  const int rank = group.rank();
  for (int peer : first_puts_) {
    const int node = group.node_of(peer);
    const RegisteredRegion& there = mesh_.registered_of(peer);
    const bool is_rail = group.rail(rank, node) == peer;  // else we are its rail
    transport_->put(
        peer, mesh_.registered().dispatch_send_ring_of(node),
        is_rail ? there.dispatch_recv_ring_of(rank) : there.combine_recv_ring_of(group.node()),
        there.ring_bytes, kFirstPut);
    transport_->fence(peer);
    // Partner: is_ready() at the peer.
    transport_->put_signal(peer, RegisteredRegion::line(there.first_put_in, rank), 1);
  }
}

bool ProxyThread::is_ready() const {
  if (num_first_puts_.load(std::memory_order_acquire) > 0)
    return false;  // partner: on_put_complete
  return std::all_of(first_puts_.begin(), first_puts_.end(), [this](int peer) {
    return load_acquire(mesh_.registered_word(
               RegisteredRegion::line(mesh_.registered().first_put_in, peer))) == 1;
  });
}

void ProxyThread::loop() {
  pin();
  run_setup();
  post_first();
  // With remote peers an idle proxy must go on progressing: puts over TCP land only if it does.
  const auto idle_period = std::chrono::duration<double>(
      transport_ ? std::min(0.0005, monitor_->period_s()) : monitor_->period_s());
  Backoff backoff(is_eager_ ? 0 : 100);
  while (!stop_.load(std::memory_order_acquire)) {
    if (is_frozen_.load(std::memory_order_acquire)) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
      continue;
    }
    int events = drain();
    if (transport_) {
      events += transport_->progress();
      check_transport();
    }
    monitor_->tick(now_s());
    if (events > 0) {
      backoff.reset();
    } else if ((is_eager_ || is_busy_.load(std::memory_order_acquire)) && transport_) {
      backoff.wait();
    } else {
      std::unique_lock<std::mutex> lock(mutex_);
      if (!stop_.load(std::memory_order_relaxed)) wake_.wait_for(lock, idle_period);
    }
  }
  if (is_clean_stop_) {
    say_goodbye();
  } else if (board_.raised()) {
    monitor_->tick(now_s() + 1e6);  // the fault must reach the peers before we go
  }
  if (transport_) transport_->shutdown(kShutdownS);
}

// Leaves when everything of ours has arrived and every peer has said good-bye as well: a peer that
// still flushes needs us to progress.
void ProxyThread::say_goodbye() {
  const double deadline = now_s() + stop_timeout_s_;
  Backoff backoff(100);
  const auto progress_until = [&](auto&& is_over) {
    while (now_s() < deadline) {
      const int events = drain() + (transport_ ? transport_->progress() : 0);
      if (events > 0)
        backoff.reset();
      else if (is_over())
        return;
      else
        backoff.wait();
    }
  };
  const auto is_idle = [this] { return !transport_ || transport_->idle(); };
  progress_until(is_idle);
  monitor_->say_closed();
  progress_until([&] { return is_idle() && monitor_->are_remote_peers_closed(); });
}

int ProxyThread::drain() {
  // After a fault nobody waits for data any more, and peers leave: what is queued stays here.
  if (board_.raised()) return 0;
  int count = 0;
  for (FifoConsumer& consumer : consumers_) {
    Command command;
    uint64_t bytes = 0;
    for (int i = 0; i < kBatch && bytes < kBatchBytes && consumer.pop(&command); ++i, ++count) {
      const CommandFields fields = decode(command);
      post(fields);
      bytes += fields.bytes;
    }
    signal_dirty();
  }
  if (count > 0) num_commands_.fetch_add(uint64_t(count), std::memory_order_relaxed);
  return count;
}

void ProxyThread::post(const CommandFields& command) {
  ProxyChannel& channel = *channels_[command.channel];
  if (command.kind == CommandKind::kPut) {
    const uint64_t token = make_token(command.channel, channel.puts.post());
    auto& bytes = channel.spec.purpose == ChannelPurpose::kExchange ? exchange_bytes_ : data_bytes_;
    bytes.fetch_add(command.bytes, std::memory_order_relaxed);
    transport_->put(channel.spec.peer, command.src_offset, command.dst_offset, command.bytes,
                    token);
  }
  channel.total += command.count;
  if (!channel.is_dirty) {
    channel.is_dirty = true;
    dirty_.push_back(&channel);
  }
}

// One fence per peer, then the counters of all its channels that moved.
void ProxyThread::signal_dirty() {
  if (dirty_.empty()) return;
  std::sort(dirty_.begin(), dirty_.end(), [](const ProxyChannel* a, const ProxyChannel* b) {
    return a->spec.peer < b->spec.peer;
  });
  int fenced_peer = -1;
  for (ProxyChannel* channel : dirty_) {
    if (channel->spec.peer != fenced_peer) {
      fenced_peer = channel->spec.peer;
      // Partner: the acquire load of the counter at the peer (forward, final_reduce, exchange).
      transport_->fence(fenced_peer);
    }
    transport_->put_signal(fenced_peer, channel->spec.remote_signal_offset, channel->total);
    channel->is_dirty = false;
  }
  num_signals_.fetch_add(dirty_.size(), std::memory_order_relaxed);
  dirty_.clear();
}

void ProxyThread::on_put_complete(uint64_t token) {
  if (token == kNoChannel) return;
  if (token == kFirstPut) {
    num_first_puts_.fetch_sub(1, std::memory_order_release);  // partner: is_ready()
    return;
  }
  const uint64_t number = token >> 48;
  const uint64_t index = token & ((1ull << 48) - 1);
  // The first report of a put stands; a provider that repeats one has lost nothing of ours.
  if (number >= channels_.size() || channels_[number] == nullptr ||
      !channels_[number]->puts.complete(index))
    return raise_unknown_token(number, index);
  const ProxyChannel& channel = *channels_[number];
  // Partner: completed(), or the kernel's load.
  store_release(channel.completed, channel.puts.num_complete());
}

// The provider is out of its mind: slots may be reused while it reads them.
void ProxyThread::raise_unknown_token(uint64_t channel, uint64_t index) {
  FaultRecord record;
  record.kind = FaultKind::kTransport;
  record.rank = mesh_.group().rank();
  record.seen = index;
  if (channel < channels_.size() && channels_[channel] != nullptr)
    record.expected = channels_[channel]->puts.num_posted();
  record.set_phase("transport/completion");
  record.set_detail(("channel " + std::to_string(channel) + " has posted fewer puts").c_str());
  board_.raise(record);
}

void ProxyThread::check_transport() {
  while (const auto fault = transport_->take_fault()) {
    // A peer that leaves because of a fault tells of it before its connection breaks: the fault is
    // the cause, and the news of it lies here already.
    monitor_->collect_faults();
    if (board_.raised()) continue;
    if (fault->peer >= 0 && monitor_->is_closed(fault->peer)) {
      board_.resume_kernels();
      continue;
    }
    FaultRecord record;
    record.kind = fault->peer >= 0 ? FaultKind::kPeerLost : FaultKind::kTransport;
    record.rank = mesh_.group().rank();
    record.peer = fault->peer;
    record.code = fault->code;
    record.set_phase(("transport/" + fault->call).c_str());
    record.set_detail(fault->message.c_str());
    board_.raise(record);
  }
}

ProxyCounters ProxyThread::counters() const {
  return {num_commands_.load(), data_bytes_.load(), exchange_bytes_.load(), num_signals_.load()};
}

}  // namespace commlib
