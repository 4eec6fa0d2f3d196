#include <stdexcept>

#include "transport/providers.hpp"

namespace commlib {

std::unique_ptr<Transport> make_transport(const std::string& name, PutListener* listener, int rank,
                                          const TransportOptions& options) {
  if (name == "verbs" || (name == "auto" && has_verbs(options)))
    return make_verbs(listener, rank, options);
  if (name == "ucx" || name == "auto") return make_ucx(listener, rank, options);
  if (name == "loopback") return make_loopback(listener, rank);
  if (name == "null") return make_null(listener, rank);
  throw std::invalid_argument("transport '" + name +
                              "' is not one of auto, verbs, ucx, loopback, null");
}

void Transport::register_device_region(const DeviceRegion&) {
  throw TransportException("register_device_region", 0, -1,
                           "transport '" + name() + "' does not reach device memory");
}

}  // namespace commlib
