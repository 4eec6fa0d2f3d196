// Choice of network ports, on trees of plain files in place of sysfs.
#include "transport/nic_select.hpp"

#include <doctest/doctest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <stdexcept>

#include "transport/providers.hpp"

using namespace commlib;
namespace fs = std::filesystem;

namespace {

constexpr const char* kNoGid = "0000:0000:0000:0000:0000:0000:0000:0000";
constexpr const char* kLinkLocal = "fe80:0000:0000:0000:5054:00ff:fe00:0001";
constexpr const char* kIpv4 = "0000:0000:0000:0000:0000:ffff:0a63:0001";
constexpr const char* kIpv6 = "2001:0db8:0000:0000:0000:0000:0000:0001";

// A tree in a folder of its own, removed again.
class FakeSysfs {
 public:
  FakeSysfs() {
    char name[] = "/tmp/commlib-sysfs-XXXXXX";
    if (mkdtemp(name) == nullptr) throw std::runtime_error("mkdtemp failed");
    root_ = name;
  }
  ~FakeSysfs() { fs::remove_all(root_); }

  std::string root() const { return root_.string(); }

  void write(const fs::path& path, const std::string& text) {
    fs::create_directories((root_ / path).parent_path());
    std::ofstream(root_ / path) << text << "\n";
  }
  // A PCI function, listed by its address: the last part of `path`.
  void add_pci(const std::string& path, int numa_node) {
    const fs::path device = fs::path("devices") / path;
    write(device / "numa_node", std::to_string(numa_node));
    fs::create_directories(root_ / "bus/pci/devices");
    fs::create_symlink(root_ / device, root_ / "bus/pci/devices" / fs::path(path).filename());
  }
  // A port; `path` empty: a device that is on no bus (rxe).
  void add_port(const std::string& device, int port, const std::string& path, int numa_node,
                const std::string& state = "4: ACTIVE", const std::string& link = "Ethernet") {
    const fs::path folder = fs::path("class/infiniband") / device;
    write(folder / "ports" / std::to_string(port) / "state", state);
    write(folder / "ports" / std::to_string(port) / "link_layer", link);
    if (path.empty() || fs::exists(root_ / folder / "device")) return;
    add_pci(path, numa_node);
    fs::create_symlink(root_ / "devices" / path, root_ / folder / "device");
  }
  void add_gid(const std::string& device, int port, int index, const std::string& gid,
               const std::string& type) {
    const fs::path folder = fs::path("class/infiniband") / device / "ports" / std::to_string(port);
    write(folder / "gids" / std::to_string(index), gid);
    if (!type.empty()) write(folder / "gid_attrs/types" / std::to_string(index), type);
  }

 private:
  fs::path root_;
};

std::vector<std::string> names(const std::vector<NicChoice>& choices) {
  std::vector<std::string> list;
  for (const NicChoice& choice : choices)
    list.push_back(choice.device + ":" + std::to_string(choice.port));
  return list;
}

using Names = std::vector<std::string>;

// Two sockets. Under each two switches, under each switch a GPU (.0) and two cards. One more card
// hangs at the host bridge of the first socket, one is down.
void fill_server(FakeSysfs& sysfs) {
  int card = 0;
  for (const std::string bridge : {"pci0000:00", "pci0000:80"}) {
    const std::string base = bridge.substr(8);
    const int numa_node = base == "00" ? 0 : 1;
    for (const std::string slot : {"1", "2"}) {
      const std::string above =
          bridge + "/0000:" + base + ":0" + slot + ".0/0000:" + (base == "00" ? "1" : "9") + slot;
      sysfs.add_pci(above + ":00.0", numa_node);
      for (const std::string function : {"0", "1"}) {
        const std::string device = "mlx5_" + std::to_string(card++);
        sysfs.add_port(device, 1, above + ":0" + function + ".4", numa_node);
        sysfs.add_gid(device, 1, 3, kIpv4, "RoCE v2");
      }
    }
  }
  sysfs.add_port("mlx5_8", 1, "pci0000:00/0000:00:07.0", 0);
  sysfs.add_gid("mlx5_8", 1, 0, kIpv4, "RoCE v2");
  sysfs.add_port("mlx5_9", 1, "pci0000:00/0000:00:01.0/0000:11:05.0", 0, "1: DOWN");
  sysfs.add_gid("mlx5_9", 1, 0, kIpv4, "RoCE v2");
}

}  // namespace

