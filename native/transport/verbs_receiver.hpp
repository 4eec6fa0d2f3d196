// The receiving end of one reliable connection. With signals by immediate it also stores them.
#pragma once

#include <optional>
#include <vector>

#include "transport/verbs_control.hpp"
#include "transport/verbs_sender.hpp"

namespace commlib {

class VerbsReceiver {
 public:
  // Ready for the sender that `request` tells of. Receives are numbered `id`. Throws
  // TransportException.
  VerbsReceiver(VerbsDevice& device, const ControlMessage& request, uint64_t id);
  ~VerbsReceiver();
  VerbsReceiver(const VerbsReceiver&) = delete;
  VerbsReceiver& operator=(const VerbsReceiver&) = delete;

  int peer() const { return request_.from; }
  bool is_for(const ControlMessage& request) const {
    return request.from == request_.from && request.cookie == request_.cookie;
  }
  const ibv_qp* qp() const { return qp_; }
  // Sends the acceptance; again if asked again.
  void accept(ControlPort& control, int own_rank) const;

  struct Signal {
    size_t offset;
    uint64_t value;
  };
  // The next signal, whose immediate has arrived; makes room for another. An error code in
  // `failure` if there can be none any more.
  Signal take_signal(uint32_t immediate, int* failure);

 private:
  int post_receives(uint32_t count);
  void close() noexcept;

  VerbsDevice& device_;
  ControlMessage request_;
  uint64_t id_;
  ibv_qp* qp_ = nullptr;
  ibv_ah* route_ = nullptr;
  std::vector<uint64_t> mailbox_;
  ibv_mr* memory_ = nullptr;
  uint64_t num_signals_ = 0;
};

}  // namespace commlib
