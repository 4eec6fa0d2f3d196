// UCX provider: what carries the bytes to a peer, and what must not.
#include <algorithm>
#include <cstdlib>
#include <iterator>

#include "transport/ucx.hpp"

namespace commlib {
namespace {

// Transports by which the sender alone writes into memory of another process of its host: by
// process number and address (cma), or through a mapping of its own of the peer's memory (xpmem,
// the *_ipc of GPUs) or a name for it (knem). The receiver's worker has no part in it, so that
// neither its shutdown nor its freeing the region stops a put; what lies at the address by then is
// overwritten. What else UCX has for one host (posix, sysv, self) reaches only memory that UCX has
// allocated, and carries messages besides, which the receiver takes in while it progresses.
constexpr const char* kSingleCopy[] = {"cma", "knem", "xpmem", "cuda_ipc", "rocm_ipc", "ze_ipc"};

// The exception, for a device region: its owner keeps it until the process ends, unless all ranks
// have agreed to close, so that a peer that writes on overwrites nothing else. UCX keeps its
// mappings that long, too, by design (uct_cuda_ipc_remote_cache). Host memory stays out of its
// reach: it gives keys of GPU memory only, and register_region() refuses any but host memory.
constexpr const char* kDeviceCopy = "cuda_ipc";

// They move device memory to and from host memory. Without a device region there is none to move,
// and they would pin all host memory that is registered, which kernels' owners pin by themselves.
constexpr const char* kDeviceOnly[] = {"cuda_copy", "gdr_copy", "rocm_copy", "ze_copy"};

// What carries host memory within a host.
constexpr const char* kHostOnly[] = {"self", "tcp", "sysv", "posix"};

template <typename Names>
bool is_one_of(const Names& names, const std::string& transport) {
  return std::find(std::begin(names), std::end(names), transport) != std::end(names);
}

struct LaneName {
  std::string transport;
  std::string device;
};

// Empty where UCX does not tell (1.13 ignores the request).
std::vector<LaneName> lanes_of(ucp_ep_h ep) {
  ucp_transport_entry_t entries[16] = {};
  ucp_ep_attr_t attributes{};
  attributes.field_mask = UCP_EP_ATTR_FIELD_TRANSPORTS;
  attributes.transports.entries = entries;
  attributes.transports.num_entries = std::size(entries);
  attributes.transports.entry_size = sizeof(entries[0]);
  const ucs_status_t status = ucp_ep_query(ep, &attributes);
  if (status != UCS_OK || entries[0].transport_name == nullptr) return {};
  std::vector<LaneName> lanes;
  for (unsigned i = 0; i < attributes.transports.num_entries; ++i)
    lanes.push_back({entries[i].transport_name, entries[i].device_name});
  return lanes;
}

}  // namespace

bool UcxTransport::is_refused(const std::string& transport) const {
  if (has_device_region_ && transport == kDeviceCopy) return false;
  return is_one_of(kSingleCopy, transport);
}

// Keeps single copies out of this worker's address as well, so that no peer, whatever its settings,
// has such a way to us. A list of the user's is not touched: refuse_single_copy() looks at what
// comes of it.
ucs_status_t UcxTransport::exclude_transports(ucp_config_t* config) const {
  const char* given = std::getenv("UCX_TLS");
  std::string excluded = given != nullptr ? given : "all";
  if (excluded == "all") excluded = "^";
  if (excluded[0] != '^') return UCS_OK;
  const auto exclude = [&](const char* transport) {
    excluded.append(excluded.size() > 1 ? "," : "").append(transport);
  };
  for (const char* transport : kSingleCopy)
    if (is_refused(transport)) exclude(transport);
  if (!has_device_region_) std::for_each(std::begin(kDeviceOnly), std::end(kDeviceOnly), exclude);
  return ucp_config_modify(config, "TLS", excluded.c_str());
}

void UcxTransport::refuse_single_copy(const Peer& peer) const {
  for (const LaneName& lane : lanes_of(peer.ep)) {
    if (!is_refused(lane.transport)) continue;
    const char* tls = std::getenv("UCX_TLS");
    throw_setup("connect", UCS_ERR_UNSUPPORTED, peer.rank,
                "UCX_TLS=" + std::string(tls != nullptr ? tls : "") +
                    " lets this rank write to rank " + std::to_string(peer.rank) + " through " +
                    lane.transport +
                    ", which goes on when that rank has freed its memory: unset UCX_TLS, or name "
                    "transports without it, such as tcp,self");
  }
}

ucs_memory_type_t UcxTransport::type_of(ucp_mem_h memory) const {
  ucp_mem_attr_t attributes{};
  attributes.field_mask = UCP_MEM_ATTR_FIELD_MEM_TYPE;
  const ucs_status_t status = ucp_mem_query(memory, &attributes);
  return status == UCS_OK ? attributes.mem_type : UCS_MEMORY_TYPE_UNKNOWN;
}

DeviceReach UcxTransport::device_reach(int peer) const {
  const Peer& entry = *peers_[static_cast<size_t>(peer)];
  if (!memory_.has_device() || !entry.memory.has_device()) return DeviceReach::kUnseen;
  // Without its CUDA modules (not built, or not in UCX_TLS) UCX would copy with the processor.
  if (type_of(memory_.parts()[1].key) != UCS_MEMORY_TYPE_CUDA) return DeviceReach::kUnseen;
  for (const LaneName& lane : lanes_of(entry.ep))
    if (lane.transport == kDeviceCopy) return DeviceReach::kDirect;
  return DeviceReach::kStaged;
}

// Whether a put of device memory that is complete here has arrived there, so that a signal may
// follow without a flush: if cuda_ipc carries it, whose completion is the end of the copy. All
// other lanes know host memory only. UCX could still emulate a put by messages, whose completion
// says nothing; 1.22.0 does not where cuda_ipc is (UCX_PROTO_INFO=y: "0..inf zero-copy cuda_ipc"),
// and older ones, which have not been asked, are left out. Signals go on one of the other lanes,
// always the same, in order.
bool UcxTransport::copies_are_direct(const Peer& peer) const {
  if (device_reach(peer.rank) != DeviceReach::kDirect) return false;
  const auto is_known = [](const LaneName& lane) {
    return lane.transport == kDeviceCopy || is_one_of(kHostOnly, lane.transport);
  };
  const std::vector<LaneName> lanes = lanes_of(peer.ep);
  return std::all_of(lanes.begin(), lanes.end(), is_known);
}

std::string UcxTransport::describe_peer(const Peer& peer) const {
  std::string text = "rank " + std::to_string(peer.rank) + ": ";
  if (peer.failed || peer.ep == nullptr) return text + "closed";
  const std::vector<LaneName> lanes = lanes_of(peer.ep);
  if (lanes.empty()) return text + "unknown";
  for (size_t i = 0; i < lanes.size(); ++i)
    text.append(i > 0 ? "+" : "").append(lanes[i].transport).append("/").append(lanes[i].device);
  if (peer.has_direct_copies) text += ", copies fenced by their completion";
  return text;
}

}  // namespace commlib
