// Proxy, transport and registered memory of one rank for an executor whose workers are kernels.
#include "proxy/fabric.hpp"

#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bindings/bindings.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace commlib::bindings {
namespace {

using Piece = std::pair<uintptr_t, size_t>;  // address, bytes

nb::bytes address(const Fabric& fabric) {
  const auto blob = fabric.address();
  return nb::bytes(reinterpret_cast<const char*>(blob.data()), blob.size());
}

void connect(Fabric& fabric, const std::vector<nb::bytes>& blobs) {
  std::vector<std::vector<uint8_t>> addresses;
  for (const nb::bytes& blob : blobs) {
    const auto* data = reinterpret_cast<const uint8_t*>(blob.c_str());
    addresses.emplace_back(data, data + blob.size());
  }
  nb::gil_scoped_release release;
  fabric.connect(addresses);
}

Piece piece(const RegisteredMemory& memory) {
  return {reinterpret_cast<uintptr_t>(memory.base()), memory.bytes()};
}

nb::bytes device_view(const Fabric& fabric, uint64_t memory, uint64_t fifos, uint64_t completions,
                      size_t chunk_bytes) {
  const DeviceFabric view = fabric.device_view({memory, fifos, completions}, chunk_bytes);
  return nb::bytes(reinterpret_cast<const char*>(&view), sizeof view);
}

void set_rings(FabricConfig& config, uintptr_t base, size_t bytes, int dmabuf_fd) {
  config.rings = {reinterpret_cast<void*>(base), bytes, dmabuf_fd, 0};
}

void set_stop_word(FabricConfig& config, uintptr_t address) {
  config.stop_word = reinterpret_cast<uint64_t*>(address);
}

void set_thread_setup(FabricConfig& config, uintptr_t set_context, uintptr_t context,
                      uintptr_t exchange_capture_mode, int capture_mode) {
  config.thread_setup = {reinterpret_cast<int (*)(void*)>(set_context),
                         reinterpret_cast<void*>(context),
                         reinterpret_cast<int (*)(int*)>(exchange_capture_mode), capture_mode};
}

const char* ring_reach(const Fabric& fabric) {
  switch (fabric.ring_reach()) {
    case DeviceReach::kDirect:
      return "direct";
    case DeviceReach::kStaged:
      return "staged";
    case DeviceReach::kUnseen:
      break;
  }
  return "unseen";
}

// A wait of a kernel that passed its deadline.
void raise_timeout(Fabric& fabric, int rank, int peer, uint64_t epoch, uint64_t expected,
                   uint64_t seen, const std::string& phase, const std::string& detail) {
  FaultRecord fault;
  fault.kind = FaultKind::kTimeout;
  fault.rank = rank;
  fault.peer = peer;
  fault.channel = peer;
  fault.tag = epoch;
  fault.expected = expected;
  fault.seen = seen;
  fault.set_phase(phase.c_str());
  fault.set_detail(detail.c_str());
  fabric.board().raise(fault);
}

nb::object fault(Fabric& fabric) {
  std::optional<FaultRecord> found;
  {
    nb::gil_scoped_release release;
    found = fabric.fault();
  }
  if (!found) return nb::none();
  return fault_dict(*found);
}

nb::dict counters(const Fabric& fabric) {
  const ProxyCounters proxy = fabric.proxy().counters();
  nb::dict out;
  out["commands"] = proxy.commands;
  out["data_bytes"] = proxy.data_bytes;
  out["exchange_bytes"] = proxy.exchange_bytes;
  out["signals"] = proxy.signals;
  return out;
}

}  // namespace

void register_fabric(nb::module_& module) {
  nb::class_<FabricConfig>(module, "FabricConfig")
      .def(nb::init<>())
      .def_rw("rank", &FabricConfig::rank)
      .def_rw("node_of_rank", &FabricConfig::node_of_rank)
      .def_rw("num_experts", &FabricConfig::num_experts)
      .def_rw("num_writers", &FabricConfig::num_writers)
      .def_rw("num_proxy_threads", &FabricConfig::num_proxy_threads)
      .def_rw("proxy_cpus", &FabricConfig::proxy_cpus)
      .def_rw("exchange_row_bytes", &FabricConfig::exchange_row_bytes)
      .def_rw("ring_bytes", &FabricConfig::ring_bytes)
      .def_rw("largest_put", &FabricConfig::largest_put)
      .def_rw("heartbeat_timeout_s", &FabricConfig::heartbeat_timeout_s)
      .def_rw("config_digest", &FabricConfig::config_digest)
      .def_rw("transport", &FabricConfig::transport)
      .def_rw("transport_options", &FabricConfig::transport_options)
      .def("set_rings", &set_rings, "base"_a, "bytes"_a, "dmabuf_fd"_a)
      .def("set_stop_word", &set_stop_word, "address"_a)
      .def("set_thread_setup", &set_thread_setup, "set_context"_a, "context"_a,
           "exchange_capture_mode"_a, "capture_mode"_a);
  nb::class_<Fabric>(module, "Fabric")
      .def(nb::init<const FabricConfig&>(), nb::call_guard<nb::gil_scoped_release>())
      .def("address", &address)
      .def("connect", &connect, "addresses"_a)
      .def("start", &Fabric::start_for_device)
      .def("wait_ready", &Fabric::wait_ready, "timeout_s"_a,
           nb::call_guard<nb::gil_scoped_release>())
      .def("ring_reach", &ring_reach)
      .def("stop", &Fabric::stop, "is_clean"_a, nb::call_guard<nb::gil_scoped_release>())
      .def("raise_left", &Fabric::raise_left)
      .def("raise_lost", &Fabric::raise_lost, "peer"_a)
      .def("raise_timeout", &raise_timeout, "rank"_a, "peer"_a, "epoch"_a, "expected"_a, "seen"_a,
           "phase"_a, "detail"_a)
      .def("fault", &fault)
      .def("registered", [](const Fabric& f) { return piece(f.mesh().memory()); })
      .def("fifos", [](const Fabric& f) { return piece(f.proxy().fifo_memory()); })
      .def("completions", [](const Fabric& f) { return piece(f.proxy().completions()); })
      .def("device_view", &device_view, "memory"_a, "fifos"_a, "completions"_a, "chunk_bytes"_a)
      .def("describe_transport", &Fabric::describe_transport)
      .def("counters", &counters);
}

}  // namespace commlib::bindings
