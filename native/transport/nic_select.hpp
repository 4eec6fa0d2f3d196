// Which network ports carry a rank's puts, and by which address. Reads sysfs, decides by rules that
// need no device: a tree of plain files serves as well.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace commlib {

// Where a PCI device sits.
struct PciPlace {
  std::string path;  // from its host bridge on, "pci0000:80/0000:80:01.0/0000:81:00.0"
  int numa_node = -1;
};

struct NicGid {
  int index = 0;
  std::string text;  // as in sysfs, "0000:0000:0000:0000:0000:ffff:0a63:0001"
  std::string type;  // "RoCE v2", "IB/RoCE v1"
};

struct NicPort {
  std::string device;  // "mlx5_0"
  int port = 1;
  bool is_active = false;
  bool is_ethernet = false;  // RoCE: addressed by GID, not by LID
  PciPlace place;            // empty path: not on PCI
  std::vector<NicGid> gids;
};

// PCI functions in between, if one bridge or switch joins the two; the constants if not.
constexpr int kSameHostBridge = 100;
constexpr int kSameNumaNode = 500;
constexpr int kElsewhere = 1000;

struct NicRequest {
  std::vector<std::string> names;  // "mlx5_0" or "mlx5_0:2", these in this order; empty: choose
  PciPlace near;                   // the GPU's; empty path: anywhere
  int max_nics = 1;
  int spread = 0;      // local rank: ranks that are as near to the same ports start at another one
  int gid_index = -1;  // -1: choose
};

struct NicChoice {
  std::string device;
  int port = 1;
  int gid_index = 0;
  int distance = kElsewhere;
  std::string text;  // "mlx5_0:1 gid 3 RoCE v2 0000:...:0001, distance 2"
};

// All ports below root/class/infiniband ("/sys"), by name.
std::vector<NicPort> read_nic_ports(const std::string& root);

// The device of that address ("0000:19:00.0") below root/bus/pci/devices; empty if there is none.
PciPlace find_pci(const std::string& root, const std::string& address);

int pci_distance(const PciPlace& a, const PciPlace& b);

// The best address of a port, -1 if it has none. RoCE v2 before v1 (which no router forwards), IPv4
// before global IPv6 before link-local: what an administrator has set up before what the kernel
// makes up.
int choose_gid(const NicPort& port);

// In order of preference; empty if nothing is usable. Throws std::invalid_argument if a port that
// was asked for by name is missing, down or without address; the message lists what there is.
std::vector<NicChoice> choose_nics(const std::vector<NicPort>& ports, const NicRequest& request);

}  // namespace commlib
