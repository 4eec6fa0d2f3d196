#include "transport/verbs_control.hpp"

#include <cerrno>
#include <random>

namespace commlib {

uint64_t random_word() {
  std::random_device device;
  return uint64_t(device()) << 32 | device();
}

ControlPort::ControlPort(VerbsDevice& device) : device_(device), buffers_(2 * kBuffers) {
  try {
    memory_ = device_.register_memory(buffers_.data(), buffers_.size() * sizeof(Buffer),
                                      IBV_ACCESS_LOCAL_WRITE);
    if (memory_ == nullptr)
      throw_unregistered(device_.choice().device + ": cannot register control buffers", errno,
                         buffers_.size() * sizeof(Buffer));
    queue_ = device_.create_queue(2 * kBuffers);
    address_.path = device_.path();
    // A key with the highest bit set stands for "the key of the queue pair".
    address_.key = uint32_t(random_word()) & 0x7fffffff;
    qp_ = device_.create_datagram_qp(queue_, kBuffers, address_.key);
    address_.qp_number = qp_->qp_num;
    post_all();
  } catch (...) {
    close();
    throw;
  }
}

ControlPort::~ControlPort() { close(); }

void ControlPort::close() noexcept {
  if (qp_ != nullptr) device_.destroy_datagram_qp(qp_);
  if (queue_ != nullptr) device_.destroy_queue(queue_);
  if (memory_ != nullptr) device_.deregister(memory_);
  qp_ = nullptr;
  queue_ = nullptr;
  memory_ = nullptr;
}

void ControlPort::post_all() {
  free_.clear();
  for (uint32_t i = 0; i < kBuffers; ++i) {
    post_receive(i);
    free_.push_back(kBuffers + i);
  }
}

// A failure leaves one buffer less to receive with, and messages are sent again.
void ControlPort::post_receive(uint32_t index) {
  ibv_sge piece{reinterpret_cast<uint64_t>(&buffers_[index]), sizeof(Buffer), memory_->lkey};
  ibv_recv_wr request{};
  request.wr_id = index;
  request.sg_list = &piece;
  request.num_sge = 1;
  ibv_recv_wr* bad = nullptr;
  ibv_post_recv(qp_, &request, &bad);
}

void ControlPort::send(ibv_ah* route, const ControlAddress& to, const ControlMessage& message) {
  if (free_.empty()) return;
  const uint32_t index = free_.back();
  buffers_[index].message = message;
  ibv_sge piece{reinterpret_cast<uint64_t>(&buffers_[index].message), sizeof(ControlMessage),
                memory_->lkey};
  ibv_send_wr request{};
  request.wr_id = index;
  request.sg_list = &piece;
  request.num_sge = 1;
  request.opcode = IBV_WR_SEND;
  request.send_flags = IBV_SEND_SIGNALED;
  request.wr.ud.ah = route;
  request.wr.ud.remote_qpn = to.qp_number;
  request.wr.ud.remote_qkey = to.key;
  ibv_send_wr* bad = nullptr;
  if (ibv_post_send(qp_, &request, &bad) == 0) free_.pop_back();
}

std::vector<ControlMessage> ControlPort::receive() {
  std::vector<ControlMessage> messages;
  ibv_wc_status failure = IBV_WC_SUCCESS;
  ibv_wc done[16];
  const int count = ibv_poll_cq(queue_, 16, done);
  for (int i = 0; i < count; ++i) {
    const uint32_t index = uint32_t(done[i].wr_id);
    if (index >= kBuffers) {
      free_.push_back(index);
      if (done[i].status == IBV_WC_SUCCESS)
        failures_ = 0;
      else if (failure == IBV_WC_SUCCESS)
        failure = done[i].status;
      continue;
    }
    const ControlMessage& message = buffers_[index].message;
    if (done[i].status == IBV_WC_SUCCESS && done[i].byte_len == sizeof(Buffer) &&
        message.magic == ControlMessage::kMagic)
      messages.push_back(message);
    post_receive(index);
  }
  if (failure != IBV_WC_SUCCESS) restart(failure);
  return messages;
}

// A send that fails here stops the queue pair: what is sent on most cards (state SQE), all of it on
// soft-RoCE. It is set up anew; what was on its way is lost, as any datagram may be.
void ControlPort::restart(ibv_wc_status status) {
  device_.restart_datagram_qp(qp_, address_.key);
  ibv_wc forgotten[16];
  while (ibv_poll_cq(queue_, 16, forgotten) > 0) {
  }
  post_all();
  if (++failures_ == kMaxFailures)
    throw TransportException("send", status, -1,
                             device_.choice().text + ": messages to set up connections fail: " +
                                 device_.api().wc_status_str(status));
}

}  // namespace commlib
