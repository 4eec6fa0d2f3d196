// Landing counters: "n arrived in epoch e". One writer, never reset, epochs in order, so a
// consumer of epoch e is also satisfied by a writer that has gone on to a later epoch.
#pragma once

#include "common/atomics.hpp"

namespace commlib {

COMMLIB_HD constexpr uint64_t make_ticket(uint64_t epoch, uint64_t count) {
  return epoch << 32 | count;
}

// How many of `epoch` have arrived according to `ticket`, at most `expected`.
COMMLIB_HD uint64_t arrived_in(uint64_t ticket, uint64_t epoch, uint64_t expected) {
  // The low 32 bits of epochs, compared by their distance: they wrap.
  const int32_t ahead =
      static_cast<int32_t>(static_cast<uint32_t>(ticket >> 32) - static_cast<uint32_t>(epoch));
  if (ahead < 0) return 0;
  if (ahead > 0) return expected;
  const uint64_t count = ticket & 0xffffffffu;
  return count < expected ? count : expected;
}

}  // namespace commlib
