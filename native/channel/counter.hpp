// Landing counters: "n arrived in epoch e". One writer, never reset, ordered as one number, so a
// consumer of epoch e is also satisfied by a writer that has gone on to a later epoch.
#pragma once

#include "common/atomics.hpp"

namespace commlib {

COMMLIB_HD constexpr uint64_t make_ticket(uint64_t epoch, uint64_t count) {
  return epoch << 32 | count;
}

// How many of `epoch` have arrived according to `ticket`, at most `expected`.
COMMLIB_HD uint64_t arrived_in(uint64_t ticket, uint64_t epoch, uint64_t expected) {
  const uint64_t seen = ticket >> 32;
  if (seen < epoch) return 0;
  if (seen > epoch) return expected;
  const uint64_t count = ticket & 0xffffffffu;
  return count < expected ? count : expected;
}

}  // namespace commlib
