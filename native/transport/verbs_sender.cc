#include "transport/verbs_sender.hpp"

#include <arpa/inet.h>

#include <algorithm>

#include "transport/verbs_control.hpp"

namespace commlib {

VerbsSender::VerbsSender(VerbsDevice& device, const TransportOptions& options,
                         const RegionMap<uint32_t>& source, uint64_t first_id)
    : device_(device), options_(options), source_(source), first_id_(first_id) {
  qp_ = device_.create_connection(options_.send_operations, 0);
  end_ = {device_.path(), qp_->qp_num, uint32_t(random_word()) & 0xffffff};
}

void VerbsSender::close() {
  if (qp_ != nullptr) device_.destroy_connection(qp_, options_.send_operations, 0);
  qp_ = nullptr;
  is_open_ = false;
}

void VerbsSender::open(const VerbsEnd& receiver, const VerbsTarget& target) {
  device_.make_ready_to_receive(qp_, receiver);
  device_.make_ready_to_send(qp_, end_.packet_number);
  target_ = target;
  is_open_ = true;
}

int VerbsSender::post() {
  while (is_open_ && fill_chain() > 0) {
    ibv_send_wr* bad = nullptr;
    if (const int code = ibv_post_send(qp_, requests_, &bad); code != 0) return code;
  }
  return 0;
}

// Takes commands from the held ones as far as the window has room. Returns the chain's length.
int VerbsSender::fill_chain() {
  int count = 0;
  size_t silent_bytes = 0;  // since the last request that reports its completion
  while (count < kMaxChain && !held_.empty() && posted_.size() < options_.send_operations) {
    const VerbsCommand& command = held_.front();
    const size_t bytes = std::min(command.bytes - part_done_, device_.max_message_bytes());
    if (bytes_in_flight_ > 0 && bytes_in_flight_ + bytes > options_.send_bytes) break;
    fill(count, command, bytes);
    silent_bytes += bytes;
    if (silent_bytes >= kCompletionBytes) {
      requests_[count].send_flags |= IBV_SEND_SIGNALED;
      silent_bytes = 0;
    }
    if (count > 0) requests_[count - 1].next = &requests_[count];
    ++count;
    bytes_in_flight_ += bytes;
    part_done_ += bytes;
    const bool is_last = part_done_ == command.bytes;
    posted_.push_back({bytes, is_last && !command.is_signal, command.value});
    if (!is_last) continue;
    part_done_ = 0;
    held_.pop_front();
  }
  // Also so that no request is left over whose completion nobody reports.
  if (count > 0) requests_[count - 1].send_flags |= IBV_SEND_SIGNALED;
  return count;
}

void VerbsSender::fill(int index, const VerbsCommand& command, size_t bytes) {
  ibv_send_wr& request = requests_[index];
  ibv_sge& piece = pieces_[index];
  request = {};
  request.wr_id = first_id_ | next_number_++;
  request.sg_list = &piece;
  request.num_sge = 1;
  request.opcode = IBV_WR_RDMA_WRITE;
  piece.length = uint32_t(bytes);
  const auto to = *target_.memory.find(command.remote_offset + part_done_, bytes);
  if (!command.is_signal) {
    const auto from = *source_.find(command.local_offset + part_done_, bytes);
    piece.addr = from.address;
    piece.lkey = from.key;
    request.wr.rdma = {to.address, to.key};
    return;
  }
  values_[index] = command.value;
  piece.addr = reinterpret_cast<uint64_t>(&values_[index]);
  request.send_flags = IBV_SEND_INLINE;
  request.wr.rdma = {to.address, target_.signal_key};
  if (target_.mailbox_address == 0) return;
  request.opcode = IBV_WR_RDMA_WRITE_WITH_IMM;
  request.imm_data = htonl(uint32_t(command.remote_offset / kWordBytes));
  request.wr.rdma = {target_.mailbox_address + num_signals_++ % kMailboxSlots * kWordBytes,
                     target_.mailbox_key};
}

void VerbsSender::complete(uint64_t id, std::vector<uint64_t>* tokens) {
  for (uint32_t left = uint32_t(id) - oldest_number_ + 1; left > 0 && !posted_.empty(); --left) {
    const Posted& posted = posted_.front();
    bytes_in_flight_ -= posted.bytes;
    if (posted.has_token) tokens->push_back(posted.token);
    posted_.pop_front();
    ++oldest_number_;
  }
}

void VerbsSender::abandon(std::vector<uint64_t>* tokens) {
  close();
  for (const Posted& posted : posted_)
    if (posted.has_token) tokens->push_back(posted.token);
  for (const VerbsCommand& command : held_)
    if (!command.is_signal) tokens->push_back(command.value);
  posted_.clear();
  held_.clear();
  part_done_ = 0;
  bytes_in_flight_ = 0;
}

}  // namespace commlib
