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

// Half a ring at a time: the other half is on its way.
__device__ inline uint32_t batch_slots(const RingGeometry& ring, uint64_t chunks) {
  const uint64_t half = ring.num_chunks / 2, few = kBatchBytes / ring.chunk_bytes();
  uint64_t most = half < few ? half : few;
  if (most == 0) most = 1;
  return uint32_t((chunks < most ? chunks : most) * ring.slots_per_chunk);
}

// The sending end.
struct Outgoing {
  const Mesh& mesh;
  const SendEnd* ends;  // by node or by source
  uint64_t* totals;
  const uint32_t* counts;  // slots of ring i: counts[i * count_step]
  uint32_t count_step;
  const int32_t* numbers;  // ring i of the block's list is `ends[numbers[i]]`
  int fifo;
  uint32_t slot_bytes;
  bool is_by_source;

  __device__ uint64_t num_slots(uint32_t i) const { return counts[numbers[i] * count_step]; }
  __device__ RingGeometry ring(uint32_t i) const {
    return make_ring(mesh.fabric->ring_bytes, mesh.fabric->chunk_bytes, slot_bytes, num_slots(i));
  }
  __device__ Phase phase() const { return kScaleOut; }
  __device__ int peer(uint32_t i) const {
    return is_by_source ? numbers[i] : mesh.fabric->rail[mesh.rank][numbers[i]];
  }
  // Chunks that the receiver has drained, and whose puts are complete here.
  __device__ uint64_t num_drained(const SendEnd& end) const {
    // Partner: the credit signal of the receiver's proxy.
    const uint64_t credits = commlib::load_acquire(registered<uint64_t>(mesh, end.credit));
    const uint64_t completed = completed_puts(mesh, end.channel);
    return credits < completed ? credits : completed;
  }
  // Slots for which there is room.
  __device__ uint32_t ready(uint32_t i, uint32_t done) const {
    const SendEnd& end = ends[numbers[i]];
    const RingGeometry geometry = ring(i);
    const uint64_t drained = num_drained(end), total = totals[numbers[i]];
    const uint64_t begin = total - num_chunks_of(geometry, done);
    if (drained < begin) return 0;  // of the last operation, whose slots were of another size
    return batch_slots(geometry, geometry.num_chunks - (total - drained));
  }
  __device__ uint64_t total(uint32_t i) const { return totals[numbers[i]]; }
  // Chunks over the life of the ring for which there is room, in an operation that began after
  // `total` of them.
  __device__ uint64_t num_ready(uint32_t i, uint64_t total) const {
    const uint64_t drained = num_drained(ends[numbers[i]]);
    return drained < total ? total : drained + ring(i).num_chunks;
  }
  __device__ uint8_t* slot(uint32_t i, uint32_t number) const {
    return ring_at(mesh, ends[numbers[i]].local_offset + ring(i).slot_offset(number));
  }
  // Posts the chunks of a batch.
  __device__ bool tell(const Batch& batch) const {
    const SendEnd& end = ends[numbers[batch.ring]];
    const RingGeometry geometry = ring(uint32_t(batch.ring));
    for (uint64_t first = batch.first; first < batch.end; first += geometry.slots_per_chunk) {
      const uint64_t rest = batch.end - first;
      const uint64_t slots = rest < geometry.slots_per_chunk ? rest : geometry.slots_per_chunk;
      const uint64_t offset = geometry.slot_offset(first);
      if (!push_command(mesh, fifo,
                        encode({CommandKind::kPut, end.channel, 1, uint32_t(slots * slot_bytes),
                                end.local_offset + offset, end.remote_offset + offset})))
        return false;
      ++totals[numbers[batch.ring]];
    }
    return true;
  }
};

// The receiving end.
struct Incoming {
  const Mesh& mesh;
  const RecvEnd* ends;
  uint64_t* totals;
  const uint32_t* counts;
  uint32_t count_step;
  const int32_t* numbers;
  int fifo;
  uint32_t slot_bytes;
  Phase what;
  bool is_by_source;

  __device__ uint64_t num_slots(uint32_t i) const { return counts[numbers[i] * count_step]; }
  __device__ RingGeometry ring(uint32_t i) const {
    return make_ring(mesh.fabric->ring_bytes, mesh.fabric->chunk_bytes, slot_bytes, num_slots(i));
  }
  __device__ Phase phase() const { return what; }
  __device__ int peer(uint32_t i) const {
    return is_by_source ? numbers[i] : mesh.fabric->rail[mesh.rank][numbers[i]];
  }
  // Slots that have come. Partner: the put_signal of the sender's proxy.
  __device__ uint32_t ready(uint32_t i, uint32_t) const {
    const uint64_t chunks =
        commlib::load_acquire(registered<uint64_t>(mesh, ends[numbers[i]].count)) -
        totals[numbers[i]];
    return batch_slots(ring(i), chunks);
  }
  __device__ uint64_t total(uint32_t i) const { return totals[numbers[i]]; }
  // Chunks over the life of the ring that have come.
  __device__ uint64_t num_ready(uint32_t i, uint64_t) const {
    return commlib::load_acquire(registered<uint64_t>(mesh, ends[numbers[i]].count));
  }
  __device__ const uint8_t* slot(uint32_t i, uint32_t number) const {
    return ring_at(mesh, ends[numbers[i]].local_offset + ring(i).slot_offset(number));
  }
  // Gives the chunks of a batch back.
  __device__ bool tell(const Batch& batch) const {
    const uint64_t per_chunk = ring(uint32_t(batch.ring)).slots_per_chunk;
    uint64_t chunks = (batch.end - batch.first + per_chunk - 1) / per_chunk;
    while (chunks > 0) {
      const uint32_t count = uint32_t(chunks < kMaxCommandCount ? chunks : kMaxCommandCount);
      if (!push_command(mesh, fifo,
                        encode({CommandKind::kSignal, ends[numbers[batch.ring]].credit_channel,
                                count, 0, 0, 0})))
        return false;
      totals[numbers[batch.ring]] += count;
      chunks -= count;
    }
    return true;
  }
};

}  // namespace commlib::cuda
