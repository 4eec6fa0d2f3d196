#include <stdexcept>

#include "transport/providers.hpp"

namespace commlib {

std::unique_ptr<Transport> make_transport(const std::string& name, PutListener* listener,
                                          int rank) {
  if (name == "ucx") return make_ucx(listener, rank);
  if (name == "loopback") return make_loopback(listener, rank);
  if (name == "null") return make_null(listener, rank);
  throw std::invalid_argument("transport '" + name + "' is not one of ucx, loopback, null");
}

}  // namespace commlib
