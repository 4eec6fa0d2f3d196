// UCX provider: posting, completion, failure, shutdown. Proxy thread only.
#include "transport/ucx.hpp"

#include <algorithm>
#include <thread>

namespace commlib {
namespace {

constexpr int kDrainRounds = 64;

}  // namespace

// ---------------------------------------------------------------------------------- posting

// Null if commands to this peer cannot be carried out any more.
UcxTransport::Peer* UcxTransport::find_peer(int peer, const char* call) {
  if (is_shut_down_) return nullptr;
  const size_t index = static_cast<size_t>(peer);
  if (peer < 0 || index >= peers_.size() || peers_[index] == nullptr) {
    add_fault(peer, UCS_ERR_NOT_CONNECTED, call,
              "rank " + std::to_string(peer) + " is not connected");
    return nullptr;
  }
  return peers_[index]->failed ? nullptr : peers_[index].get();
}

void UcxTransport::put(int peer, size_t local_offset, size_t remote_offset, size_t bytes,
                       uint64_t token) {
  Peer* entry = find_peer(peer, "put");
  if (entry == nullptr) return complete_later(token);
  const bool is_local_inside = memory_.find(local_offset, bytes).has_value();
  if (is_local_inside && entry->memory.find(remote_offset, bytes)) {
    return submit(*entry, {CommandKind::kPut, local_offset, remote_offset, bytes, token});
  }
  // Emulated puts are not checked at the receiver: this would overwrite foreign memory.
  complete_later(token);
  fail_peer(*entry, UCS_ERR_INVALID_PARAM, "put",
            is_local_inside ? "remote " + entry->memory.refusal(remote_offset, bytes)
                            : "local " + memory_.refusal(local_offset, bytes));
}

void UcxTransport::fence(int peer) {
  Peer* entry = find_peer(peer, "fence");
  if (entry == nullptr || !entry->posted_since_fence) return;
  const bool is_of_copies = entry->has_direct_copies && !entry->put_host_since_fence;
  entry->posted_since_fence = entry->put_host_since_fence = false;
  entry->signalled.clear();
  if (!is_of_copies) return submit(*entry, {CommandKind::kFence});
  submit(*entry, {CommandKind::kCopiesFence, 0, 0, 0, entry->copies.num_posted()});
}

void UcxTransport::put_signal(int peer, size_t remote_offset, uint64_t value) {
  Peer* entry = find_peer(peer, "put_signal");
  if (entry == nullptr) return;
  if (!entry->memory.find_word(remote_offset)) {
    return fail_peer(*entry, UCS_ERR_INVALID_PARAM, "put_signal",
                     entry->memory.word_refusal(remote_offset));
  }
  // The signals of one word keep their order.
  auto& signalled = entry->signalled;
  if (std::find(signalled.begin(), signalled.end(), remote_offset) != signalled.end()) fence(peer);
  signalled.push_back(remote_offset);
  submit(*entry, {CommandKind::kSignal, 0, remote_offset, sizeof(value), value});
}

void UcxTransport::submit(Peer& peer, const Command& command) {
  const bool is_put = command.kind == CommandKind::kPut;
  if (is_put || command.kind == CommandKind::kSignal) peer.posted_since_fence = true;
  if (is_put && !is_copy(peer, command)) peer.put_host_since_fence = true;
  if (is_put || (!peer.is_held() && peer.held.empty())) return execute(peer, command);
  peer.held.push_back(command);
  ++held_;
}

// Between device regions.
bool UcxTransport::is_copy(const Peer& peer, const Command& command) const {
  return command.local_offset >= memory_.host_bytes() &&
         command.remote_offset >= peer.memory.host_bytes();
}

void UcxTransport::execute(Peer& peer, const Command& command) {
  switch (command.kind) {
    case CommandKind::kPut:
    case CommandKind::kSignal:
      return post(peer, command);
    case CommandKind::kCopiesFence:
      peer.awaited_copies = command.value;
      return;
    case CommandKind::kFence:
      if (fence_mode_ == FenceMode::kFlush) return start_flush(peer);
      if (const ucs_status_t status = ucp_worker_fence(worker_); status != UCS_OK) {
        fail_peer(peer, status, "ucp_worker_fence", ucs_status_string(status));
      }
  }
}

UcxTransport::Operation* UcxTransport::begin(Peer& peer, CommandKind kind, uint64_t value) {
  Operation* operation;
  if (free_.empty()) {
    operation = &operations_.emplace_back();
  } else {
    operation = free_.back();
    free_.pop_back();
  }
  *operation = {&peer, kind, value, std::nullopt};
  ++peer.outstanding;
  ++outstanding_;
  return operation;
}

void UcxTransport::post(Peer& peer, const Command& command) {
  Operation* operation = begin(peer, command.kind, command.value);
  ucp_request_param_t param{};
  param.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA;
  param.cb.send = &UcxTransport::on_operation;
  param.user_data = operation;
  const void* local = &operation->value;
  if (command.kind == CommandKind::kPut) {
    const auto from = *memory_.find(command.local_offset, command.bytes);
    param.op_attr_mask |= UCP_OP_ATTR_FIELD_MEMH;
    param.memh = from.key;
    local = reinterpret_cast<const void*>(from.address);
    if (is_copy(peer, command)) operation->copy = peer.copies.post();
  }
  const auto to = *peer.memory.find(command.remote_offset, command.bytes);
  track(operation, ucp_put_nbx(peer.ep, local, command.bytes, to.address, to.key, &param));
}

void UcxTransport::start_flush(Peer& peer) {
  Operation* operation = begin(peer, CommandKind::kFence, 0);
  peer.is_flushing = true;
  ucp_request_param_t param{};
  param.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA;
  param.cb.send = &UcxTransport::on_operation;
  param.user_data = operation;
  track(operation, ucp_ep_flush_nbx(peer.ep, &param));
}

// UCX reports through the callback only what it did not finish at once.
void UcxTransport::track(Operation* operation, ucs_status_ptr_t request) {
  if (request == nullptr) {
    finish(operation, UCS_OK);
  } else if (UCS_PTR_IS_ERR(request)) {
    finish(operation, UCS_PTR_STATUS(request));
  }
}

// ---------------------------------------------------------------------------------- completion

void UcxTransport::on_operation(void* request, ucs_status_t status, void* user_data) {
  auto* operation = static_cast<Operation*>(user_data);
  operation->peer->owner->finish(operation, status);
  ucp_request_free(request);
}

// Called once per operation: by track() or by the callback, never by both.
void UcxTransport::finish(Operation* operation, ucs_status_t status) {
  Peer& peer = *operation->peer;
  operation->peer = nullptr;
  --peer.outstanding;
  --outstanding_;
  if (operation->kind == CommandKind::kPut) complete_later(operation->value);
  if (operation->kind == CommandKind::kFence) peer.is_flushing = false;
  if (operation->copy) peer.copies.complete(*operation->copy);
  if (status != UCS_OK) {
    fail_peer(peer, status,
              operation->kind == CommandKind::kFence ? "ucp_ep_flush_nbx" : "ucp_put_nbx",
              ucs_status_string(status));
  }
  free_.push_back(operation);
}

// What is behind a fence that is done, up to the next one.
int UcxTransport::release_held() {
  if (held_ == 0) return 0;
  int released = 0;
  for (const auto& peer : peers_) {
    while (peer != nullptr && !peer->is_held() && !peer->failed && !peer->held.empty()) {
      const Command command = peer->held.front();
      peer->held.pop_front();
      --held_;
      ++released;
      execute(*peer, command);
    }
  }
  return released;
}

int UcxTransport::progress() {
  if (worker_ == nullptr) return report_completions();
  int events = static_cast<int>(ucp_worker_progress(worker_));
  events += release_held();
  return events + report_completions();
}

bool UcxTransport::idle() const { return is_drained() && !has_completions(); }

// ---------------------------------------------------------------------------------- failure

// Runs inside ucp_worker_progress or a post.
void UcxTransport::on_endpoint_error(void* user_data, ucp_ep_h, ucs_status_t status) {
  auto* peer = static_cast<Peer*>(user_data);
  peer->owner->fail_peer(*peer, status, "ucp endpoint error handler", ucs_status_string(status));
}

void UcxTransport::fail_peer(Peer& peer, int code, const std::string& call,
                             const std::string& message) {
  if (peer.failed) return;
  peer.failed = true;
  held_ -= peer.held.size();
  peer.held.clear();
  if (is_shut_down_) return;  // peers close too, in any order
  add_fault(peer.rank, code, call,
            "rank " + std::to_string(rank()) + " to rank " + std::to_string(peer.rank) + ": " +
                call + ": " + message);
}

// ---------------------------------------------------------------------------------- shutdown

bool UcxTransport::drain_until(Clock::time_point deadline) {
  while (!is_drained()) {
    if (Clock::now() >= deadline) return false;
    if (ucp_worker_progress(worker_) + release_held() == 0) std::this_thread::yield();
  }
  return true;
}

void UcxTransport::shutdown(double timeout_s) noexcept {
  if (is_shut_down_) return;
  is_shut_down_ = true;
  const auto timeout = std::chrono::duration<double>(timeout_s);
  const auto deadline = Clock::now() + std::chrono::duration_cast<Clock::duration>(timeout);
  // Reads first what peers have sent: UCX answers some of it, and would open a new connection to
  // a peer that has gone if it noticed its going before.
  for (int i = 0; i < kDrainRounds && ucp_worker_progress(worker_) != 0; ++i) {
  }
  // Everything posted has left our buffers, then everything has arrived at the peers.
  if (drain_until(deadline)) {
    for (const auto& peer : peers_) {
      if (peer != nullptr && !peer->failed) start_flush(*peer);
    }
    drain_until(deadline);
  }
  // After the death of a peer UCX may warn that requests were "not returned to mpool": they are
  // freed with the worker.
  release_handles();
  complete_leftovers();
  report_completions();
}

// What UCX has not reported. The worker is gone: nothing reads the buffers any more and no callback
// follows.
void UcxTransport::complete_leftovers() {
  for (const auto& peer : peers_) {
    if (peer != nullptr) peer->held.clear();
  }
  held_ = 0;
  for (Operation& operation : operations_) {
    if (operation.peer != nullptr) finish(&operation, UCS_OK);
  }
}

}  // namespace commlib
