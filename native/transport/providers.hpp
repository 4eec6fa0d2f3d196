// The providers behind make_transport, for tests that need their options.
#pragma once

#include <memory>

#include "transport/transport.hpp"

namespace commlib {

struct LoopbackOptions {
  // Runs what lies between two fences backwards and signals first, which the contract allows:
  // a forgotten fence then fails at once.
  bool reorder_unfenced = true;
  // Negative control for race detectors: signals become relaxed stores, so that nothing orders
  // the payload before them.
  bool seed_missing_release = false;
};

std::unique_ptr<Transport> make_ucx(PutListener* listener, int rank);
std::unique_ptr<Transport> make_loopback(PutListener* listener, int rank,
                                         LoopbackOptions options = {});
std::unique_ptr<Transport> make_null(PutListener* listener, int rank);

}  // namespace commlib
