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

bool is_single_copy(const std::string& transport) {
  return std::find(std::begin(kSingleCopy), std::end(kSingleCopy), transport) !=
         std::end(kSingleCopy);
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

// Keeps them out of this worker's address as well, so that no peer, whatever its settings, has such
// a way to us. A list of the user's is not touched: refuse_single_copy() looks at what comes of it.
ucs_status_t UcxTransport::exclude_single_copy(ucp_config_t* config) {
  const char* given = std::getenv("UCX_TLS");
  std::string excluded = given != nullptr ? given : "all";
  if (excluded == "all") excluded = "^";
  if (excluded[0] != '^') return UCS_OK;
  for (const char* transport : kSingleCopy)
    excluded.append(excluded.size() > 1 ? "," : "").append(transport);
  return ucp_config_modify(config, "TLS", excluded.c_str());
}

void UcxTransport::refuse_single_copy(const Peer& peer) const {
  for (const LaneName& lane : lanes_of(peer.ep)) {
    if (!is_single_copy(lane.transport)) continue;
    const char* tls = std::getenv("UCX_TLS");
    throw_setup("connect", UCS_ERR_UNSUPPORTED, peer.rank,
                "UCX_TLS=" + std::string(tls != nullptr ? tls : "") +
                    " lets this rank write to rank " + std::to_string(peer.rank) + " through " +
                    lane.transport +
                    ", which goes on when that rank has freed its memory: unset UCX_TLS, or name "
                    "transports without it, such as tcp,self");
  }
}

std::string UcxTransport::describe_peer(const Peer& peer) const {
  std::string text = "rank " + std::to_string(peer.rank) + ": ";
  if (peer.failed || peer.ep == nullptr) return text + "closed";
  const std::vector<LaneName> lanes = lanes_of(peer.ep);
  if (lanes.empty()) return text + "unknown";
  for (size_t i = 0; i < lanes.size(); ++i)
    text.append(i > 0 ? "+" : "").append(lanes[i].transport).append("/").append(lanes[i].device);
  return text;
}

}  // namespace commlib
