// UCX provider: configuration, registration, addresses, connections.
#include <dlfcn.h>
#include <sys/resource.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <sstream>

#include "transport/providers.hpp"
#include "transport/ucx.hpp"

namespace commlib {
namespace {

constexpr uint32_t make_version(uint32_t major, uint32_t minor) { return major << 16 | minor; }

// Tested with 1.20.1 and 1.22.0. On 1.13.1 the data path works, but when a peer dies during a put
// over TCP an assertion inside UCX 1.13.1 aborts the process.
//
// The API asked for. UCX warns if it is newer than the library, so an older one gets its own.
constexpr uint32_t kApi = make_version(1, 17);
// First release line with FENCE_MODE=ep_based, and where ucp_config_modify reaches TCP settings.
constexpr uint32_t kModern = make_version(1, 20);

// No setting of UCX is changed but the fence mode and which transports it may use (ucx_lanes.cc).
// TCP_USER_TIMEOUT and shorter TCP_KEEP* in particular stay as they are: with a user time-out the
// kernel also kills a connection whose receiver answers but keeps its window closed, which is what
// a stopped or slow peer under traffic looks like. Silence is the heartbeat's business, and its
// time-out must not be undercut here.

// Followed by the worker address and the packed remote key.
struct AddressHeader {
  uint32_t magic;
  uint32_t version;  // major << 16 | minor of the loaded UCX
  uint64_t base;
  uint64_t bytes;
  uint32_t worker_bytes;
  uint32_t rkey_bytes;
};
constexpr uint32_t kAddressMagic = 0x75637031;

bool is_set_by_user(const char* name) {
  return std::getenv((std::string("UCX_") + name).c_str()) != nullptr;
}

uint32_t loaded_version() {
  unsigned major = 0, minor = 0, release = 0;
  ucp_get_version(&major, &minor, &release);
  return make_version(major, minor);
}

std::string format_version(uint32_t version) {
  return std::to_string(version >> 16) + "." + std::to_string(version & 0xffff);
}

std::string library_path() {
  Dl_info info{};
  const bool found = dladdr(reinterpret_cast<void*>(&ucp_get_version_string), &info) != 0;
  return found && info.dli_fname != nullptr ? info.dli_fname : "unknown path";
}

}  // namespace

UcxTransport::UcxTransport(PutListener* listener, int rank) : ProviderBase(listener, rank) {
  try {
    create_context();
    create_worker();
  } catch (...) {
    release_handles();
    throw;
  }
}

UcxTransport::~UcxTransport() { shutdown(0.0); }

void UcxTransport::throw_setup(const char* call, ucs_status_t status, int peer,
                               const std::string& what) const {
  std::string message = "rank " + std::to_string(rank()) + ": " + what + ": " + call + ": " +
                        ucs_status_string(status);
  throw TransportException(call, status, peer, message);
}

UcxTransport::FenceMode UcxTransport::configure(ucp_config_t* config) const {
  if (is_set_by_user("FENCE_MODE")) return FenceMode::kEndpoint;
  if (loaded_version() < kModern) return FenceMode::kFlush;
  const ucs_status_t status = ucp_config_modify(config, "FENCE_MODE", "ep_based");
  return status == UCS_OK ? FenceMode::kEndpoint : FenceMode::kFlush;
}

void UcxTransport::create_context() {
  ucp_config_t* config = nullptr;
  ucs_status_t status = ucp_config_read(nullptr, nullptr, &config);
  if (status != UCS_OK) throw_setup("ucp_config_read", status, -1, "UCX configuration");
  fence_mode_ = configure(config);
  status = exclude_single_copy(config);
  if (status != UCS_OK) {
    ucp_config_release(config);
    throw_setup("ucp_config_modify", status, -1, "UCX transports");
  }
  ucp_params_t params{};
  params.field_mask = UCP_PARAM_FIELD_FEATURES;
  params.features = UCP_FEATURE_RMA;
  const uint32_t api = std::min(kApi, loaded_version());
  status = ucp_init_version(api >> 16, api & 0xffff, &params, config, &context_);
  ucp_config_release(config);
  if (status != UCS_OK) {
    context_ = nullptr;
    throw_setup("ucp_init_version", status, -1, "UCX " + format_version(loaded_version()));
  }
}

void UcxTransport::create_worker() {
  ucp_worker_params_t params{};
  params.field_mask = UCP_WORKER_PARAM_FIELD_THREAD_MODE;
  params.thread_mode = UCS_THREAD_MODE_SERIALIZED;
  const ucs_status_t status = ucp_worker_create(context_, &params, &worker_);
  if (status != UCS_OK) {
    worker_ = nullptr;
    throw_setup("ucp_worker_create", status, -1, "UCX worker");
  }
}

void UcxTransport::register_region(void* base, size_t bytes) {
  if (memory_ != nullptr || base == nullptr || bytes == 0) {
    throw_setup("register_region", UCS_ERR_INVALID_PARAM, -1,
                "one non-empty region is registered, once");
  }
  ucp_mem_map_params_t params{};
  params.field_mask = UCP_MEM_MAP_PARAM_FIELD_ADDRESS | UCP_MEM_MAP_PARAM_FIELD_LENGTH;
  params.address = base;
  params.length = bytes;
  const ucs_status_t status = ucp_mem_map(context_, &params, &memory_);
  if (status != UCS_OK) {
    memory_ = nullptr;
    throw_registration(status, bytes);
  }
  base_ = static_cast<std::byte*>(base);
  bytes_ = bytes;
}

// UCX passes on what the driver said, often only "Input/output error"; so the limit is looked up.
void UcxTransport::throw_registration(ucs_status_t status, size_t bytes) const {
  rlimit limit{};
  const bool is_limited = getrlimit(RLIMIT_MEMLOCK, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY;
  const bool is_over_limit = is_limited && bytes > limit.rlim_cur;
  if (status != UCS_ERR_NO_MEMORY && !is_over_limit) {
    throw_setup("ucp_mem_map", status, -1,
                "registering " + std::to_string(bytes) + " bytes failed");
  }
  std::ostringstream message;
  message << "rank " << rank() << ": cannot register " << bytes
          << " bytes: ucp_mem_map: " << ucs_status_string(status) << "; locked memory limit is ";
  if (is_limited) {
    message << limit.rlim_cur << " bytes";
  } else {
    message << "unlimited";
  }
  message << ". Raise it (ulimit -l unlimited, docker run --ulimit memlock=-1) or choose a "
             "smaller ring_bytes";
  throw RegistrationException(bytes, is_limited ? limit.rlim_cur : 0, message.str());
}

std::vector<uint8_t> UcxTransport::address() const {
  if (memory_ == nullptr) {
    throw_setup("address", UCS_ERR_INVALID_PARAM, -1, "no region is registered");
  }
  ucp_address_t* worker_address = nullptr;
  size_t worker_bytes = 0;
  ucs_status_t status = ucp_worker_get_address(worker_, &worker_address, &worker_bytes);
  if (status != UCS_OK) throw_setup("ucp_worker_get_address", status, -1, "own address");
  void* rkey = nullptr;
  size_t rkey_bytes = 0;
  status = ucp_rkey_pack(context_, memory_, &rkey, &rkey_bytes);
  if (status != UCS_OK) {
    ucp_worker_release_address(worker_, worker_address);
    throw_setup("ucp_rkey_pack", status, -1, "own remote key");
  }
  const AddressHeader header{kAddressMagic,
                             loaded_version(),
                             reinterpret_cast<uint64_t>(base_),
                             bytes_,
                             static_cast<uint32_t>(worker_bytes),
                             static_cast<uint32_t>(rkey_bytes)};
  std::vector<uint8_t> blob(sizeof(header) + worker_bytes + rkey_bytes);
  std::memcpy(blob.data(), &header, sizeof(header));
  std::memcpy(blob.data() + sizeof(header), worker_address, worker_bytes);
  std::memcpy(blob.data() + sizeof(header) + worker_bytes, rkey, rkey_bytes);
  ucp_rkey_buffer_release(rkey);
  ucp_worker_release_address(worker_, worker_address);
  return blob;
}

// Creates the endpoint and the remote key of peer.rank.
void UcxTransport::unpack_address(Peer& peer, const std::vector<uint8_t>& address) const {
  const std::string who = "connecting to rank " + std::to_string(peer.rank);
  AddressHeader header{};
  if (address.size() >= sizeof(header)) std::memcpy(&header, address.data(), sizeof(header));
  if (header.magic != kAddressMagic ||
      address.size() != sizeof(header) + header.worker_bytes + header.rkey_bytes) {
    throw_setup("connect", UCS_ERR_INVALID_ADDR, peer.rank, who + ", malformed address");
  }
  if (header.version != loaded_version()) {  // worker addresses differ between versions
    throw_setup("connect", UCS_ERR_UNSUPPORTED, peer.rank,
                who + ", it runs UCX " + format_version(header.version) + ", this rank " +
                    format_version(loaded_version()) + " (" + library_path() + ")");
  }
  peer.remote_base = header.base;
  peer.remote_bytes = header.bytes;
  const uint8_t* worker_address = address.data() + sizeof(header);
  ucp_ep_params_t params{};
  params.field_mask = UCP_EP_PARAM_FIELD_REMOTE_ADDRESS | UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE |
                      UCP_EP_PARAM_FIELD_ERR_HANDLER;
  params.address = reinterpret_cast<const ucp_address_t*>(worker_address);
  // Without peer error handling. With it a put over TCP is emulated, the receiver answers each, and
  // UCX 1.22 ends the process when it answers a peer that has died ("ucp_request.inl: Fatal:
  // unexpected error: Endpoint timeout"). Without it a put over TCP is TCP's own; a broken
  // connection still fails what is outstanding and calls the handler, and a peer that dies without
  // a trace is found by the heartbeat.
  params.err_mode = UCP_ERR_HANDLING_MODE_NONE;
  params.err_handler.cb = &UcxTransport::on_endpoint_error;
  params.err_handler.arg = &peer;
  ucs_status_t status = ucp_ep_create(worker_, &params, &peer.ep);
  if (status != UCS_OK) {
    peer.ep = nullptr;
    throw_setup("ucp_ep_create", status, peer.rank, who);
  }
  refuse_single_copy(peer);
  status = ucp_ep_rkey_unpack(peer.ep, worker_address + header.worker_bytes, &peer.rkey);
  if (status != UCS_OK) {
    peer.rkey = nullptr;
    throw_setup("ucp_ep_rkey_unpack", status, peer.rank, who);
  }
}

void UcxTransport::connect(int peer, const std::vector<uint8_t>& address) {
  const size_t index = static_cast<size_t>(peer);
  if (peer < 0 || (index < peers_.size() && peers_[index] != nullptr) || is_shut_down_) {
    throw_setup("connect", UCS_ERR_INVALID_PARAM, peer,
                "rank " + std::to_string(peer) + " cannot be connected (again)");
  }
  if (index >= peers_.size()) peers_.resize(index + 1);
  // Listed before anything can fail: the error handler points at it, shutdown closes it.
  peers_[index] = std::make_unique<Peer>();
  Peer& entry = *peers_[index];
  entry.owner = this;
  entry.rank = peer;
  try {
    unpack_address(entry, address);
  } catch (...) {
    entry.failed = true;
    throw;
  }
}

std::string UcxTransport::describe() const {
  std::ostringstream text;
  text << "ucx " << ucp_get_version_string() << " (" << library_path() << "), fence by "
       << (fence_mode_ == FenceMode::kEndpoint ? "endpoint" : "flush");
  if (is_set_by_user("FENCE_MODE")) text << ", UCX_FENCE_MODE set by the user";
  for (const auto& peer : peers_) {
    if (peer != nullptr) text << ", " << describe_peer(*peer);
  }
  return text.str();
}

// Endpoints go with the worker, and so does what is outstanding to peers that do not answer. It is
// purged there, which reads the handle of the memory once more: the worker goes before the memory.
void UcxTransport::release_handles() noexcept {
  for (const auto& peer : peers_) {
    if (peer != nullptr && peer->rkey != nullptr) ucp_rkey_destroy(peer->rkey);
    if (peer != nullptr) peer->rkey = nullptr;
  }
  if (worker_ != nullptr) ucp_worker_destroy(worker_);
  if (memory_ != nullptr) ucp_mem_unmap(context_, memory_);
  if (context_ != nullptr) ucp_cleanup(context_);
  memory_ = nullptr;
  worker_ = nullptr;
  context_ = nullptr;
}

std::unique_ptr<Transport> make_ucx(PutListener* listener, int rank) {
  return std::make_unique<UcxTransport>(listener, rank);
}

}  // namespace commlib
