// One proxy thread: turns commands into puts, keeps its transport progressing at all times, beats.
#pragma once

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "channel/fifo.hpp"
#include "common/in_order.hpp"
#include "proxy/channel_table.hpp"
#include "proxy/monitor.hpp"

namespace commlib {

struct ProxyCounters {
  uint64_t commands = 0;
  uint64_t data_bytes = 0;  // bytes of kPut commands on the data channels
  uint64_t exchange_bytes = 0;
  uint64_t signals = 0;
};

// What a proxy thread calls before all else, so that its transport may use a device: the context
// becomes its current one, and what it calls does not break a capture of graphs on another thread.
// Anything but 0 is an error of the driver's.
struct ThreadSetup {
  int (*set_context)(void*) = nullptr;
  void* context = nullptr;
  int (*exchange_capture_mode)(int*) = nullptr;
  int capture_mode = 0;
};

// A channel as its proxy thread, which alone touches it, sees it.
struct ProxyChannel {
  ChannelSpec spec;
  uint64_t total = 0;  // running total of counts: the value of the peer's counter
  bool is_dirty = false;
  InOrder puts;
  uint64_t* completed = nullptr;  // line of the channel: puts.num_complete(), for others
};

class ProxyThread : public PutListener {
 public:
  // transport: nullptr on one node.
  ProxyThread(Mesh& mesh, FaultBoard& board, std::vector<FifoMemory> fifos);
  ~ProxyThread() override;

  // Once, before start().
  void set_transport(std::unique_ptr<Transport> transport, const MonitorShare& share);
  // [channel]; nullptr: another thread's. Likewise.
  void set_channels(std::vector<ProxyChannel*> channels) { channels_ = std::move(channels); }
  // CPUs to run on; empty: as the process may. Likewise.
  void set_cpus(std::vector<int> cpus) { cpus_ = std::move(cpus); }
  // Likewise.
  void set_thread_setup(const ThreadSetup& setup) { setup_ = setup; }
  // A whole ring to each of these peers comes before all others, and theirs to us: so a provider
  // maps a peer's memory. Likewise.
  void set_first_puts(std::vector<int> peers) {
    first_puts_ = std::move(peers);
    num_first_puts_ = int(first_puts_.size());
  }
  // Those have left and come: nothing is under way to any ring any more.
  bool is_ready() const;
  void start();
  // Drains the FIFOs, says good-bye if `is_clean`, shuts the transport down. Idempotent.
  void begin_stop(bool is_clean, double timeout_s);
  void join();

  void set_busy(bool is_busy);
  void set_eager() { is_eager_ = true; }
  void set_frozen(bool is_frozen) { is_frozen_.store(is_frozen, std::memory_order_release); }
  ProxyCounters counters() const;
  Transport* transport() const { return transport_.get(); }

  void on_put_complete(uint64_t token) override;
  void on_fault() override { board_.stop_kernels(); }

 private:
  void loop();
  int drain();
  void post(const CommandFields& command);
  void signal_dirty();
  void say_goodbye();
  void pin();
  void run_setup();
  void post_first();
  void check_transport();
  void raise_unknown_token(uint64_t channel, uint64_t index);

  Mesh& mesh_;
  FaultBoard& board_;
  std::unique_ptr<Transport> transport_;
  std::unique_ptr<Monitor> monitor_;
  std::vector<FifoConsumer> consumers_;
  std::vector<ProxyChannel*> channels_;
  std::vector<ProxyChannel*> dirty_;
  std::vector<int> cpus_;
  ThreadSetup setup_;
  std::vector<int> first_puts_;
  std::atomic<int> num_first_puts_{0};

  std::thread thread_;
  std::atomic<bool> stop_{false};
  std::atomic<bool> is_busy_{false};
  std::atomic<bool> is_frozen_{false};
  bool is_clean_stop_ = false;
  bool is_eager_ = false;
  double stop_timeout_s_ = 0;
  std::mutex mutex_;
  std::condition_variable wake_;

  std::atomic<uint64_t> num_commands_{0};
  std::atomic<uint64_t> data_bytes_{0};
  std::atomic<uint64_t> exchange_bytes_{0};
  std::atomic<uint64_t> num_signals_{0};
};

}  // namespace commlib
