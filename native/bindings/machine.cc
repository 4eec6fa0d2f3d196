// Facts about this build and machine for `commlib info`.
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bindings/bindings.hpp"
#include "cpu/exchange.hpp"
#include "cpu/rows.hpp"
#include "transport/providers.hpp"

namespace nb = nanobind;

namespace commlib::bindings {
namespace {

class NullListener : public PutListener {
 public:
  void on_put_complete(uint64_t) override {}
};

// Loads and describes the default provider, connected to nobody.
std::string ucx_version() {
  NullListener listener;
  return make_transport("ucx", &listener, 0)->describe();
}

size_t row_bytes_of_exchange(int num_ranks, int num_nodes, int num_experts) {
  return exchange_row_bytes(num_ranks, num_nodes, num_experts);
}

// What an engine of that rank registers, and how much of it are rings.
std::pair<size_t, size_t> registered_bytes(int rank, const std::vector<int>& node_of_rank,
                                           int num_experts, size_t ring_bytes) {
  const Group group(rank, node_of_rank, num_experts);
  if (group.num_nodes() == 1) return {0, 0};
  const RegisteredRegion region(group, rank, {exchange_row_bytes(group), ring_bytes});
  return {region.total_bytes, region.ring_memory_bytes()};
}

}  // namespace

void register_machine(nb::module_& module) {
  module.def("exchange_row_bytes", &row_bytes_of_exchange, nb::arg("num_ranks"),
             nb::arg("num_nodes"), nb::arg("num_experts"));
  module.def("registered_bytes", &registered_bytes, nb::arg("rank"), nb::arg("node_of_rank"),
             nb::arg("num_experts"), nb::arg("ring_bytes"));
  module.def("row_kernels", [] { return std::string(row_kernels().name); });
  module.def("ucx_version", &ucx_version);
  module.def("describe_verbs", &describe_verbs);
  module.def("has_verbs", [](const TransportOptions& options) { return has_verbs(options); });
}

}  // namespace commlib::bindings
