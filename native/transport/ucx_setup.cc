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
// The oldest that was seen to give copies between GPUs to cuda_ipc, see copies_are_direct().
constexpr uint32_t kCopiesSeen = make_version(1, 22);

// No setting of UCX is changed but the fence mode and which transports it may use (ucx_lanes.cc).
// TCP_USER_TIMEOUT and shorter TCP_KEEP* in particular stay as they are: with a user time-out the
// kernel also kills a connection whose receiver answers but keeps its window closed, which is what
// a stopped or slow peer under traffic looks like. Silence is the heartbeat's business, and its
// time-out must not be undercut here.

struct PackedRegion {
  uint64_t base;
  uint64_t bytes;
  uint64_t rkey_bytes;
};
// Followed by the worker address and the packed remote keys of the regions.
struct AddressHeader {
  uint32_t magic;
  uint32_t version;  // major << 16 | minor of the loaded UCX
  uint32_t worker_bytes;
  uint32_t num_regions;  // host, then device
  PackedRegion regions[2];
};
constexpr uint32_t kAddressMagic = 0x75637032;

size_t blob_bytes(const AddressHeader& header) {
  return sizeof(header) + header.worker_bytes + header.regions[0].rkey_bytes +
         header.regions[1].rkey_bytes;
}

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

UcxTransport::UcxTransport(PutListener* listener, int rank, const TransportOptions& options)
    : ProviderBase(listener, rank), has_device_region_(options.has_device_region) {
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
  status = exclude_transports(config);
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
  if (!memory_.is_empty() || base == nullptr || bytes == 0) {
    throw_setup("register_region", UCS_ERR_INVALID_PARAM, -1,
                "one non-empty region is registered, once");
  }
  map_memory(base, bytes);
  // A way by which peers write on by themselves may be open, for the device region alone.
  if (has_device_region_ && type_of(memory_.parts()[0].key) != UCS_MEMORY_TYPE_HOST)
    throw_setup("register_region", UCS_ERR_INVALID_PARAM, -1, "the region is not host memory");
}

void UcxTransport::register_device_region(const DeviceRegion& region) {
  if (memory_.is_empty() || memory_.has_device() || !has_device_region_ || region.base == nullptr ||
      region.bytes == 0) {
    throw_setup("register_device_region", UCS_ERR_INVALID_PARAM, -1,
                "one non-empty region is registered, once, after that of host memory, and "
                "announced in the options");
  }
  map_memory(region.base, region.bytes);
  fence_mode_ = FenceMode::kFlush;
}

void UcxTransport::map_memory(void* base, size_t bytes) {
  ucp_mem_map_params_t params{};
  params.field_mask = UCP_MEM_MAP_PARAM_FIELD_ADDRESS | UCP_MEM_MAP_PARAM_FIELD_LENGTH;
  params.address = base;
  params.length = bytes;
  ucp_mem_h memory = nullptr;
  const ucs_status_t status = ucp_mem_map(context_, &params, &memory);
  if (status != UCS_OK) throw_registration(status, bytes);
  memory_.add(reinterpret_cast<uint64_t>(base), bytes, memory);
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
  if (memory_.is_empty()) {
    throw_setup("address", UCS_ERR_INVALID_PARAM, -1, "no region is registered");
  }
  ucp_address_t* worker_address = nullptr;
  size_t worker_bytes = 0;
  ucs_status_t status = ucp_worker_get_address(worker_, &worker_address, &worker_bytes);
  if (status != UCS_OK) throw_setup("ucp_worker_get_address", status, -1, "own address");
  AddressHeader header{};
  header.magic = kAddressMagic;
  header.version = loaded_version();
  header.worker_bytes = static_cast<uint32_t>(worker_bytes);
  std::vector<uint8_t> blob(sizeof(header));
  const auto append = [&blob](const void* bytes, size_t count) {
    const auto* first = static_cast<const uint8_t*>(bytes);
    blob.insert(blob.end(), first, first + count);
  };
  append(worker_address, worker_bytes);
  ucp_worker_release_address(worker_, worker_address);
  for (const auto& part : memory_.parts()) {
    void* rkey = nullptr;
    size_t rkey_bytes = 0;
    status = ucp_rkey_pack(context_, part.key, &rkey, &rkey_bytes);
    if (status != UCS_OK) throw_setup("ucp_rkey_pack", status, -1, "own remote key");
    append(rkey, rkey_bytes);
    ucp_rkey_buffer_release(rkey);
    header.regions[header.num_regions++] = {part.base, part.bytes, rkey_bytes};
  }
  std::memcpy(blob.data(), &header, sizeof(header));
  return blob;
}

// Creates the endpoint and the remote keys of peer.rank.
void UcxTransport::unpack_address(Peer& peer, const std::vector<uint8_t>& address) {
  const std::string who = "connecting to rank " + std::to_string(peer.rank);
  AddressHeader header{};
  if (address.size() >= sizeof(header)) std::memcpy(&header, address.data(), sizeof(header));
  if (header.magic != kAddressMagic || header.num_regions < 1 || header.num_regions > 2 ||
      address.size() != blob_bytes(header)) {
    throw_setup("connect", UCS_ERR_INVALID_ADDR, peer.rank, who + ", malformed address");
  }
  if (header.version != loaded_version()) {  // worker addresses differ between versions
    throw_setup("connect", UCS_ERR_UNSUPPORTED, peer.rank,
                who + ", it runs UCX " + format_version(header.version) + ", this rank " +
                    format_version(loaded_version()) + " (" + library_path() + ")");
  }
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
  const uint8_t* packed = worker_address + header.worker_bytes;
  for (uint32_t i = 0; i < header.num_regions; ++i) {
    const PackedRegion& region = header.regions[i];
    ucp_rkey_h rkey = nullptr;
    status = ucp_ep_rkey_unpack(peer.ep, packed, &rkey);
    if (status != UCS_OK) throw_setup("ucp_ep_rkey_unpack", status, peer.rank, who);
    peer.memory.add(region.base, region.bytes, rkey);
    packed += region.rkey_bytes;
  }
  if (peer.memory.has_device()) fence_mode_ = FenceMode::kFlush;
  peer.has_direct_copies = loaded_version() >= kCopiesSeen && copies_are_direct(peer);
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
  if (memory_.has_device())
    text << ", device memory "
         << (type_of(memory_.parts()[1].key) == UCS_MEMORY_TYPE_CUDA ? "known as CUDA's"
                                                                     : "taken for the host's");
  for (const auto& peer : peers_) {
    if (peer != nullptr) text << ", " << describe_peer(*peer);
  }
  return text.str();
}

// Endpoints go with the worker, and so does what is outstanding to peers that do not answer. It is
// purged there, which reads the handle of the memory once more: the worker goes before the memory.
void UcxTransport::release_handles() noexcept {
  for (const auto& peer : peers_) {
    if (peer == nullptr) continue;
    for (const auto& part : peer->memory.parts()) ucp_rkey_destroy(part.key);
    peer->memory.clear();
  }
  if (worker_ != nullptr) ucp_worker_destroy(worker_);
  for (const auto& part : memory_.parts()) ucp_mem_unmap(context_, part.key);
  if (context_ != nullptr) ucp_cleanup(context_);
  memory_.clear();
  worker_ = nullptr;
  context_ = nullptr;
}

std::unique_ptr<Transport> make_ucx(PutListener* listener, int rank,
                                    const TransportOptions& options) {
  return std::make_unique<UcxTransport>(listener, rank, options);
}

}  // namespace commlib
