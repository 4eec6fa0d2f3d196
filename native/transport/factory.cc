#include <stdexcept>

#include "transport/providers.hpp"

namespace commlib {

// A build with ThreadSanitizer leaves UCX out: the memory hooks of UCX run in threads that the
// sanitizer has already torn down, which crashes as soon as the library is loaded.
#ifdef COMMLIB_NO_UCX
std::unique_ptr<Transport> make_ucx(PutListener*, int) {
  throw std::invalid_argument("transport 'ucx' is not part of this build (COMMLIB_NO_UCX)");
}
#endif

std::unique_ptr<Transport> make_transport(const std::string& name, PutListener* listener,
                                          int rank) {
  if (name == "ucx") return make_ucx(listener, rank);
  if (name == "loopback") return make_loopback(listener, rank);
  if (name == "null") return make_null(listener, rank);
  throw std::invalid_argument("transport '" + name + "' is not one of ucx, loopback, null");
}

}  // namespace commlib
