// The verbs provider: reliable connections over InfiniBand or RoCE.
//
// Every rank we send to has a connection of its own, one way, set up when `connect` asks for it: a
// datagram tells the other end, which makes its end and answers. Until then puts are held.
//
// Order. A connection carries out its writes one after the other, also across lost and repeated
// packets, so `fence` has nothing to do. Within the host the card's writes are PCIe posted writes.
// One without the relaxed-ordering attribute never passes an earlier one, whatever that one's
// attribute. So the host region is registered twice: puts use a key with relaxed ordering (many
// hosts reach their rate only so), signals one without, and a signal pushes all data before it into
// memory. Data in device memory take another way than the signal from some switch on; what keeps
// them in order there is said in docs/design.md, section 8. Where a card may place the packets of a
// connection out of order (adaptive routing with out-of-order placement), a polled word proves
// nothing; there signals go as immediates
// (`signal_by_immediate`): the card reports those only after everything before them is in memory,
// and the receiver's processor stores the word.
//
// A peer that is silent at set-up is no fault. One that does not acknowledge is, after
// `retry_count` repetitions: a stopped process does not count as silent, its card answers.
#pragma once

#include <chrono>
#include <memory>
#include <string>
#include <vector>

#include "transport/provider_base.hpp"
#include "transport/verbs_receiver.hpp"

namespace commlib {

// A rank's address: the head, then a lane per port in use.
struct VerbsAddressHead {
  uint32_t magic = kMagic;
  uint32_t num_lanes = 0;
  uint64_t base = 0;
  uint64_t bytes = 0;
  uint64_t device_base = 0;
  uint64_t device_bytes = 0;  // 0: all is host memory

  static constexpr uint32_t kMagic = 0x76726233;
};
struct VerbsAddressLane {
  ControlAddress control;
  uint32_t data_key = 0;
  uint32_t signal_key = 0;
  uint32_t device_key = 0;
};

class VerbsTransport final : public ProviderBase {
 public:
  VerbsTransport(PutListener* listener, int rank, const TransportOptions& options);
  ~VerbsTransport() override;

  std::string name() const override { return "verbs"; }
  std::string describe() const override;
  void register_region(void* base, size_t bytes) override;
  void register_device_region(const DeviceRegion& region) override;
  DeviceReach device_reach(int peer) const override;
  std::vector<uint8_t> address() const override;
  void connect(int peer, const std::vector<uint8_t>& address) override;
  void put(int peer, size_t local_offset, size_t remote_offset, size_t bytes,
           uint64_t token) override;
  void fence(int) override {}
  void put_signal(int peer, size_t remote_offset, uint64_t value) override;
  int progress() override;
  bool idle() const override;
  void shutdown(double timeout_s) noexcept override;

 private:
  using Clock = std::chrono::steady_clock;

  struct Lane {
    std::unique_ptr<VerbsDevice> device;
    std::unique_ptr<ControlPort> control;
    ibv_mr* data = nullptr;         // of the host region, relaxed ordering
    ibv_mr* signal = nullptr;       // of the host region, strict
    ibv_mr* device_data = nullptr;  // of the device region, relaxed ordering
    RegionMap<uint32_t> memory;     // what puts read, with local keys
  };

  struct Peer {
    int rank = -1;
    uint32_t lane = 0;
    uint64_t cookie = 0;
    ControlAddress control;
    VerbsTarget target;
    std::unique_ptr<VerbsSender> sender;
    ibv_ah* route = nullptr;  // of control messages, while connecting
    Clock::time_point next_try;
    std::chrono::milliseconds patience{5};
    bool is_dirty = false;
    bool is_failed = false;
  };

  // verbs_setup.cc
  void open_lanes(const VerbsApi& api);
  [[noreturn]] void throw_device_registration(int code, size_t bytes) const;
  [[noreturn]] void throw_setup(const char* call, int code, int peer,
                                const std::string& what) const;
  void start_peer(Peer& peer, const std::vector<uint8_t>& address);
  std::string describe_peer(const Peer& peer) const;
  void release_lanes() noexcept;

  bool has_region() const { return !lanes_.empty() && !lanes_[0].memory.is_empty(); }

  // verbs.cc
  Peer* find_peer(int peer, const char* call);
  void submit(Peer& peer, const VerbsCommand& command);
  void mark_dirty(Peer& peer);
  int post_dirty();
  int poll(Lane& lane);
  void on_sent(const ibv_wc& done);
  void on_received(const ibv_wc& done);
  int receive_control();
  void ask(Peer& peer);
  void ask_again();
  void on_connect(const ControlMessage& message);
  void on_accept(const ControlMessage& message);
  void watch_events();
  void stop_asking(Peer& peer);
  void fail_peer(Peer& peer, int code, const std::string& call, const std::string& message);
  void report(std::vector<uint64_t>& tokens);
  bool is_drained() const;
  int advance();
  void close() noexcept;

  TransportOptions options_;
  std::string library_;
  std::vector<Lane> lanes_;   // does not grow any more once there are peers
  std::string registration_;  // how, for describe()

  std::vector<std::unique_ptr<Peer>> peers_;               // by rank, null if not connected
  std::vector<Peer*> connected_;                           // by number, in the order of connect()
  std::vector<Peer*> asking_;                              // no answer yet
  std::vector<Peer*> dirty_;                               // may have something to post
  std::vector<std::unique_ptr<VerbsReceiver>> receivers_;  // by number
  std::vector<uint64_t> tokens_;
  uint64_t num_progress_ = 0;
  bool is_shut_down_ = false;
};

}  // namespace commlib
