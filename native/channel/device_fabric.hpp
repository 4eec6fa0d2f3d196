// What a kernel needs of the scale-out side of its rank: where rings, counters, FIFOs and
// completions lie, who is whose rail, and the ends of the rings. Filled by the host once
// (native/proxy/fabric.cc), copied to device memory; only `state` changes there.
#pragma once

#include "channel/fifo.hpp"
#include "channel/ring.hpp"

namespace commlib {

constexpr int kMaxFabricRanks = 32;   // one lane per rank, one per node
constexpr int kMaxFabricThreads = 8;  // proxy threads
constexpr int kMaxFabricFifos = (1 + 2 * kMaxFabricRanks) * kMaxFabricThreads;
constexpr int kMaxFabricChannels = 5 * kMaxFabricRanks;

// One outgoing ring of this rank and its far end.
struct SendEnd {
  uint64_t local_offset;   // of the ring in the own registered region
  uint64_t remote_offset;  // in the receiver's
  uint64_t credit;         // offset of the own word: chunks that the receiver has drained
  uint32_t channel;
  uint32_t reserved;
};

struct RecvEnd {
  uint64_t local_offset;
  uint64_t count;           // offset of the own word: chunks that arrived
  uint32_t credit_channel;  // on which drained chunks are told
  uint32_t reserved;
};

// Of blocks that serve one ring together, see native/cuda/tier_team.cuh.
struct TeamWords {
  uint64_t turn;        // epoch << 32 | chunks of it that have been told
  uint64_t total;       // chunks over the life of the ring before these
  uint64_t ready;       // of all over its life, those that may be served
  uint32_t is_looking;  // some block looks whether there are more
};

// Written by the kernels of one Runtime, one after the other.
struct FabricState {
  uint64_t dispatch_sent[kMaxFabricRanks];      // [node] chunks over the life of the ring
  uint64_t combine_received[kMaxFabricRanks];   // [node]
  uint64_t dispatch_received[kMaxFabricRanks];  // [source]
  uint64_t combine_sent[kMaxFabricRanks];       // [source]
  uint64_t fifo_head[kMaxFabricFifos];          // [writer][proxy thread]
  uint64_t fifo_cached_tail[kMaxFabricFifos];
  uint32_t node_totals[kMaxFabricRanks];  // own tokens to each node, while they are counted
  TeamWords team[2][kMaxFabricRanks];     // [side][place of the ring among those of its side]
};

struct DeviceFabric {
  int32_t num_nodes, node, max_local_ranks, num_in_sources;
  int32_t num_proxy_threads, reserved;
  uint64_t ring_bytes, chunk_bytes;
  uint8_t* memory;  // the registered region up to `control_bytes`
  uint8_t* rings;   // and from there on
  uint64_t control_bytes;
  uint8_t* fifos;  // [writer][proxy thread]: commands, then the tail
  uint64_t fifo_stride, fifo_tail, fifo_capacity;
  uint8_t* completions;  // [channel] line: puts whose local bytes may be reused
  uint8_t proxy_thread_of[kMaxFabricChannels];  // a channel's commands all take one way
  int32_t node_of[kMaxFabricRanks];
  int32_t local_rank_of[kMaxFabricRanks];
  int32_t remote_nodes[kMaxFabricRanks];           // ascending
  int32_t in_sources[kMaxFabricRanks];             // ascending
  int32_t source_index[kMaxFabricRanks];           // [rank] place among the in_sources; -1: none
  uint8_t rail[kMaxFabricRanks][kMaxFabricRanks];  // [source][node]
  SendEnd dispatch_send[kMaxFabricRanks];          // [node]
  RecvEnd combine_recv[kMaxFabricRanks];           // [node]
  RecvEnd dispatch_recv[kMaxFabricRanks];          // [source]
  SendEnd combine_send[kMaxFabricRanks];           // [source]
  uint64_t exchange_remote[2][kMaxFabricRanks];    // [generation][node]: own row at the rail there
  uint64_t exchange_in[2][kMaxFabricRanks];        // [generation][source]
  uint64_t exchange_out[2];
  uint64_t exchange_count[kMaxFabricRanks];    // [source] offset of the own word: rows that arrived
  uint32_t exchange_channel[kMaxFabricRanks];  // [node]
  FabricState state;
};

}  // namespace commlib