TEST_CASE("distance: bridges in between, host bridge, node, elsewhere") {
  const PciPlace gpu{"pci0000:00/0000:00:01.0/0000:11:00.0", 0};
  CHECK(pci_distance(gpu, gpu) == 0);
  CHECK(pci_distance(gpu, {"pci0000:00/0000:00:01.0/0000:11:01.0", 0}) == 2);
  CHECK(pci_distance(gpu, {"pci0000:00/0000:00:01.0/0000:12:00.0/0000:13:00.0", 0}) == 3);
  CHECK(pci_distance(gpu, {"pci0000:00/0000:00:02.0/0000:15:00.0", 0}) == kSameHostBridge + 4);
  CHECK(pci_distance(gpu, {"pci0000:40/0000:40:01.0/0000:41:00.0", 0}) == kSameNumaNode);
  CHECK(pci_distance(gpu, {"pci0000:80/0000:80:01.0/0000:81:00.0", 1}) == kElsewhere);
  CHECK(pci_distance(gpu, {}) == kElsewhere);
  CHECK(pci_distance({gpu.path, -1}, {"pci0000:40/0000:41:00.0", -1}) == kElsewhere);
}

TEST_CASE("ports, places and addresses are read from the tree") {
  FakeSysfs sysfs;
  sysfs.add_port("mlx5_0", 1, "pci0000:80/0000:80:01.0/0000:81:00.0", 1);
  sysfs.add_port("mlx5_0", 2, "pci0000:80/0000:80:01.0/0000:81:00.0", 1, "1: DOWN", "InfiniBand");
  sysfs.add_gid("mlx5_0", 1, 0, kNoGid, "");
  sysfs.add_gid("mlx5_0", 1, 10, kIpv4, "RoCE v2");
  sysfs.add_gid("mlx5_0", 1, 2, kLinkLocal, "IB/RoCE v1");
  sysfs.add_port("rxe0", 1, "", -1);
  const std::vector<NicPort> ports = read_nic_ports(sysfs.root());
  REQUIRE(ports.size() == 3);
  CHECK(ports[0].device == "mlx5_0");
  CHECK(ports[0].port == 1);
  CHECK(ports[0].is_active);
  CHECK(ports[0].is_ethernet);
  CHECK(ports[0].place.path == "pci0000:80/0000:80:01.0/0000:81:00.0");
  CHECK(ports[0].place.numa_node == 1);
  REQUIRE(ports[0].gids.size() == 2);  // the empty one is none
  CHECK(ports[0].gids[0].index == 2);
  CHECK(ports[0].gids[1].index == 10);
  CHECK(ports[0].gids[1].type == "RoCE v2");
  CHECK(ports[1].port == 2);
  CHECK(!ports[1].is_active);
  CHECK(!ports[1].is_ethernet);
  CHECK(ports[2].place.path.empty());
  CHECK(find_pci(sysfs.root(), "0000:81:00.0").path == ports[0].place.path);
  CHECK(find_pci(sysfs.root(), "0000:99:00.0").path.empty());
  CHECK(read_nic_ports(sysfs.root() + "/nowhere").empty());
}

TEST_CASE("the address: v2 before v1, IPv4 before IPv6 before link-local") {
  NicPort port;
  port.is_ethernet = true;
  CHECK(choose_gid(port) == -1);
  port.gids = {{0, kIpv4, "IB/RoCE v1"}};
  CHECK(choose_gid(port) == 0);
  port.gids.push_back({1, kLinkLocal, "RoCE v2"});
  CHECK(choose_gid(port) == 1);
  port.gids.push_back({2, kIpv6, "RoCE v2"});
  CHECK(choose_gid(port) == 2);
  port.gids.push_back({3, kIpv4, "RoCE v2"});
  CHECK(choose_gid(port) == 3);
  port.is_ethernet = false;
  CHECK(choose_gid(port) == 0);
}

