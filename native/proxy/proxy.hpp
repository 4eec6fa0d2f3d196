// The proxy thread: turns commands into puts, keeps the transport progressing at all times, beats.
#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <vector>

#include "channel/fifo.hpp"
#include "proxy/channel_table.hpp"
#include "proxy/monitor.hpp"

namespace commlib {

// Memory of all FIFOs of a rank in one piece, so that a GPU can map it.
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

struct ProxyCounters {
  uint64_t commands = 0;
  uint64_t data_bytes = 0;  // bytes of kPut commands on the data channels
  uint64_t exchange_bytes = 0;
  uint64_t signals = 0;
};

class Proxy : public PutListener {
 public:
  // One FIFO per executor thread. transport may be set once, before start(); nullptr: one node.
  Proxy(Mesh& mesh, FaultBoard& board, int num_fifos);
  ~Proxy() override;

  void set_transport(std::unique_ptr<Transport> transport, double heartbeat_timeout_s);
  void set_channels(ChannelTable table);
  const ChannelTable& channels() const { return *table_; }
  void start();
  // Drains the FIFOs, says good-bye if `is_clean`, shuts the transport down, joins. Idempotent.
  void stop(bool is_clean, double timeout_s);

  FifoMemory fifo(int index) const { return fifos_.fifo(index); }
  const RegisteredMemory& fifo_memory() const { return fifos_.memory(); }
  // [channel] line: what completed() returns.
  const RegisteredMemory& completions() const { return *completions_; }
  // Commands of the channel whose local bytes may be reused: all those numbered below this.
  uint64_t completed(uint32_t channel) const {
    return load_acquire(channels_[channel]->completed);  // partner: on_put_complete
  }
  // Operations under way: while there are any the thread yields, else it sleeps between ticks.
  void set_busy(bool is_busy);
  // Before start(): never sleeps. For commands that come from a GPU, which wakes nobody.
  void set_eager() { is_eager_ = true; }
  // Test hook: the thread stands still, as in a stopped process: no puts, no progress, no beat.
  void set_frozen(bool is_frozen) { is_frozen_.store(is_frozen, std::memory_order_release); }
  ProxyCounters counters() const;
  Transport* transport() const { return transport_.get(); }

  void on_put_complete(uint64_t token) override;

 private:
  struct Channel {
    ChannelSpec spec;
    uint64_t total = 0;   // running total of counts: the value of the peer's counter
    uint64_t posted = 0;  // puts
    bool is_dirty = false;
    std::deque<bool> in_flight;     // oldest first: completed yet?
    uint64_t* completed = nullptr;  // in completions_: prefix of puts that completed
  };

  void loop();
  int drain();
  void post(const CommandFields& command);
  void signal_dirty();
  void say_goodbye();
  void check_transport();
  void raise_unknown_token(uint64_t channel, uint64_t index);

  Mesh& mesh_;
  FaultBoard& board_;
  std::unique_ptr<Transport> transport_;
  std::unique_ptr<Monitor> monitor_;
  FifoBank fifos_;
  std::unique_ptr<RegisteredMemory> completions_;
  std::vector<FifoConsumer> consumers_;
  std::vector<std::unique_ptr<Channel>> channels_;
  std::vector<Channel*> dirty_;
  std::optional<ChannelTable> table_;

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
