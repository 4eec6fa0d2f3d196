#include "transport/verbs_receiver.hpp"

#include <arpa/inet.h>

#include <cerrno>
#include <cstring>

namespace commlib {
namespace {

uint32_t receives_of(const ControlMessage& request) {
  return request.is_signal_by_immediate ? kMailboxReceives : 0;
}

}  // namespace

VerbsReceiver::VerbsReceiver(VerbsDevice& device, const ControlMessage& request, uint64_t id)
    : device_(device), request_(request), id_(id) {
  const uint32_t receives = receives_of(request);
  try {
    route_ = device_.create_route(request.reply_to.path);
    qp_ = device_.create_connection(0, receives);
    if (receives > 0) {
      mailbox_.resize(kMailboxSlots);
      // Strict: a value must be there when its immediate is reported.
      memory_ = device_.register_memory(mailbox_.data(), mailbox_.size() * kWordBytes,
                                        IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE);
      if (memory_ == nullptr)
        throw TransportException("ibv_reg_mr", errno, request.from, std::strerror(errno));
    }
    device_.make_ready_to_receive(qp_, request.end);
    if (const int code = post_receives(receives); code != 0)
      throw TransportException("ibv_post_recv", code, request.from, std::strerror(code));
  } catch (...) {
    close();
    throw;
  }
}

VerbsReceiver::~VerbsReceiver() { close(); }

void VerbsReceiver::close() noexcept {
  if (qp_ != nullptr) device_.destroy_connection(qp_, 0, receives_of(request_));
  if (memory_ != nullptr) device_.deregister(memory_);
  if (route_ != nullptr) device_.destroy_route(route_);
  qp_ = nullptr;
  memory_ = nullptr;
  route_ = nullptr;
}

int VerbsReceiver::post_receives(uint32_t count) {
  ibv_recv_wr request{};  // an immediate without data of its own
  request.wr_id = id_;
  int code = 0;
  for (uint32_t i = 0; i < count && code == 0; ++i) {
    ibv_recv_wr* bad = nullptr;
    code = ibv_post_recv(qp_, &request, &bad);
  }
  return code;
}

void VerbsReceiver::accept(ControlPort& control, int own_rank) const {
  ControlMessage answer;
  answer.kind = ControlKind::kAccept;
  answer.from = own_rank;
  answer.lane = request_.lane;
  answer.cookie = request_.cookie;
  answer.end = {device_.path(), qp_->qp_num, 0};  // it sends no packets of its own
  answer.reply_to = control.address();
  if (memory_ != nullptr) {
    answer.mailbox_address = reinterpret_cast<uint64_t>(mailbox_.data());
    answer.mailbox_key = memory_->rkey;
  }
  control.send(route_, request_.reply_to, answer);
}

VerbsReceiver::Signal VerbsReceiver::take_signal(uint32_t immediate, int* failure) {
  // Partner: the card, which reports the immediate after it has written the value.
  const uint64_t value =
      __atomic_load_n(&mailbox_[num_signals_++ % kMailboxSlots], __ATOMIC_ACQUIRE);
  *failure = post_receives(1);
  return {size_t(ntohl(immediate)) * kWordBytes, value};
}

}  // namespace commlib
