// The two ends of a scale-out ring during one operation. Totals are in chunks, run for the life of
// the Runtime, and agree at both ends when no operation is under way.
#pragma once

#include "channel/ring.hpp"
#include "memory/mesh.hpp"
#include "proxy/proxy.hpp"

namespace commlib {

class SendRing {
 public:
  struct Place {
    uint8_t* base;  // local staging
    size_t local_offset;
    size_t remote_offset;
    const uint64_t* credit;  // registered word: chunks the receiver has drained
    uint32_t channel;
    uint64_t* total;  // chunks sent over the life of the ring
  };

  SendRing(const RingGeometry& ring, uint64_t num_slots, const Place& place, const Proxy& proxy,
           CommandWriter& writer)
      : ring_(ring),
        num_slots_(num_slots),
        place_(place),
        proxy_(proxy),
        writer_(writer),
        begin_(*place.total) {}

  // Where the next slot goes; nullptr while the ring or the FIFO is full.
  uint8_t* next_slot() {
    if (pending_ && !post()) return nullptr;
    if (written_ == num_slots_) return nullptr;
    if (written_ % ring_.slots_per_chunk == 0 && !has_room()) return nullptr;
    return place_.base + ring_.slot_offset(written_);
  }
  // The slot is filled.
  void commit() {
    ++written_;
    if (written_ % ring_.slots_per_chunk == 0 || written_ == num_slots_) {
      pending_ = true;
      post();
    }
  }
  bool is_done() const { return written_ == num_slots_ && !pending_; }
  // Retries a command that the FIFO had no room for.
  bool flush() { return pending_ && post(); }
  uint64_t written() const { return written_; }
  uint64_t credits() const { return load_acquire(place_.credit); }
  uint64_t total() const { return *place_.total; }

 private:
  bool has_room() const {
    const uint64_t credits_seen = credits();  // partner: the receiver's credit signal
    const uint64_t completed = proxy_.completed(place_.channel);
    const uint64_t drained = credits_seen < completed ? credits_seen : completed;
    return drained >= begin_ && *place_.total - drained < ring_.num_chunks;
  }
  bool post() {
    const uint64_t chunk = (written_ - 1) / ring_.slots_per_chunk;
    const uint64_t slots = written_ - chunk * ring_.slots_per_chunk;
    const size_t offset = ring_.chunk_offset(chunk);
    const Command command =
        encode({CommandKind::kPut, place_.channel, 1, uint32_t(slots * ring_.slot_bytes),
                place_.local_offset + offset, place_.remote_offset + offset});
    if (!writer_.push(command)) return false;
    pending_ = false;
    ++*place_.total;
    return true;
  }

  RingGeometry ring_;
  uint64_t num_slots_;
  Place place_;
  const Proxy& proxy_;
  CommandWriter& writer_;
  uint64_t begin_;
  uint64_t written_ = 0;
  bool pending_ = false;
};

class RecvRing {
 public:
  struct Place {
    const uint8_t* base;
    const uint64_t* count;  // registered word: chunks that arrived
    uint32_t credit_channel;
    uint64_t* total;  // chunks drained over the life of the ring
  };

  RecvRing(const RingGeometry& ring, uint64_t num_slots, const Place& place, CommandWriter& writer)
      : ring_(ring), num_slots_(num_slots), place_(place), writer_(writer), begin_(*place.total) {}

  // Slots of this operation that have arrived.
  uint64_t available() const {
    const uint64_t chunks = load_acquire(place_.count) - begin_;  // partner: proxy's put_signal
    const uint64_t slots = chunks * ring_.slots_per_chunk;
    return slots < num_slots_ ? slots : num_slots_;
  }
  const uint8_t* slot(uint64_t index) const { return place_.base + ring_.slot_offset(index); }

  // All slots below `consumed` have been read. Gives back the chunks that are drained.
  void release(uint64_t consumed) {
    const uint64_t chunks = consumed == num_slots_ ? num_chunks_of(ring_, num_slots_)
                                                   : consumed / ring_.slots_per_chunk;
    while (begin_ + chunks > *place_.total) {
      const uint64_t news = begin_ + chunks - *place_.total;
      const uint32_t count = uint32_t(news < kMaxCommandCount ? news : kMaxCommandCount);
      if (!writer_.push(encode({CommandKind::kSignal, place_.credit_channel, count, 0, 0, 0})))
        return;
      *place_.total += count;
    }
  }
  bool is_drained() const { return *place_.total == begin_ + num_chunks_of(ring_, num_slots_); }
  uint64_t num_slots() const { return num_slots_; }

 private:
  RingGeometry ring_;
  uint64_t num_slots_;
  Place place_;
  CommandWriter& writer_;
  uint64_t begin_;
};

// Life-long chunk totals of every ring end of a rank.
struct RingTotals {
  explicit RingTotals(const Group& group)
      : dispatch_sent(size_t(group.num_nodes())),
        combine_received(size_t(group.num_nodes())),
        dispatch_received(size_t(group.num_ranks())),
        combine_sent(size_t(group.num_ranks())) {}
  std::vector<uint64_t> dispatch_sent;      // [node]
  std::vector<uint64_t> combine_received;   // [node]
  std::vector<uint64_t> dispatch_received;  // [source]
  std::vector<uint64_t> combine_sent;       // [source]
};

}  // namespace commlib
