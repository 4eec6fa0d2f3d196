// Both ends of a ring between nodes: what there is to do, where it lies, and what the network is
// told.
#pragma once

#include "cuda/tier_exchange.cuh"

namespace commlib::cuda {

constexpr int kDone = -1, kBroken = -2;

struct Batch {
  int ring;  // or kDone, kBroken
  uint32_t first, end;
};

// Where it is told, at the collector, that a partial row of `source` from `writer` has come.
__device__ inline uint64_t partial_flag(const Mesh& mesh, int source, int writer) {
  const DeviceFabric& fabric = *mesh.fabric;
  return (uint64_t(source) * fabric.max_local_ranks + fabric.local_rank_of[writer]) *
         mesh.max_tokens;
}

// At most, or one chunk: a block that fills more before it tells leaves the network without work,
// and one that takes in more keeps the sender from room.
constexpr uint64_t kBatchBytes = 2 << 20;

// Slots of the next batch of a block that serves ring i alone and has done the first `done`. Half a
// ring at a time: the other half is on its way.
template <typename Side>
__device__ uint32_t batch_slots(const Side& side, uint32_t i, uint32_t done) {
  const RingGeometry ring = side.ring(i);
  const uint64_t total = side.total(i);
  const uint64_t ready = side.num_ready(i, total - num_chunks_of(ring, done));
  if (ready <= total) return 0;
  const uint64_t half = ring.num_chunks / 2, few = kBatchBytes / ring.chunk_bytes();
  uint64_t most = half < few ? half : few;
  if (most == 0) most = 1;
  return uint32_t((ready - total < most ? ready - total : most) * ring.slots_per_chunk);
}

// The rings of one side of a kernel; `i` is a ring's place in the list that blocks divide among them.
template <typename End>
struct RingList {
  const Mesh& mesh;
  const End* ends;  // by node or by source
  uint64_t* totals;
  const uint32_t* counts;  // slots of ring i: counts[numbers[i] * count_step]
  uint32_t count_step;
  const int32_t* numbers;  // ring i is `ends[numbers[i]]`
  int fifo;
  uint32_t slot_bytes;
  bool is_by_source;

  __device__ const End& end(uint32_t i) const { return ends[numbers[i]]; }
  __device__ uint64_t& total(uint32_t i) const { return totals[numbers[i]]; }
  __device__ uint64_t num_slots(uint32_t i) const { return counts[numbers[i] * count_step]; }
  __device__ RingGeometry ring(uint32_t i) const {
    return make_ring(mesh.fabric->ring_bytes, mesh.fabric->chunk_bytes, slot_bytes, num_slots(i));
  }
  __device__ int peer(uint32_t i) const {
    return is_by_source ? numbers[i] : mesh.fabric->rail[mesh.rank][numbers[i]];
  }
  __device__ uint8_t* slot(uint32_t i, uint32_t number) const {
    return ring_at(mesh, end(i).local_offset + ring(i).slot_offset(number));
  }
};

// The sending end.
struct Outgoing : RingList<SendEnd> {
  __device__ Phase phase() const { return kScaleOut; }
  // Chunks over the life of the ring for which there is room, in an operation that began after
  // `begin` of them: the receiver has drained what lay there, and its puts are complete here.
  __device__ uint64_t num_ready(uint32_t i, uint64_t begin) const {
    // Partner: the credit signal of the receiver's proxy.
    const uint64_t credits = commlib::load_acquire(registered<uint64_t>(mesh, end(i).credit));
    const uint64_t completed = completed_puts(mesh, end(i).channel);
    const uint64_t drained = credits < completed ? credits : completed;
    // Not before all of the last operation, whose slots were of another size.
    return drained < begin ? begin : drained + ring(i).num_chunks;
  }
  // Posts the chunks of a batch.
  __device__ bool tell(const Batch& batch) const {
    const uint32_t i = uint32_t(batch.ring);
    const RingGeometry geometry = ring(i);
    for (uint64_t first = batch.first; first < batch.end; first += geometry.slots_per_chunk) {
      const uint64_t rest = batch.end - first;
      const uint64_t slots = rest < geometry.slots_per_chunk ? rest : geometry.slots_per_chunk;
      const uint64_t offset = geometry.slot_offset(first);
      if (!push_command(mesh, fifo,
                        encode({CommandKind::kPut, end(i).channel, 1, uint32_t(slots * slot_bytes),
                                end(i).local_offset + offset, end(i).remote_offset + offset})))
        return false;
      ++total(i);
    }
    return true;
  }
};

// The receiving end.
struct Incoming : RingList<RecvEnd> {
  Phase what;

  __device__ Phase phase() const { return what; }
  // Chunks over the life of the ring that have come. Partner: the put_signal of the sender's proxy.
  __device__ uint64_t num_ready(uint32_t i, uint64_t) const {
    return commlib::load_acquire(registered<uint64_t>(mesh, end(i).count));
  }
  // Gives the chunks of a batch back.
  __device__ bool tell(const Batch& batch) const {
    const uint32_t i = uint32_t(batch.ring);
    const uint64_t per_chunk = ring(i).slots_per_chunk;
    uint64_t chunks = (batch.end - batch.first + per_chunk - 1) / per_chunk;
    while (chunks > 0) {
      const uint32_t count = uint32_t(chunks < kMaxCommandCount ? chunks : kMaxCommandCount);
      if (!push_command(mesh, fifo,
                        encode({CommandKind::kSignal, end(i).credit_channel, count, 0, 0, 0})))
        return false;
      total(i) += count;
      chunks -= count;
    }
    return true;
  }
};

}  // namespace commlib::cuda
