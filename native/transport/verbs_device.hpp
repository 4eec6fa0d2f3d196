// One port of one RDMA device: context, protection domain, completion queue, queue pairs.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "transport/nic_select.hpp"
#include "transport/transport.hpp"
#include "transport/verbs_api.hpp"

namespace commlib {

// How a port is reached; travels in addresses and control messages.
struct VerbsPath {
  uint8_t gid[16] = {};
  uint16_t lid = 0;  // InfiniBand only
  uint8_t is_ethernet = 0;
  uint8_t mtu = 0;  // enum ibv_mtu
};

// What the two ends of a reliable connection need of each other.
struct VerbsEnd {
  VerbsPath path;
  uint32_t qp_number = 0;
  uint32_t packet_number = 0;  // of the first packet it sends
};

// Throws RegistrationException where the limit on locked memory explains that so many bytes cannot
// be registered, else TransportException. `what` is the subject of the message.
[[noreturn]] void throw_unregistered(const std::string& what, int code, size_t needed);

class VerbsDevice {
 public:
  VerbsDevice(const VerbsApi& api, const NicChoice& choice, const TransportOptions& options);
  ~VerbsDevice();
  VerbsDevice(const VerbsDevice&) = delete;
  VerbsDevice& operator=(const VerbsDevice&) = delete;

  const NicChoice& choice() const { return choice_; }
  const VerbsPath& path() const { return path_; }
  size_t max_message_bytes() const { return max_message_bytes_; }
  ibv_pd* domain() const { return domain_; }
  ibv_cq* queue() const { return queue_; }  // of all reliable connections

  // Null with errno set on failure. `access` without IBV_ACCESS_RELAXED_ORDERING is strict.
  ibv_mr* register_memory(void* base, size_t bytes, int access) const;
  ibv_mr* register_dmabuf(int fd, uint64_t offset, void* base, size_t bytes, int access) const;
  void deregister(ibv_mr* region) const;

  // In state INIT. Takes room for its completions from the queue; destroy_qp gives it back.
  ibv_qp* create_connection(uint32_t send_operations, uint32_t receives);
  // Unreliable datagrams, ready to send; completions go to `queue`.
  ibv_qp* create_datagram_qp(ibv_cq* queue, uint32_t depth, uint32_t key) const;
  // After an error: ready to send again, under its old number; what was posted is forgotten.
  void restart_datagram_qp(ibv_qp* qp, uint32_t key) const;
  void destroy_connection(ibv_qp* qp, uint32_t send_operations, uint32_t receives);
  void destroy_datagram_qp(ibv_qp* qp) const { api_.destroy_qp(qp); }
  // RESET -> RTR: the QP can receive from the other end.
  void make_ready_to_receive(ibv_qp* qp, const VerbsEnd& other) const;
  // RTR -> RTS: it can send as well.
  void make_ready_to_send(ibv_qp* qp, uint32_t packet_number) const;

  ibv_cq* create_queue(uint32_t entries) const;
  void destroy_queue(ibv_cq* queue) const { api_.destroy_cq(queue); }
  ibv_ah* create_route(const VerbsPath& to) const;
  void destroy_route(ibv_ah* route) const { api_.destroy_ah(route); }

  // The next asynchronous event, acknowledged; never blocks.
  struct Event {
    ibv_event_type type;
    const ibv_qp* qp;  // null: of no queue pair; may be destroyed by now
  };
  std::optional<Event> next_event() const;

  const VerbsApi& api() const { return api_; }

 private:
  void open();
  void query_port();
  void make_events_nonblocking() const;
  void start_datagram_qp(ibv_qp* qp, uint32_t key) const;
  void reserve(uint32_t entries);
  void close() noexcept;
  ibv_ah_attr route_to(const VerbsPath& to) const;
  void modify(ibv_qp* qp, ibv_qp_attr& attributes, int mask, const char* state) const;
  [[noreturn]] void fail(const char* call, int code) const;

  const VerbsApi& api_;
  NicChoice choice_;
  TransportOptions options_;
  ibv_context* context_ = nullptr;
  ibv_pd* domain_ = nullptr;
  ibv_cq* queue_ = nullptr;
  VerbsPath path_;
  size_t max_message_bytes_ = 0;
  int max_queue_entries_ = 0;
  uint32_t reserved_ = 0;  // completions that can be outstanding at once
};

}  // namespace commlib
