// The put yardstick of `commlib bench`.
#include "transport/goodput.hpp"

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bindings/bindings.hpp"

namespace nb = nanobind;

namespace commlib::bindings {

void register_goodput(nb::module_& module) {
  nb::class_<GoodputProbe>(module, "GoodputProbe")
      .def(nb::init<const std::string&, int, int, size_t, int, const TransportOptions&>())
      .def("address",
           [](const GoodputProbe& probe) {
             const auto blob = probe.address();
             return nb::bytes(reinterpret_cast<const char*>(blob.data()), blob.size());
           })
      .def("connect",
           [](GoodputProbe& probe, int peer, const nb::bytes& blob) {
             const auto* data = reinterpret_cast<const uint8_t*>(blob.c_str());
             probe.connect(peer, {data, data + blob.size()});
           })
      .def("run", &GoodputProbe::run, nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace commlib::bindings
