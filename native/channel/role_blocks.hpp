// How many blocks of a kernel serve the tokens of other nodes.
#pragma once

#include "common/types.hpp"

namespace commlib {

constexpr uint32_t kPerCopyUnit = 256;

// `rows` came or go, each with `copies / rows` rows of this node to write or to add up: the more of
// them, the more blocks it takes to keep up with the network. `per_copy`: blocks for one copy a
// row, in 1 / kPerCopyUnit. commlib/launch_plan.py has the same.
COMMLIB_HD uint32_t role_blocks(uint64_t rows, uint64_t copies, uint32_t per_copy, uint32_t most) {
  if (rows == 0) return 0;
  const uint64_t wanted = (copies * per_copy + rows * kPerCopyUnit - 1) / (rows * kPerCopyUnit);
  return uint32_t(wanted < 1 ? 1 : wanted < most ? wanted : most);
}

}  // namespace commlib
