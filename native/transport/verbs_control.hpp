// Control messages between transports: unreliable datagrams by which the ends of a connection learn
// of each other. What is lost is sent again by whoever waits for the answer.
#pragma once

#include <memory>
#include <vector>

#include "transport/verbs_device.hpp"

namespace commlib {

// Where a port's control messages go. The key is checked by the card: whoever does not have it from
// the address cannot send here.
struct ControlAddress {
  VerbsPath path;
  uint32_t qp_number = 0;
  uint32_t key = 0;
};

enum class ControlKind : uint32_t {
  kConnect = 1,  // `from` wants to send to the receiver of this message
  kAccept = 2,   // the answer
};

struct ControlMessage {
  uint32_t magic = kMagic;
  ControlKind kind = ControlKind::kConnect;
  int32_t from = -1;    // rank
  uint32_t lane = 0;    // number of the port at both ends
  uint64_t cookie = 0;  // of the connection; an answer repeats it
  VerbsEnd end;
  ControlAddress reply_to;
  // kConnect: whether signals will come as immediates. kAccept: where their values go then.
  uint32_t is_signal_by_immediate = 0;
  uint32_t mailbox_key = 0;
  uint64_t mailbox_address = 0;

  static constexpr uint32_t kMagic = 0x76726332;
};

class ControlPort {
 public:
  explicit ControlPort(VerbsDevice& device);
  ~ControlPort();
  ControlPort(const ControlPort&) = delete;
  ControlPort& operator=(const ControlPort&) = delete;

  const ControlAddress& address() const { return address_; }

  // May be lost, also for want of a free buffer.
  void send(ibv_ah* route, const ControlAddress& to, const ControlMessage& message);
  // Messages that have arrived. Never blocks. Throws TransportException, once, if sending has
  // failed here (not on the way) kMaxFailures times and never worked in between.
  std::vector<ControlMessage> receive();

  static constexpr uint32_t kMaxFailures = 32;

 private:
  static constexpr uint32_t kBuffers = 64;    // each way
  static constexpr size_t kHeaderBytes = 40;  // room for the routing header of what is received

  struct Buffer {
    uint8_t header[kHeaderBytes];
    ControlMessage message;
  };

  void post_all();
  void post_receive(uint32_t index);
  void restart(ibv_wc_status status);
  void close() noexcept;

  VerbsDevice& device_;
  ControlAddress address_;
  std::vector<Buffer> buffers_;  // received ones, then sent ones
  std::vector<uint32_t> free_;   // of those to send from
  ibv_mr* memory_ = nullptr;
  ibv_cq* queue_ = nullptr;
  ibv_qp* qp_ = nullptr;
  uint32_t failures_ = 0;  // of sends, since one has worked
};

// Random, for keys, cookies and packet numbers.
uint64_t random_word();

}  // namespace commlib
