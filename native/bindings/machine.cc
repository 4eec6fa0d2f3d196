// Facts about this build and machine for `commlib info`.
#include <nanobind/stl/string.h>

#include "bindings/bindings.hpp"
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

}  // namespace

void register_machine(nb::module_& module) {
  module.def("row_kernels", [] { return std::string(row_kernels().name); });
  module.def("ucx_version", &ucx_version);
  module.def("describe_verbs", &describe_verbs);
  module.def("has_verbs", [](const TransportOptions& options) { return has_verbs(options); });
}

}  // namespace commlib::bindings
