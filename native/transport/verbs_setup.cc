// Verbs provider: devices, registration, addresses, connections.
#include <algorithm>
#include <cerrno>
#include <cstring>
#include <sstream>

#include "transport/providers.hpp"
#include "transport/verbs.hpp"

namespace commlib {
namespace {

constexpr const char* kSysfs = "/sys";
constexpr int kStrict = IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE;

NicRequest request_of(const TransportOptions& options, const std::string& sysfs) {
  NicRequest request;
  request.names = options.nics;
  if (!options.near_pci.empty()) request.near = find_pci(sysfs, options.near_pci);
  request.max_nics = options.max_nics;
  request.spread = options.local_rank;
  request.gid_index = options.gid_index;
  return request;
}

// Empty if the port can be used. What sysfs lists need not be: a container sees the host's ports,
// but has the device files only of those that it was given.
std::string obstacle_of(const VerbsApi& api, const NicChoice& choice,
                        const TransportOptions& options) {
  try {
    VerbsDevice device(api, choice, options);
    ControlPort control(device);
    return {};
  } catch (const std::exception& error) {
    return error.what();
  }
}

}  // namespace

VerbsTransport::VerbsTransport(PutListener* listener, int rank, const TransportOptions& options)
    : ProviderBase(listener, rank), options_(options) {
  std::string reason;
  const VerbsApi* api = load_verbs(&reason);
  if (api == nullptr) throw_setup("dlopen", ENOENT, -1, reason);
  library_ = api->path;
  try {
    open_lanes(*api);
  } catch (...) {
    release_lanes();
    throw;
  }
}

VerbsTransport::~VerbsTransport() { shutdown(0.0); }

void VerbsTransport::throw_setup(const char* call, int code, int peer,
                                 const std::string& what) const {
  throw TransportException(call, code, peer, "rank " + std::to_string(rank()) + ": verbs: " + what);
}

void VerbsTransport::open_lanes(const VerbsApi& api) {
  std::vector<NicChoice> choices;
  try {
    choices = choose_nics(read_nic_ports(kSysfs), request_of(options_, kSysfs));
  } catch (const std::invalid_argument& error) {
    throw_setup("choose_nics", ENODEV, -1, error.what());
  }
  if (choices.empty())
    throw_setup("choose_nics", ENODEV, -1,
                "no RDMA port is active and has a GID (/sys/class/infiniband)");
  for (const NicChoice& choice : choices) {
    Lane& lane = lanes_.emplace_back();
    lane.device = std::make_unique<VerbsDevice>(api, choice, options_);
    lane.control = std::make_unique<ControlPort>(*lane.device);
  }
}

void VerbsTransport::register_region(void* base, size_t bytes) {
  if (has_region() || base == nullptr || bytes == 0)
    throw_setup("register_region", EINVAL, -1, "one non-empty region is registered, once");
  if (options_.signal_by_immediate && bytes / kWordBytes > UINT32_MAX)
    throw_setup("register_region", EINVAL, -1,
                std::to_string(bytes) + " bytes have more words than an immediate can name (2^32)");
  const auto add = [&](const Lane& lane, int access) {
    ibv_mr* made = lane.device->register_memory(base, bytes, access);
    // Each port registers the region for data and for signals, and each counts.
    if (made == nullptr)
      throw_unregistered("rank " + std::to_string(rank()) + ": cannot register " +
                             std::to_string(bytes) + " bytes, twice for each of " +
                             std::to_string(lanes_.size()) + " ports",
                         errno, 2 * lanes_.size() * bytes);
    return made;
  };
  for (Lane& lane : lanes_) {
    lane.data = add(lane, kStrict | IBV_ACCESS_RELAXED_ORDERING);
    lane.signal = add(lane, kStrict);
    lane.memory.add(reinterpret_cast<uint64_t>(base), bytes, lane.data->lkey);
  }
  registration_ = "host memory";
}

// dmabuf, else by address, which takes a driver that lends its pages (peermem). For data only:
// signals go to host memory.
void VerbsTransport::register_device_region(const DeviceRegion& region) {
  if (!has_region() || lanes_[0].memory.has_device() || region.base == nullptr || region.bytes == 0)
    throw_setup("register_device_region", EINVAL, -1,
                "one non-empty region is registered, once, after that of host memory");
  constexpr int kRelaxed = kStrict | IBV_ACCESS_RELAXED_ORDERING;
  std::string dmabuf_error;
  for (Lane& lane : lanes_) {
    if (region.dmabuf_fd >= 0 && dmabuf_error.empty()) {
      lane.device_data = lane.device->register_dmabuf(region.dmabuf_fd, region.dmabuf_offset,
                                                      region.base, region.bytes, kRelaxed);
      if (lane.device_data == nullptr) dmabuf_error = std::strerror(errno);
    }
    if (lane.device_data == nullptr)
      lane.device_data = lane.device->register_memory(region.base, region.bytes, kRelaxed);
    if (lane.device_data == nullptr) throw_device_registration(errno, region.bytes);
    lane.memory.add(reinterpret_cast<uint64_t>(region.base), region.bytes, lane.device_data->lkey);
  }
  registration_ += ", device memory";
  registration_ += region.dmabuf_fd < 0   ? " by address"
                   : dmabuf_error.empty() ? " by dmabuf"
                                          : " by address, dmabuf: " + dmabuf_error;
}

void VerbsTransport::throw_device_registration(int code, size_t bytes) const {
  throw RegistrationException(lanes_.size() * bytes, 0,
                              "rank " + std::to_string(rank()) + ": cannot register " +
                                  std::to_string(bytes) +
                                  " bytes of device memory: ibv_reg_mr: " + std::strerror(code) +
                                  "; that needs a dmabuf, or a driver that lends its pages "
                                  "(nvidia-peermem); else move data "
                                  "through host memory");
}

DeviceReach VerbsTransport::device_reach(int peer) const {
  const Peer& entry = *peers_[size_t(peer)];
  const bool has_both = lanes_[entry.lane].memory.has_device() && entry.target.memory.has_device();
  return has_both ? DeviceReach::kDirect : DeviceReach::kUnseen;
}

std::vector<uint8_t> VerbsTransport::address() const {
  if (!has_region()) throw_setup("address", EINVAL, -1, "no region is registered");
  const auto& parts = lanes_[0].memory.parts();
  VerbsAddressHead head;
  head.num_lanes = uint32_t(lanes_.size());
  head.base = parts[0].base;
  head.bytes = parts[0].bytes;
  if (parts.size() > 1) {
    head.device_base = parts[1].base;
    head.device_bytes = parts[1].bytes;
  }
  std::vector<uint8_t> blob(sizeof head + lanes_.size() * sizeof(VerbsAddressLane));
  std::memcpy(blob.data(), &head, sizeof head);
  for (size_t i = 0; i < lanes_.size(); ++i) {
    const ibv_mr* device_data = lanes_[i].device_data;
    const VerbsAddressLane lane{lanes_[i].control->address(), lanes_[i].data->rkey,
                                lanes_[i].signal->rkey,
                                device_data != nullptr ? device_data->rkey : 0};
    std::memcpy(blob.data() + sizeof head + i * sizeof lane, &lane, sizeof lane);
  }
  return blob;
}

void VerbsTransport::connect(int peer, const std::vector<uint8_t>& address) {
  const size_t index = static_cast<size_t>(peer);
  if (peer < 0 || (index < peers_.size() && peers_[index] != nullptr) || is_shut_down_ ||
      !has_region())
    throw_setup("connect", EINVAL, peer,
                "rank " + std::to_string(peer) +
                    " cannot be connected (again, or before a region "
                    "is registered)");
  auto entry = std::make_unique<Peer>();
  entry->rank = peer;
  start_peer(*entry, address);
  if (index >= peers_.size()) peers_.resize(index + 1);
  peers_[index] = std::move(entry);
  connected_.push_back(peers_[index].get());
  asking_.push_back(peers_[index].get());
  ask(*peers_[index]);
}

void VerbsTransport::start_peer(Peer& peer, const std::vector<uint8_t>& address) {
  VerbsAddressHead head;
  head.magic = 0;
  if (address.size() >= sizeof head) std::memcpy(&head, address.data(), sizeof head);
  if (head.magic != VerbsAddressHead::kMagic || head.num_lanes == 0 ||
      address.size() != sizeof head + head.num_lanes * sizeof(VerbsAddressLane))
    throw_setup("connect", EINVAL, peer.rank,
                "the address of rank " + std::to_string(peer.rank) +
                    " is not one of the verbs provider: do all ranks use the same transport?");
  // Peers are dealt out to the ports by their number; the own node's number shifts that, so that
  // the senders to one peer do not all choose the same of its ports.
  const uint32_t shared = std::min(head.num_lanes, uint32_t(lanes_.size()));
  peer.lane = uint32_t(connected_.size() + size_t(options_.node)) % shared;
  VerbsAddressLane there;
  std::memcpy(&there, address.data() + sizeof head + peer.lane * sizeof there, sizeof there);
  const Lane& lane = lanes_[peer.lane];
  if (there.control.path.is_ethernet != lane.device->path().is_ethernet)
    throw_setup("connect", EINVAL, peer.rank,
                lane.device->choice().text + " and the port of rank " + std::to_string(peer.rank) +
                    " are not of one kind (Ethernet, InfiniBand)");
  peer.control = there.control;
  peer.cookie = random_word();
  peer.target.memory.add(head.base, head.bytes, there.data_key);
  if (head.device_bytes > 0)
    peer.target.memory.add(head.device_base, head.device_bytes, there.device_key);
  peer.target.signal_key = there.signal_key;
  peer.sender = std::make_unique<VerbsSender>(*lane.device, options_, lane.memory,
                                              uint64_t(connected_.size()) << 32);
  peer.route = lane.device->create_route(there.control.path);
}

std::string VerbsTransport::describe_peer(const Peer& peer) const {
  std::string text = "rank " + std::to_string(peer.rank) + ": ";
  if (peer.is_failed) return text + "closed";
  const NicChoice& port = lanes_[peer.lane].device->choice();
  text += "rc/" + port.device + ":" + std::to_string(port.port);
  return peer.sender->is_open() ? text : text + " (connecting)";
}

std::string VerbsTransport::describe() const {
  std::ostringstream text;
  text << "verbs (" << library_ << ")";
  for (const Lane& lane : lanes_)
    text << ", " << lane.device->choice().text << ", mtu " << (128 << lane.device->path().mtu);
  text << ", signals by " << (options_.signal_by_immediate ? "immediate" : "write");
  if (!registration_.empty()) text << ", " << registration_;
  for (const auto& peer : peers_)
    if (peer != nullptr) text << ", " << describe_peer(*peer);
  return text.str();
}

// Connections are gone.
void VerbsTransport::release_lanes() noexcept {
  for (Lane& lane : lanes_) {
    if (lane.data != nullptr) lane.device->deregister(lane.data);
    if (lane.signal != nullptr) lane.device->deregister(lane.signal);
    if (lane.device_data != nullptr) lane.device->deregister(lane.device_data);
  }
  lanes_.clear();
}

std::unique_ptr<Transport> make_verbs(PutListener* listener, int rank,
                                      const TransportOptions& options) {
  return std::make_unique<VerbsTransport>(listener, rank, options);
}

bool has_verbs(const TransportOptions& options, const std::string& sysfs) {
  const VerbsApi* api = load_verbs();
  if (api == nullptr) return false;
  std::vector<NicChoice> choices;
  try {
    choices = choose_nics(read_nic_ports(sysfs), request_of(options, sysfs));
  } catch (const std::invalid_argument&) {  // asked for by name, and not there
  }
  return !choices.empty() &&
         std::all_of(choices.begin(), choices.end(), [&](const NicChoice& choice) {
           return obstacle_of(*api, choice, options).empty();
         });
}

std::string describe_verbs() {
  std::string reason;
  const VerbsApi* api = load_verbs(&reason);
  if (api == nullptr) return "not available: " + reason;
  NicRequest request;
  request.max_nics = 1 << 16;
  std::string text = api->path;
  const std::vector<NicChoice> choices = choose_nics(read_nic_ports(kSysfs), request);
  for (const NicChoice& choice : choices) {
    const std::string obstacle = obstacle_of(*api, choice, {});
    text += ", " + choice.text + (obstacle.empty() ? "" : " (" + obstacle + ")");
  }
  return choices.empty() ? text + ", no usable port" : text;
}

}  // namespace commlib
