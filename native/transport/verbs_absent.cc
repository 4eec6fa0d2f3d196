// In place of the verbs provider where its headers were not there at build time.
#include <cerrno>

#include "transport/providers.hpp"

namespace commlib {
namespace {

constexpr const char* kReason =
    "built without <infiniband/verbs.h> (Debian: apt install libibverbs-dev, then build again)";

}  // namespace

std::unique_ptr<Transport> make_verbs(PutListener*, int rank, const TransportOptions&) {
  throw TransportException("make_transport", ENOSYS, -1,
                           "rank " + std::to_string(rank) + ": verbs: " + kReason);
}

bool has_verbs(const TransportOptions&, const std::string&) { return false; }

std::string describe_verbs() { return std::string("not available: ") + kReason; }

}  // namespace commlib
