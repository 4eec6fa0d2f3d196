// The providers behind make_transport, for tests that need their options.
#pragma once

#include <memory>
#include <string>

#include "transport/transport.hpp"

namespace commlib {

struct LoopbackOptions {
  // Runs commands in the worst order that the contract allows: first the signals in front of a
  // fence, in a later progress() the puts there backwards, and the puts behind all fences before
  // both. A forgotten fence then fails at once.
  bool reorder_unfenced = true;
  // Negative control for race detectors: signals become relaxed stores, so that nothing orders
  // the payload before them.
  bool seed_missing_release = false;
};

std::unique_ptr<Transport> make_ucx(PutListener* listener, int rank,
                                    const TransportOptions& options = {});
std::unique_ptr<Transport> make_verbs(PutListener* listener, int rank,
                                      const TransportOptions& options = {});
// True if libibverbs can be loaded and the ports that make_verbs would take, of those listed in
// `sysfs`, can be used: tries it.
bool has_verbs(const TransportOptions& options = {}, const std::string& sysfs = "/sys");
// The library and the usable ports, or why there are none.
std::string describe_verbs();
std::unique_ptr<Transport> make_loopback(PutListener* listener, int rank,
                                         LoopbackOptions options = {});
std::unique_ptr<Transport> make_null(PutListener* listener, int rank);

}  // namespace commlib
