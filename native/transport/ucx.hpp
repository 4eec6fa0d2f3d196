// Provider over UCX (UCP): one context and one worker per transport, one endpoint per peer.
//
// Why puts and not active messages: a put of a chunk is one operation on every fabric, and on RDMA
// needs nothing from the receiver. Where the receiver must help (TCP, also between processes of one
// host), it does so inside ucp_worker_progress, and stops when its worker is destroyed. What UCX
// has beyond that for one host, copies into another process (CMA and its like), asks nobody, so
// that no shutdown of the receiver ends it; it is not used but for device memory that outlives it,
// see ucx_lanes.cc.
//
// Over TCP the receiver's proxy thread writes payload and signal with plain stores in posting
// order. On x86-64 that order is what other threads see (total store order). On a weakly ordered
// CPU it is not promised; there use a fabric whose puts are written by hardware.
#pragma once

#include <ucp/api/ucp.h>

#include <chrono>
#include <deque>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "common/in_order.hpp"
#include "transport/provider_base.hpp"

namespace commlib {

class UcxTransport final : public ProviderBase {
 public:
  UcxTransport(PutListener* listener, int rank, const TransportOptions& options);
  ~UcxTransport() override;
  UcxTransport(const UcxTransport&) = delete;
  UcxTransport& operator=(const UcxTransport&) = delete;

  std::string name() const override { return "ucx"; }
  std::string describe() const override;
  void register_region(void* base, size_t bytes) override;
  // UCX finds out by itself whose memory an address is.
  void register_device_region(const DeviceRegion& region) override;
  DeviceReach device_reach(int peer) const override;
  std::vector<uint8_t> address() const override;
  void connect(int peer, const std::vector<uint8_t>& address) override;
  void put(int peer, size_t local_offset, size_t remote_offset, size_t bytes,
           uint64_t token) override;
  void fence(int peer) override;
  void put_signal(int peer, size_t remote_offset, uint64_t value) override;
  int progress() override;
  bool idle() const override;
  void shutdown(double timeout_s) noexcept override;

 private:
  using Clock = std::chrono::steady_clock;

  // How a fence is made.
  enum class FenceMode {
    // ucp_worker_fence with UCX_FENCE_MODE=ep_based: an ordering mark per endpoint. Free on an
    // endpoint with one RMA lane (UCX's default); with more lanes UCX blocks in a flush of it.
    kEndpoint,
    // We flush the one endpoint and hold its signals back. For older UCX, whose ucp_worker_fence
    // blocks in a remote flush of all endpoints, so that one stopped peer stops everything; and
    // with device memory, whose puts take another lane than signals. A flush waits for the peer's
    // processor on every lane, so that copies between GPUs do without, see copies_are_direct().
    kFlush,
  };

  enum class CommandKind { kPut, kSignal, kFence, kCopiesFence };

  struct Command {
    CommandKind kind;
    size_t local_offset = 0;
    size_t remote_offset = 0;
    size_t bytes = 0;
    uint64_t value = 0;  // token of a put, value of a signal, copies that a fence waits for
  };

  struct Peer {
    UcxTransport* owner = nullptr;
    int rank = -1;
    ucp_ep_h ep = nullptr;
    RegionMap<ucp_rkey_h> memory;
    size_t outstanding = 0;    // operations that use ep and rkey
    bool failed = false;       // no new operations
    bool is_flushing = false;  // a flush started by a fence or by shutdown is outstanding
    bool posted_since_fence = false;
    std::vector<size_t> signalled;  // words since the last fence, few
    std::deque<Command> held;       // kFlush: signals and fences behind a fence under way

    bool has_direct_copies = false;
    InOrder copies;               // puts between device regions
    uint64_t awaited_copies = 0;  // so many, from the first, by the last kCopiesFence
    bool put_host_since_fence = false;

    bool is_held() const { return is_flushing || copies.num_complete() < awaited_copies; }
  };

  // One operation given to UCX. The address is stable until it completes, because UCX reads the
  // word of a signal late.
  struct Operation {
    Peer* peer = nullptr;  // null: free
    CommandKind kind = CommandKind::kPut;
    uint64_t value = 0;            // token of a put; the source word of a signal
    std::optional<uint64_t> copy;  // its number in Peer::copies
  };

  // ucx_setup.cc
  void create_context();
  void create_worker();
  FenceMode configure(ucp_config_t* config) const;
  void unpack_address(Peer& peer, const std::vector<uint8_t>& address);
  void map_memory(void* base, size_t bytes);
  [[noreturn]] void throw_setup(const char* call, ucs_status_t status, int peer,
                                const std::string& what) const;
  [[noreturn]] void throw_registration(ucs_status_t status, size_t bytes) const;
  void release_handles() noexcept;

  // ucx_lanes.cc
  ucs_status_t exclude_transports(ucp_config_t* config) const;
  bool is_refused(const std::string& transport) const;
  void refuse_single_copy(const Peer& peer) const;
  bool copies_are_direct(const Peer& peer) const;
  ucs_memory_type_t type_of(ucp_mem_h memory) const;
  std::string describe_peer(const Peer& peer) const;

  // ucx.cc
  Peer* find_peer(int peer, const char* call);
  void submit(Peer& peer, const Command& command);
  bool is_copy(const Peer& peer, const Command& command) const;
  void execute(Peer& peer, const Command& command);
  void post(Peer& peer, const Command& command);
  void start_flush(Peer& peer);
  Operation* begin(Peer& peer, CommandKind kind, uint64_t value);
  void track(Operation* operation, ucs_status_ptr_t request);
  void finish(Operation* operation, ucs_status_t status);
  int release_held();
  void fail_peer(Peer& peer, int code, const std::string& call, const std::string& message);
  bool is_drained() const { return outstanding_ == 0 && held_ == 0; }
  bool drain_until(Clock::time_point deadline);
  void complete_leftovers();

  static void on_operation(void* request, ucs_status_t status, void* user_data);
  static void on_endpoint_error(void* user_data, ucp_ep_h ep, ucs_status_t status);

  ucp_context_h context_ = nullptr;
  ucp_worker_h worker_ = nullptr;
  bool has_device_region_;
  RegionMap<ucp_mem_h> memory_;
  FenceMode fence_mode_ = FenceMode::kEndpoint;

  std::vector<std::unique_ptr<Peer>> peers_;  // by rank, null if not connected
  std::deque<Operation> operations_;          // all that ever existed; stable addresses
  std::vector<Operation*> free_;
  size_t outstanding_ = 0;  // operations in UCX
  size_t held_ = 0;         // commands in Peer::held
  bool is_shut_down_ = false;
};

}  // namespace commlib
