// The put yardstick of `commlib bench`.
#include "transport/goodput.hpp"

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bindings/bindings.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace commlib::bindings {

void register_goodput(nb::module_& module) {
  nb::class_<GoodputProbe>(module, "GoodputProbe")
      .def(
          "__init__",
          [](GoodputProbe* self, const std::string& transport, int rank, int num_ranks,
             size_t message_bytes, int window, const TransportOptions& options,
             uintptr_t messages) {
            new (self) GoodputProbe(transport, rank, num_ranks, message_bytes, window, options,
                                    reinterpret_cast<void*>(messages));
          },
          "transport"_a, "rank"_a, "num_ranks"_a, "message_bytes"_a, "window"_a, "options"_a,
          "messages"_a = 0)
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
