// What a ring slot or a landing slot holds: row, then scales, then record or weight gradients.
#pragma once

#include "common/types.hpp"
#include "layout/record.hpp"

namespace commlib {

struct SlotLayout {
  size_t row_bytes = 0;
  size_t scales_offset = 0;
  size_t scales_bytes = 0;
  size_t tail_offset = 0;  // record (dispatch) or num_topk weight gradients (combine)
  size_t tail_bytes = 0;
  size_t slot_bytes = 0;
};

// Commands address registered memory in units of 16 bytes, so slots are multiples of that.
COMMLIB_HD SlotLayout make_slot(size_t row_bytes, size_t scales_bytes, size_t tail_bytes) {
  SlotLayout slot;
  slot.row_bytes = row_bytes;
  slot.scales_offset = align_up(row_bytes, 4);
  slot.scales_bytes = scales_bytes;
  slot.tail_offset = slot.scales_offset + scales_bytes;
  slot.tail_bytes = tail_bytes;
  slot.slot_bytes = align_up(slot.tail_offset + tail_bytes, 16);
  return slot;
}

}  // namespace commlib
