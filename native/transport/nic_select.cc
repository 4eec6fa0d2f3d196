#include "transport/nic_select.hpp"

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <stdexcept>

namespace commlib {
namespace {

namespace fs = std::filesystem;

// First line, empty if the file cannot be read: unused GIDs answer with an error.
std::string read_line(const fs::path& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  while (!line.empty() && (line.back() == ' ' || line.back() == '\r')) line.pop_back();
  return line;
}

std::vector<fs::path> entries(const fs::path& folder) {
  std::vector<fs::path> found;
  std::error_code error;
  for (fs::directory_iterator it(folder, error), end; !error && it != end; it.increment(error))
    found.push_back(it->path());
  std::sort(found.begin(), found.end());
  return found;
}

int to_int(const std::string& text, int otherwise) {
  int value = 0;
  std::istringstream stream(text);
  return stream >> value ? value : otherwise;
}

// The part of the device's real path from its host bridge on, and its node.
PciPlace place_of(const fs::path& device) {
  std::error_code error;
  const std::string path = fs::canonical(device, error).string();
  const size_t at = path.find("/pci");
  if (error || at == std::string::npos) return {};
  return {path.substr(at + 1), to_int(read_line(device / "numa_node"), -1)};
}

std::vector<NicGid> read_gids(const fs::path& port) {
  std::vector<NicGid> gids;
  for (const fs::path& file : entries(port / "gids")) {
    const std::string text = read_line(file);
    if (text.find_first_not_of("0:") == std::string::npos) continue;
    const std::string index = file.filename().string();
    gids.push_back({to_int(index, 0), text, read_line(port / "gid_attrs" / "types" / index)});
  }
  std::sort(gids.begin(), gids.end(),
            [](const NicGid& a, const NicGid& b) { return a.index < b.index; });
  return gids;
}

std::vector<std::string> split(const std::string& path) {
  std::vector<std::string> parts;
  std::istringstream stream(path);
  for (std::string part; std::getline(stream, part, '/');) parts.push_back(part);
  return parts;
}

int gid_rank(const NicGid& gid) {
  const int version = gid.type == "RoCE v2" ? 0 : 3;
  if (gid.text.rfind("0000:0000:0000:0000:0000:ffff:", 0) == 0) return version;
  return version + (gid.text.rfind("fe80:", 0) == 0 ? 2 : 1);
}

std::string name_of(const NicPort& port) { return port.device + ":" + std::to_string(port.port); }

std::string list_ports(const std::vector<NicPort>& ports) {
  std::string text;
  for (const NicPort& port : ports) {
    text += (text.empty() ? "" : ", ") + name_of(port) + (port.is_active ? "" : " (down)");
    if (choose_gid(port) < 0) text += " (no GID)";
  }
  return text.empty() ? "none" : text;
}

bool is_usable(const NicPort& port) { return port.is_active && choose_gid(port) >= 0; }

NicChoice make_choice(const NicPort& port, const NicRequest& request, int distance) {
  NicChoice choice{port.device, port.port, choose_gid(port), distance, ""};
  if (request.gid_index >= 0) choice.gid_index = request.gid_index;
  choice.text = name_of(port) + " gid " + std::to_string(choice.gid_index);
  for (const NicGid& gid : port.gids)
    if (gid.index == choice.gid_index) choice.text += " " + gid.type + " " + gid.text;
  if (!request.near.path.empty()) choice.text += ", distance " + std::to_string(distance);
  return choice;
}

}  // namespace

std::vector<NicPort> read_nic_ports(const std::string& root) {
  std::vector<NicPort> ports;
  for (const fs::path& device : entries(fs::path(root) / "class" / "infiniband")) {
    for (const fs::path& folder : entries(device / "ports")) {
      NicPort port;
      port.device = device.filename().string();
      port.port = to_int(folder.filename().string(), 1);
      port.is_active = read_line(folder / "state").find("ACTIVE") != std::string::npos;
      port.is_ethernet = read_line(folder / "link_layer") == "Ethernet";
      port.place = place_of(device / "device");
      port.gids = read_gids(folder);
      ports.push_back(std::move(port));
    }
  }
  return ports;
}

PciPlace find_pci(const std::string& root, const std::string& address) {
  return place_of(fs::path(root) / "bus" / "pci" / "devices" / address);
}

int pci_distance(const PciPlace& a, const PciPlace& b) {
  if (a.path.empty() || b.path.empty()) return kElsewhere;
  const std::vector<std::string> left = split(a.path), right = split(b.path);
  const auto ends = std::mismatch(left.begin(), left.end(), right.begin(), right.end());
  const int hops = int(left.end() - ends.first) + int(right.end() - ends.second);
  const auto shared = ends.first - left.begin();
  if (shared > 1) return hops;
  if (shared == 1) return kSameHostBridge + hops;
  return a.numa_node >= 0 && a.numa_node == b.numa_node ? kSameNumaNode : kElsewhere;
}

int choose_gid(const NicPort& port) {
  if (port.gids.empty()) return -1;
  if (!port.is_ethernet) return port.gids.front().index;  // InfiniBand: the port's own comes first
  return std::min_element(
             port.gids.begin(), port.gids.end(),
             [](const NicGid& a, const NicGid& b) { return gid_rank(a) < gid_rank(b); })
      ->index;
}

std::vector<NicChoice> choose_nics(const std::vector<NicPort>& ports, const NicRequest& request) {
  const auto distance = [&](const NicPort& port) { return pci_distance(port.place, request.near); };
  std::vector<NicChoice> chosen;
  for (const std::string& name : request.names) {
    const auto port = std::find_if(ports.begin(), ports.end(), [&](const NicPort& p) {
      return name == p.device || name == name_of(p);
    });
    if (port == ports.end() || !is_usable(*port))
      throw std::invalid_argument("network port " + name + " is " +
                                  (port == ports.end() ? "not there" : "not usable") +
                                  "; ports: " + list_ports(ports));
    chosen.push_back(make_choice(*port, request, distance(*port)));
  }
  if (!request.names.empty()) return chosen;

  for (const NicPort& port : ports)
    if (is_usable(port)) chosen.push_back(make_choice(port, request, distance(port)));
  std::stable_sort(chosen.begin(), chosen.end(),
                   [](const NicChoice& a, const NicChoice& b) { return a.distance < b.distance; });
  const auto tied = std::find_if(chosen.begin(), chosen.end(), [&](const NicChoice& choice) {
    return choice.distance != chosen.front().distance;
  });
  const auto num_tied = tied - chosen.begin();
  if (num_tied > 0) std::rotate(chosen.begin(), chosen.begin() + request.spread % num_tied, tied);
  chosen.resize(std::min({chosen.size(), size_t(request.max_nics), size_t(num_tied)}));
  return chosen;
}

}  // namespace commlib