TEST_CASE("a GPU gets the cards behind its own switch, ranks that share them take turns") {
  FakeSysfs sysfs;
  fill_server(sysfs);
  const std::vector<NicPort> ports = read_nic_ports(sysfs.root());
  REQUIRE(ports.size() == 10);
  NicRequest request;
  const auto chosen = [&](const char* gpu, int max_nics, int spread) {
    request.near = find_pci(sysfs.root(), gpu);
    REQUIRE(!request.near.path.empty());
    request.max_nics = max_nics;
    request.spread = spread;
    return names(choose_nics(ports, request));
  };
  CHECK(chosen("0000:11:00.0", 1, 0) == Names{"mlx5_0:1"});
  CHECK(chosen("0000:11:00.0", 1, 1) == Names{"mlx5_1:1"});
  CHECK(chosen("0000:11:00.0", 4, 0) == Names{"mlx5_0:1", "mlx5_1:1"});
  CHECK(chosen("0000:11:00.0", 2, 3) == Names{"mlx5_1:1", "mlx5_0:1"});
  CHECK(chosen("0000:12:00.0", 1, 0) == Names{"mlx5_2:1"});
  CHECK(chosen("0000:92:00.0", 2, 0) == Names{"mlx5_6:1", "mlx5_7:1"});
  CHECK(choose_nics(ports, request)[0].distance == 2);
  CHECK(choose_nics(ports, request)[0].gid_index == 3);
}

TEST_CASE("without a GPU all ports are equally near, and local ranks spread over them") {
  FakeSysfs sysfs;
  fill_server(sysfs);
  const std::vector<NicPort> ports = read_nic_ports(sysfs.root());
  NicRequest request;
  for (int local_rank = 0; local_rank < 20; ++local_rank) {
    request.spread = local_rank;
    CHECK(names(choose_nics(ports, request)) ==
          Names{"mlx5_" + std::to_string(local_rank % 9) + ":1"});  // the tenth is down
  }
}

TEST_CASE("named ports come as named, and a bad name lists what there is") {
  FakeSysfs sysfs;
  fill_server(sysfs);
  sysfs.add_port("mlx5_7", 2, "", -1);
  sysfs.add_gid("mlx5_7", 2, 5, kIpv6, "RoCE v2");
  sysfs.add_port("bare", 1, "", -1);
  const std::vector<NicPort> ports = read_nic_ports(sysfs.root());
  NicRequest request;
  request.names = {"mlx5_7:2", "mlx5_1"};
  CHECK(names(choose_nics(ports, request)) == Names{"mlx5_7:2", "mlx5_1:1"});
  CHECK(choose_nics(ports, request)[0].gid_index == 5);
  request.gid_index = 1;
  CHECK(choose_nics(ports, request)[0].gid_index == 1);
  for (const char* name : {"mlx5_9", "mlx4_0", "mlx5_0:2", "bare"}) {
    request.names = {name};
    try {
      choose_nics(ports, request);
      FAIL("accepted " << name);
    } catch (const std::invalid_argument& error) {
      const std::string message = error.what();
      CHECK(message.find(name) != std::string::npos);
      CHECK(message.find("mlx5_9:1 (down)") != std::string::npos);
      CHECK(message.find("bare:1 (no GID)") != std::string::npos);
      CHECK(message.find("mlx5_0:1, ") != std::string::npos);
    }
  }
}

TEST_CASE("nothing usable is no choice") {
  CHECK(choose_nics({}, {}).empty());
  FakeSysfs sysfs;
  sysfs.add_port("mlx5_0", 1, "", -1, "1: DOWN");
  CHECK(choose_nics(read_nic_ports(sysfs.root()), {}).empty());
}

TEST_CASE("a port that is listed but cannot be opened does not count as verbs") {
  FakeSysfs sysfs;
  sysfs.add_port("commlib_none", 1, "", -1);
  sysfs.add_gid("commlib_none", 1, 0, kIpv4, "RoCE v2");
  REQUIRE(choose_nics(read_nic_ports(sysfs.root()), {}).size() == 1);
  CHECK_FALSE(has_verbs({}, sysfs.root()));
  TransportOptions options;
  options.nics = {"commlib_none:2"};
  CHECK_FALSE(has_verbs(options, sysfs.root()));
}
