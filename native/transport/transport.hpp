// The provider interface: how bytes reach a peer that does not share our memory.
//
// A transport knows peers, regions and commands. It never knows tokens, experts or epochs. Every
// rank registers one region of host memory, and perhaps one of device memory, whose offsets go on
// where those of the first end. Every offset below is such an offset.
//
// Threading: `register_region`, `address` and `connect` are called during set-up, everything else
// on one thread (the proxy). An object may move between threads if the caller synchronises.
//
// Visibility: bytes of a put land at the peer in any order until a `fence`. A consumer that reads
// the word of a `put_signal` with an acquire load and finds the new value sees every byte of all
// puts posted before the fence that precedes the signal. A signal without a fence may overtake the
// puts before it. Signals to the same word keep their order, fence or not. Words lie in host
// memory; the bytes may lie in device memory, and the consumer may be that device (docs/design.md,
// section 8, says what that rests on).
//
// Bytes may land only while the receiver calls `progress()` (UCX over TCP, also within a host;
// verbs until a connection is made, and signals by immediate): every rank calls it all the time,
// also while it has nothing to send.
//
// No byte lands once the receiver's `shutdown` has returned, whatever its peers do: its memory may
// be freed, and belong to something else, while they still put. So a provider may not use a way on
// which the sender alone decides (copies into another process, mappings of its memory), but for
// device memory whose owner keeps it as it is until the process ends, unless all ranks have agreed
// to close.
//
// Judging a peer: a transport reports positive evidence (connection reset, process gone). A peer
// that is merely silent (stopped, partitioned, slow) is never a fault here, the runtime's heartbeat
// decides that. A peer that shuts its transport down looks like one that died: ranks agree to
// close before they shut down, and ignore faults of peers that have agreed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

namespace commlib {

// What went wrong while the transport was running. peer == -1: not specific to a peer.
struct TransportFault {
  int peer = -1;
  int code = 0;         // the provider's own code (a ucs_status_t for UCX)
  std::string call;     // the call or event that failed, "ucp_put_nbx"
  std::string message;  // one line, with the peer and the provider's description
};

// A set-up call of the provider failed; running transports report a TransportFault instead.
class TransportException : public std::runtime_error {
 public:
  TransportException(std::string call, int code, int peer, const std::string& message)
      : std::runtime_error(message), call_(std::move(call)), code_(code), peer_(peer) {}

  const std::string& call() const { return call_; }
  int code() const { return code_; }
  int peer() const { return peer_; }

 private:
  std::string call_;
  int code_;
  int peer_;
};

// The region could not be registered: locked-memory limit or memory itself too small.
class RegistrationException : public std::runtime_error {
 public:
  RegistrationException(size_t needed, size_t available, const std::string& message)
      : std::runtime_error(message), needed_(needed), available_(available) {}

  size_t needed() const { return needed_; }        // bytes asked for
  size_t available() const { return available_; }  // bytes the limit allows, 0 if unknown

 private:
  size_t needed_;
  size_t available_;
};

// What the machine and its administrator decide. Only `verbs` uses the rest below the first two.
struct TransportOptions {
  int local_rank = 0;  // among the ranks of the node, which share its ports
  int node = 0;
  std::string near_pci;           // PCI address of the GPU whose data moves; empty: none
  std::vector<std::string> nics;  // ports by name, "mlx5_0" or "mlx5_0:2"; empty: by distance
  int max_nics = 1;               // ports of equal distance to share the peers among
  int gid_index = -1;             // -1: the best one
  int mtu = 0;                    // bytes, at most; 0: what the port has
  int ack_timeout = 16;           // a packet is sent again after 4.096 us * 2^this
  int retry_count = 6;            // times, before the peer counts as lost; 7 is for ever on rxe
  int rnr_retry_count = 7;        // likewise while the peer has no receive posted; 7: for ever
  int traffic_class = 0;
  int service_level = 0;
  bool signal_by_immediate = false;  // see verbs.hpp
  // A device region will be registered, under the condition of `register_device_region`.
  bool has_device_region = false;
  uint32_t send_operations = 128;  // in flight per peer, at most
  size_t send_bytes = 8 << 20;
};

// Receives the completions of puts, only from inside `progress` or `shutdown` (never from `put`),
// so on the proxy thread.
class PutListener {
 public:
  virtual ~PutListener() = default;
  // The local bytes of this put may be reused. May post further commands, except when called from
  // `shutdown`; must not call `progress` or `shutdown`.
  virtual void on_put_complete(uint64_t token) = 0;
  // take_fault() has something, in the middle of whatever call of the transport: what the provider
  // does next may take long. May take it and do nothing else with the transport.
  virtual void on_fault() {}
};

// Memory of a GPU. A provider may use the dmabuf (offset bytes into it lies `base`), or reach the
// memory by its address if the driver allows that; if neither works it throws
// RegistrationException, and the caller takes host memory.
struct DeviceRegion {
  void* base = nullptr;
  size_t bytes = 0;
  int dmabuf_fd = -1;
  uint64_t dmabuf_offset = 0;
};

// How puts between device regions travel.
enum class DeviceReach {
  kUnseen,  // the provider takes the memory for the host's, or knows none
  kStaged,  // through host memory, by the processors
  kDirect,  // a card or a copy engine reads and writes it
};

class Transport {
 public:
  virtual ~Transport() = default;

