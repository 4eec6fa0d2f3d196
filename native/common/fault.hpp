// What went wrong, as one plain struct: written into peers' memory, raised as a typed exception.
#pragma once

#include <cstdio>
#include <cstring>

#include "common/types.hpp"

namespace commlib {

enum class FaultKind : int32_t { kNone = 0, kTimeout = 1, kPeerLost = 2, kTransport = 3 };

struct FaultRecord {
  FaultKind kind = FaultKind::kNone;
  int32_t rank = -1;     // who noticed
  int32_t peer = -1;     // who is missing or failed; -1 unknown
  int32_t channel = -1;  // source rank of the channel that stood still; -1 none
  int32_t code = 0;      // provider's code for transport faults
  int32_t reserved = 0;
  uint64_t tag = 0;  // epoch
  uint64_t expected = 0;
  uint64_t seen = 0;
  char phase[40] = {};    // "dispatch/forward"
  char detail[120] = {};  // call and message of the provider, or how long was waited

  void set_phase(const char* text) { copy_text(phase, sizeof phase, text); }
  void set_detail(const char* text) { copy_text(detail, sizeof detail, text); }

 private:
  static void copy_text(char* to, size_t size, const char* from) {
    std::snprintf(to, size, "%s", from);
  }
};
static_assert(sizeof(FaultRecord) % 8 == 0);

}  // namespace commlib
