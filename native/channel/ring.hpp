// A scale-out ring: a byte buffer at the sender and its mirror at the receiver, cut into chunks of
// slots. Slot size is chosen per operation; the ring is empty when an operation starts.
#pragma once

#include "channel/counter.hpp"
#include "common/types.hpp"

namespace commlib {

struct RingGeometry {
  size_t slot_bytes = 0;
  uint64_t slots_per_chunk = 0;
  uint64_t num_chunks = 0;

  COMMLIB_HD size_t chunk_bytes() const { return slot_bytes * slots_per_chunk; }
  COMMLIB_HD size_t chunk_offset(uint64_t chunk) const {
    return (chunk % num_chunks) * chunk_bytes();
  }
  COMMLIB_HD size_t slot_offset(uint64_t slot) const {
    return chunk_offset(slot / slots_per_chunk) + (slot % slots_per_chunk) * slot_bytes;
  }
};

// At least four chunks, so that filling, flying and draining overlap even for short messages.
COMMLIB_HD RingGeometry make_ring(size_t ring_bytes, size_t chunk_bytes, size_t slot_bytes,
                                  uint64_t num_slots) {
  RingGeometry ring;
  ring.slot_bytes = slot_bytes;
  uint64_t per_chunk = chunk_bytes / slot_bytes;
  const uint64_t quarter = num_slots / 4;
  if (per_chunk > quarter) per_chunk = quarter;
  ring.slots_per_chunk = per_chunk < 1 ? 1 : per_chunk;
  ring.num_chunks = ring_bytes / ring.chunk_bytes();
  return ring;
}

COMMLIB_HD uint64_t num_chunks_of(const RingGeometry& ring, uint64_t num_slots) {
  return (num_slots + ring.slots_per_chunk - 1) / ring.slots_per_chunk;
}

}  // namespace commlib
