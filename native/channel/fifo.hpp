// Command FIFO: one producer group (executor thread or SM), one consumer (proxy thread). Validity
// is a phase bit inside the command, which flips every lap: no doorbell, no head to share.
#pragma once

#include "channel/command.hpp"
#include "common/atomics.hpp"

namespace commlib {

// Memory of one FIFO: zeroed, `capacity` (a power of two) commands and the consumer's tail.
struct FifoMemory {
  Command* slots;
  uint64_t* tail;
  uint64_t capacity;
};

COMMLIB_HD constexpr uint64_t fifo_phase(uint64_t position, uint64_t capacity) {
  return (position / capacity) & 1 ? 0 : kPhaseBit;  // zeroed memory is invalid in the first lap
}

struct FifoProducer {
  FifoMemory memory;
  uint64_t head = 0;
  uint64_t cached_tail = 0;

  // False while the FIFO is full.
  COMMLIB_HD bool push(const Command& command) {
    if (head - cached_tail >= memory.capacity) {
      cached_tail = load_acquire(memory.tail);  // partner: store_release in FifoConsumer::pop
      if (head - cached_tail >= memory.capacity) return false;
    }
    Command* slot = memory.slots + (head & (memory.capacity - 1));
    store_relaxed(&slot->hi, command.hi);
    // Partner: load_acquire in FifoConsumer::pop. Publishes hi and all data the command names.
    store_release(&slot->lo, (command.lo & ~kPhaseBit) | fifo_phase(head, memory.capacity));
    ++head;
    return true;
  }
};

struct FifoConsumer {
  FifoMemory memory;
  uint64_t position = 0;

  COMMLIB_HD bool pop(Command* command) {
    Command* slot = memory.slots + (position & (memory.capacity - 1));
    const uint64_t lo = load_acquire(&slot->lo);  // partner: store_release in FifoProducer::push
    if ((lo & kPhaseBit) != fifo_phase(position, memory.capacity)) return false;
    command->lo = lo;
    command->hi = load_relaxed(&slot->hi);
    ++position;
    store_release(memory.tail, position);  // partner: load_acquire in FifoProducer::push
    return true;
  }
};

}  // namespace commlib
