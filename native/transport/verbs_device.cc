#include "transport/verbs_device.hpp"

#include <fcntl.h>
#include <sys/resource.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

namespace commlib {
namespace {

constexpr uint32_t kFirstQueueEntries = 512;
constexpr uint32_t kSignalBytes = 8;
constexpr uint8_t kHopLimit = 64;
// Before a peer is asked again after "receiver not ready": code 12 is 0.64 ms.
constexpr uint8_t kMinRnrTimer = 12;

int bytes_of(ibv_mtu mtu) { return 128 << int(mtu); }

ibv_mtu largest_mtu(int bytes) {
  int mtu = IBV_MTU_256;
  while (mtu < IBV_MTU_4096 && bytes_of(ibv_mtu(mtu + 1)) <= bytes) ++mtu;
  return ibv_mtu(mtu);
}

}  // namespace

void throw_unregistered(const std::string& what, int code, size_t needed) {
  rlimit limit{};
  const bool is_limited = getrlimit(RLIMIT_MEMLOCK, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY;
  const bool is_over = is_limited && needed > limit.rlim_cur;
  const std::string message = what + ": ibv_reg_mr: " + std::strerror(code);
  if (code != ENOMEM && code != EPERM && !is_over)
    throw TransportException("ibv_reg_mr", code, -1, message);
  throw RegistrationException(
      needed, is_limited ? limit.rlim_cur : 0,
      message + "; locked memory limit is " +
          (is_limited ? std::to_string(limit.rlim_cur) + " bytes" : "unlimited") +
          ". Raise it (ulimit -l unlimited, docker run --ulimit memlock=-1) or choose a smaller "
          "ring_bytes");
}

VerbsDevice::VerbsDevice(const VerbsApi& api, const NicChoice& choice,
                         const TransportOptions& options)
    : api_(api), choice_(choice), options_(options) {
  try {
    open();
    query_port();
    make_events_nonblocking();
    domain_ = api_.alloc_pd(context_);
    if (domain_ == nullptr) fail("ibv_alloc_pd", errno);
    queue_ = create_queue(kFirstQueueEntries);
  } catch (...) {
    close();
    throw;
  }
}

VerbsDevice::~VerbsDevice() { close(); }

void VerbsDevice::close() noexcept {
  if (queue_ != nullptr) api_.destroy_cq(queue_);
  if (domain_ != nullptr) api_.dealloc_pd(domain_);
  if (context_ != nullptr) api_.close_device(context_);
  queue_ = nullptr;
  domain_ = nullptr;
  context_ = nullptr;
}

void VerbsDevice::fail(const char* call, int code) const {
  throw TransportException(call, code, -1,
                           choice_.device + ": " + call + ": " + std::strerror(code));
}

void VerbsDevice::open() {
  int count = 0;
  ibv_device** list = api_.get_device_list(&count);
  if (list == nullptr) fail("ibv_get_device_list", errno);
  int code = ENODEV;
  for (int i = 0; i < count; ++i) {
    if (choice_.device != api_.get_device_name(list[i])) continue;
    context_ = api_.open_device(list[i]);
    code = errno;
  }
  api_.free_device_list(list);
  if (context_ == nullptr) fail("ibv_open_device", code);
}

void VerbsDevice::query_port() {
  ibv_device_attr device{};
  if (const int code = api_.query_device(context_, &device); code != 0)
    fail("ibv_query_device", code);
  max_queue_entries_ = device.max_cqe;
  ibv_port_attr port{};
  const uint8_t number = uint8_t(choice_.port);
  // The exported function fills the part of the structure that all releases know.
  if (const int code =
          api_.query_port(context_, number, reinterpret_cast<_compat_ibv_port_attr*>(&port));
      code != 0)
    fail("ibv_query_port", code);
  max_message_bytes_ = port.max_msg_sz;
  path_.lid = port.lid;
  path_.is_ethernet = port.link_layer == IBV_LINK_LAYER_ETHERNET;
  path_.mtu = uint8_t(port.active_mtu);
  if (options_.mtu > 0) path_.mtu = std::min(path_.mtu, uint8_t(largest_mtu(options_.mtu)));
  ibv_gid gid{};
  if (api_.query_gid(context_, number, choice_.gid_index, &gid) != 0) fail("ibv_query_gid", errno);
  std::memcpy(path_.gid, gid.raw, sizeof path_.gid);
}

void VerbsDevice::make_events_nonblocking() const {
  const int flags = fcntl(context_->async_fd, F_GETFL);
  if (flags < 0 || fcntl(context_->async_fd, F_SETFL, flags | O_NONBLOCK) < 0)
    fail("fcntl(async_fd)", errno);
}

ibv_mr* VerbsDevice::register_memory(void* base, size_t bytes, int access) const {
  // Only the newer call passes on optional flags, and drops those that the device does not know.
  if ((access & IBV_ACCESS_RELAXED_ORDERING) != 0 && api_.reg_mr_iova2 != nullptr)
    return api_.reg_mr_iova2(domain_, base, bytes, reinterpret_cast<uintptr_t>(base),
                             unsigned(access));
  return api_.reg_mr(domain_, base, bytes, access & ~IBV_ACCESS_RELAXED_ORDERING);
}

ibv_mr* VerbsDevice::register_dmabuf(int fd, uint64_t offset, void* base, size_t bytes,
                                     int access) const {
  errno = EOPNOTSUPP;
  if (api_.reg_dmabuf_mr == nullptr) return nullptr;
  return api_.reg_dmabuf_mr(domain_, offset, bytes, reinterpret_cast<uintptr_t>(base), fd, access);
}

void VerbsDevice::deregister(ibv_mr* region) const { api_.dereg_mr(region); }

ibv_cq* VerbsDevice::create_queue(uint32_t entries) const {
  ibv_cq* queue = api_.create_cq(context_, int(entries), nullptr, nullptr, 0);
  if (queue == nullptr) fail("ibv_create_cq", errno);
  return queue;
}

// A completion that finds no room is a fatal error of the queue, so there is always room for all.
void VerbsDevice::reserve(uint32_t entries) {
  const uint32_t needed = reserved_ + entries;
  if (needed > uint32_t(queue_->cqe)) {
    const uint32_t wanted =
        std::max(needed, std::min(2 * uint32_t(queue_->cqe), uint32_t(max_queue_entries_)));
    if (const int code = api_.resize_cq(queue_, int(wanted)); code != 0)
      fail("ibv_resize_cq", code);
  }
  reserved_ = needed;
}

ibv_qp* VerbsDevice::create_connection(uint32_t send_operations, uint32_t receives) {
  reserve(send_operations + receives);
  ibv_qp_init_attr init{};
  init.qp_type = IBV_QPT_RC;
  init.send_cq = queue_;
  init.recv_cq = queue_;
  init.cap.max_send_wr = std::max(send_operations, 1u);
  init.cap.max_recv_wr = std::max(receives, 1u);
  init.cap.max_send_sge = 1;
  init.cap.max_recv_sge = 1;
  init.cap.max_inline_data = kSignalBytes;
  ibv_qp* qp = api_.create_qp(domain_, &init);
  if (qp == nullptr) {
    reserved_ -= send_operations + receives;
    fail("ibv_create_qp", errno);
  }
  ibv_qp_attr attributes{};
  attributes.qp_state = IBV_QPS_INIT;
  attributes.port_num = uint8_t(choice_.port);
  attributes.qp_access_flags = IBV_ACCESS_REMOTE_WRITE;
  try {
    modify(qp, attributes, IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS,
           "INIT");
  } catch (...) {
    destroy_connection(qp, send_operations, receives);
    throw;
  }
  return qp;
}

void VerbsDevice::destroy_connection(ibv_qp* qp, uint32_t send_operations, uint32_t receives) {
  api_.destroy_qp(qp);
  reserved_ -= send_operations + receives;
}

ibv_qp* VerbsDevice::create_datagram_qp(ibv_cq* queue, uint32_t depth, uint32_t key) const {
  ibv_qp_init_attr init{};
  init.qp_type = IBV_QPT_UD;
  init.send_cq = queue;
  init.recv_cq = queue;
  init.cap.max_send_wr = depth;
  init.cap.max_recv_wr = depth;
  init.cap.max_send_sge = 1;
  init.cap.max_recv_sge = 1;
  ibv_qp* qp = api_.create_qp(domain_, &init);
  if (qp == nullptr) fail("ibv_create_qp", errno);
  try {
    start_datagram_qp(qp, key);
  } catch (...) {
    api_.destroy_qp(qp);
    throw;
  }
  return qp;
}

// RESET -> RTS.
void VerbsDevice::start_datagram_qp(ibv_qp* qp, uint32_t key) const {
  ibv_qp_attr attributes{};
  attributes.qp_state = IBV_QPS_INIT;
  attributes.port_num = uint8_t(choice_.port);
  attributes.qkey = key;
  modify(qp, attributes, IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_QKEY, "INIT");
  attributes.qp_state = IBV_QPS_RTR;
  modify(qp, attributes, IBV_QP_STATE, "RTR");
  attributes.qp_state = IBV_QPS_RTS;
  modify(qp, attributes, IBV_QP_STATE | IBV_QP_SQ_PSN, "RTS");
}

void VerbsDevice::restart_datagram_qp(ibv_qp* qp, uint32_t key) const {
  ibv_qp_attr attributes{};
  attributes.qp_state = IBV_QPS_RESET;
  modify(qp, attributes, IBV_QP_STATE, "RESET");
  start_datagram_qp(qp, key);
}

ibv_ah_attr VerbsDevice::route_to(const VerbsPath& to) const {
  ibv_ah_attr route{};
  route.port_num = uint8_t(choice_.port);
  route.sl = uint8_t(options_.service_level);
  route.dlid = to.lid;
  // InfiniBand within one subnet goes by LID alone; another subnet prefix needs the GID.
  route.is_global = to.is_ethernet || std::memcmp(to.gid, path_.gid, 8) != 0;
  if (!route.is_global) return route;
  std::memcpy(route.grh.dgid.raw, to.gid, sizeof to.gid);
  route.grh.sgid_index = uint8_t(choice_.gid_index);
  route.grh.hop_limit = kHopLimit;
  route.grh.traffic_class = uint8_t(options_.traffic_class);
  return route;
}

ibv_ah* VerbsDevice::create_route(const VerbsPath& to) const {
  ibv_ah_attr attributes = route_to(to);
  ibv_ah* route = api_.create_ah(domain_, &attributes);
  if (route == nullptr) fail("ibv_create_ah", errno);
  return route;
}

void VerbsDevice::modify(ibv_qp* qp, ibv_qp_attr& attributes, int mask, const char* state) const {
  if (const int code = api_.modify_qp(qp, &attributes, mask); code != 0)
    fail((std::string("ibv_modify_qp to ") + state).c_str(), code);
}

void VerbsDevice::make_ready_to_receive(ibv_qp* qp, const VerbsEnd& other) const {
  ibv_qp_attr attributes{};
  attributes.qp_state = IBV_QPS_RTR;
  attributes.path_mtu = ibv_mtu(std::min(path_.mtu, other.path.mtu));
  attributes.dest_qp_num = other.qp_number;
  attributes.rq_psn = other.packet_number;
  attributes.max_dest_rd_atomic = 1;
  attributes.min_rnr_timer = kMinRnrTimer;
  attributes.ah_attr = route_to(other.path);
  modify(qp, attributes,
         IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN |
             IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER,
         "RTR");
}

void VerbsDevice::make_ready_to_send(ibv_qp* qp, uint32_t packet_number) const {
  ibv_qp_attr attributes{};
  attributes.qp_state = IBV_QPS_RTS;
  attributes.timeout = uint8_t(options_.ack_timeout);
  attributes.retry_cnt = uint8_t(options_.retry_count);
  attributes.rnr_retry = uint8_t(options_.rnr_retry_count);
  attributes.sq_psn = packet_number;
  attributes.max_rd_atomic = 1;
  modify(qp, attributes,
         IBV_QP_STATE | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY | IBV_QP_SQ_PSN |
             IBV_QP_MAX_QP_RD_ATOMIC,
         "RTS");
}

std::optional<VerbsDevice::Event> VerbsDevice::next_event() const {
  ibv_async_event raw{};
  if (api_.get_async_event(context_, &raw) != 0) return std::nullopt;
  Event event{raw.event_type, nullptr};
  switch (raw.event_type) {
    case IBV_EVENT_QP_FATAL:
    case IBV_EVENT_QP_REQ_ERR:
    case IBV_EVENT_QP_ACCESS_ERR:
    case IBV_EVENT_QP_LAST_WQE_REACHED:
    case IBV_EVENT_COMM_EST:
    case IBV_EVENT_SQ_DRAINED:
    case IBV_EVENT_PATH_MIG:
    case IBV_EVENT_PATH_MIG_ERR:
      event.qp = raw.element.qp;
      break;
    default:
      break;
  }
  // At once: destroying what an event speaks of waits for this.
  api_.ack_async_event(&raw);
  return event;
}

}  // namespace commlib