  virtual std::string name() const = 0;
  // One line for the log: library version and path, what carries the bytes to each peer. During
  // set-up or on the proxy thread.
  virtual std::string describe() const = 0;

  // Registers the caller's memory, which must outlive the transport. Once, before `address`.
  // Throws RegistrationException (limits) or TransportException.
  virtual void register_region(void* base, size_t bytes) = 0;

  // After register_region: the offsets behind it mean this memory. Where the options announce it, a
  // peer may go on writing there after our shutdown, so it must stay what it is until the process
  // ends, unless all ranks have agreed to close. The default knows no devices and throws
  // TransportException.
  virtual void register_device_region(const DeviceRegion& region);

  // After `connect`. kUnseen without a device region at both ends.
  virtual DeviceReach device_reach(int) const { return DeviceReach::kUnseen; }

  // What a peer needs to reach this rank's region. Opaque, exchanged by the caller.
  virtual std::vector<uint8_t> address() const = 0;

  // Once per peer we send to; a peer that only sends to us needs none. Throws TransportException.
  virtual void connect(int peer, const std::vector<uint8_t>& address) = 0;

  // Copies local [local_offset, +bytes) to the peer's [remote_offset, +bytes). The token goes to
  // the listener exactly once, when the local bytes may be reused; also when the put failed. A
  // range that does not lie in one region is a fault of the peer and moves nothing. What the
  // connection cannot take yet is queued without bound: the caller bounds it (a slot is not reused
  // before its token has come back).
  virtual void put(int peer, size_t local_offset, size_t remote_offset, size_t bytes,
                   uint64_t token) = 0;

  // Signals to this peer posted later become visible after what was posted earlier. Puts posted
  // later need not wait. Does not block. Free if nothing was posted since the last fence.
  virtual void fence(int peer) = 0;

  // Stores the 8-byte value at the peer, in host memory; partner: the acquire load of whoever polls
  // the word. The value is copied before the call returns; there is no completion report.
  virtual void put_signal(int peer, size_t remote_offset, uint64_t value) = 0;

  // Advances everything; returns the number of events handled. Never blocks.
  virtual int progress() = 0;

  // True if no operation of ours is outstanding and no completion waits to be reported.
  virtual bool idle() const = 0;

  // The first fault not taken yet; at most one per peer. Later puts to a peer that has a fault
  // complete without moving anything, later signals to it are dropped.
  virtual std::optional<TransportFault> take_fault() = 0;

  // Drains and closes connections, at most `timeout_s`, then by force. All tokens are reported by
  // the time it returns; peers cannot write to our region any more. Never waits for a dead or
  // stopped peer beyond the time-out. Idempotent; the destructor calls shutdown(0).
  virtual void shutdown(double timeout_s) noexcept = 0;
};

// Providers: "ucx", "verbs" (InfiniBand, RoCE), "auto" (verbs if its ports can be used, else ucx),
// "loopback" (ranks are threads of this process), "null" (moves nothing). Throws
// std::invalid_argument for another name. The listener must outlive the transport.
std::unique_ptr<Transport> make_transport(const std::string& name, PutListener* listener, int rank,
                                          const TransportOptions& options = {});

}  // namespace commlib
