// What the host hands to the kernels, and what kernels leave for the host and for each other.
// commlib/cuda/params.py mirrors the structs that the host fills or reads; a compile-time check
// generated there compares every offset.
#pragma once

#include "channel/device_fabric.hpp"

namespace commlib::cuda {

constexpr int kMaxRanks = 32;  // one lane per rank
constexpr int kMaxTopk = 32;   // one lane per slot of a token
constexpr int kTextWords = 40;

enum OpKind : uint32_t {
  kDispatch = 1,
  kCachedDispatch = 2,
  kCombine = 3,
  kBarrier = 4,
  kGrow = 5,  // the header's text holds what peers need to map a new heap
};
enum Status : uint32_t {
  kOk = 0,
  kBadExpert = 1,
  kDuplicate = 2,
  kBadWeight = 3,
  kRejected = 4,  // by the host's own checks; the header carries its text
};
enum Verdict : uint32_t {
  kPending = 0,
  kGo = 1,
  kRefused = 2,
  kNoRoom = 3,
  kFaulty = 4,
  kOverflow = 5,  // a rank has more rows than the call's capacity
};
enum Phase : uint32_t {
  kExchange = 1,
  kExpand = 2,
  kFinalReduce = 3,
  kRoom = 4,  // latency regime: for the slots of the operation before the last
  kTakeIn = 5,
  kAddUp = 6,
  kScaleOut = 7,  // for room in a ring between nodes, or in a FIFO
  kForward = 8,
  kHomecoming = 9,
  kForwardReduce = 10,
};
enum RowOrder : uint32_t { kGrouped = 0, kRows = 1 };
enum Cast : uint32_t { kNoCast = 0, kCastFp32 = 1, kCastPow2 = 2 };

// A wait that passed its deadline. The same bytes lie in the peers' arenas and in host memory.
struct FaultNote {
  uint32_t kind;  // 0: none; the host waits for this word of its board
  uint32_t phase;
  int32_t rank;
  int32_t peer;
  uint64_t epoch;
  uint64_t expected;
  uint64_t seen;
};

// One call, as far as all ranks must agree on it; equal words on all ranks or nothing moves.
struct CallWords {
  uint32_t kind, dtype, cast, layout, alignment, has_grads, handle_epoch;
  uint32_t capacity;  // rows of a dispatch's output; 0: as many as come
};

// Head of an exchange row; tokens per expert [E] and distinct tokens per rank [R] follow as uint32.
struct ExchangeHeader {
  uint64_t epoch;
  uint64_t grant_offset;  // where the landing of this operation starts in the rank's heap
  uint64_t grant_bytes;   // room there
  uint32_t status;
  uint32_t bad_index;  // token * num_topk + slot
  int64_t bad_value;
  CallWords call;
  uint32_t text[kTextWords];
};

// Where the parts of a dispatch's output lie inside its grant.
struct Landing {
  uint64_t num_rows, num_records;
  uint64_t rows, scales, weights, topk_idx;  // byte offsets
  uint64_t output_bytes;                     // end of what the caller gets
  uint64_t records;                          // goes to the handle
  uint64_t total_bytes;
};

// In pinned host memory. Behind it, uint32: distinct tokens [source][rank], rows of each local
// expert, tokens per expert over all ranks.
struct HostResult {
  uint64_t ticket;  // of the call; written last; partner: the host's read of it
  uint32_t verdict;
  uint32_t reserved;
  Landing landing;
  uint64_t needed[kMaxRanks];
  ExchangeHeader headers[kMaxRanks];
};

// Device memory of one handle.
struct Tables {
  uint32_t* rank_counts;      // [source][rank] distinct tokens
  uint32_t* num_rows;         // [rank]
  uint32_t* rows_per_expert;  // [local expert], no padding
  uint32_t* expert_offset;    // [local expert + 1]
  uint32_t* node_counts;      // [source][node] distinct tokens; several nodes only
  uint32_t* state;            // 0: as it should be; 1: refused or overflowed, all counts are 0
};

struct Route {     // of one slot of an own token
  int32_t rank;    // -1: masked
  int32_t row;     // in the output of that rank
  int32_t record;  // number among the records that go from here to that rank
  int32_t expert;
};

// What the exchange settles about one peer for the kernel that follows.
struct PeerPlan {
  uint8_t* rows;  // dispatch: its landing
  float* scales;
  uint8_t* records;      // where my first record goes
  uint8_t* partial_out;  // combine: where my first partial row goes (that rank is the source)
  uint8_t* partial_in;   // combine: first partial row from that rank
  uint32_t record_base;  // number of records it gets from ranks below me
  uint32_t num_from;     // records that come from there
  uint32_t first_from;   // index of the first of them
  uint32_t reserved;
};

struct Plan {
  uint32_t go;
  uint32_t epoch;
  float* weights;
  int64_t* topk_idx;
  uint8_t* records;
  PeerPlan peer[kMaxRanks];
  // Combine between nodes: parts of the own landing.
  uint8_t* home_in[kMaxRanks];     // [node] rows of own tokens that come from there
  uint8_t* forward_in[kMaxRanks];  // [source] of another node: partial rows of its tokens
};

// Device memory of one Runtime that no peer sees.
struct Workspace {
  uint64_t epoch;        // of the newest operation
  uint64_t input_error;  // smallest index << 8 | Status; all ones: none
  uint32_t blocks_done;
  uint32_t next_push;  // ticket counters of the roles
  uint32_t next_expand;
  uint32_t next_reduce;
  uint32_t next_final;
  uint32_t is_faulty;
  uint32_t overflowed;         // some dispatch overflowed; stays until the host clears it
  uint32_t next_own;           // likewise
  uint64_t settled;  // epoch of the newest operation whose plan is made
  Plan plan;
};

// Who we are and where everything lies. Offsets count from the base of a rank's control region.
struct Mesh {
  int32_t rank, num_ranks, num_experts, num_topk;
  int32_t max_tokens, experts_per_rank;
  uint64_t timeout_ns;
  uint64_t fault_word;      // who has written a note here: rank + 1
  uint64_t fault_note;      // [rank]
  uint64_t exchange_epoch;  // [rank] line: newest epoch whose row lies here
  uint64_t exchange_row;    // [generation][rank]
  uint64_t exchange_row_bytes;
  uint64_t dispatch_arrived;  // [source][record] uint32: epoch in which the row came
  uint64_t combine_arrived;   // [writer][record] uint32: epoch in which the partial row came
  uint64_t partial_arrived;   // several nodes: [source][local rank of the writer][record] likewise
  uint64_t home_arrived;      // several nodes: [node][slot] likewise, of rows from other nodes
  DeviceFabric* fabric;       // nullptr: one node
  FaultNote* board;           // in pinned host memory
  const uint64_t* stop;       // likewise: not 0 once the host wants all waits to end
  Workspace* workspace;
  uint8_t* base[kMaxRanks];  // nullptr: of another node
  uint8_t* heap[kMaxRanks];  // where grants count from
};

struct ExchangeCall {
  const int64_t* topk_idx;  // fresh dispatch only
  const float* topk_weights;
  uint2* slots;          // [token][slot]: place in its block's tokens of the expert, of the rank
  uint32_t* block_base;  // [block][E + R]: counts, then the first row and record of each block
  uint32_t* node_masks;  // [token] a bit per node that wants it; several nodes only
  HostResult* result;
  HostResult* refused;  // in pinned memory: keeps the first refusal of calls that nobody waits for
  Tables tables;
  uint64_t grant_offset, grant_bytes;
  uint64_t row_bytes, scales_bytes;  // dispatch: of one row as it travels
  uint64_t slot_bytes;               // combine: of one partial row with its gradients
  uint64_t ticket;                   // not 0; the host's number: epochs go on when graphs replay
  uint32_t num_tokens;
  uint32_t tokens_per_block;
  uint32_t count_blocks;  // that count tokens
  uint32_t status;
  CallWords call;
  uint32_t text[kTextWords];
};

struct DispatchCall {
  const uint8_t* x;
  const float* scales;      // of rows that come as E4M3 already
  const int64_t* topk_idx;  // nullptr: by handle
  const float* topk_weights;
  const uint2* slots;
  const uint32_t* block_base;
  const uint8_t* records;  // by handle; nullptr: those that arrive
  Route* routes;           // [token][slot], of the handle
  Tables tables;
  uint32_t num_tokens, tokens_per_block;
  uint32_t in_row_bytes, row_bytes;  // as given, as it travels
  uint32_t num_scales;
  uint32_t piece_bytes;  // of a given row, per stage
  uint32_t push_warps, push_blocks;
  uint32_t layout, alignment, cast, dtype;
  uint32_t capacity;
};

struct CombineCall {
  const uint8_t* y;
  const float* weights;       // [row] or nullptr
  const float* weight_grads;  // or nullptr
  uint8_t* out;
  float* out_weight_grads;
  const uint8_t* records;
  const Route* routes;
  uint32_t num_tokens;
  uint32_t piece_bytes;
  uint32_t slot_bytes;
  uint32_t row_bytes;
  uint32_t layout;
  uint32_t final_warps;
};

// Between nodes: the blocks that serve the network, the slots that travel, and what the handle keeps.
struct TierCall {
  const uint32_t* node_masks;
  const uint32_t* node_counts;
  uint32_t* slot_tokens;     // [node][token number]: whose row is in each slot to that node
  uint32_t* token_slots;     // [token][node]: the inverse
  uint8_t* forward_records;  // [in_source][slot]: record, then the number of each slot's record
  uint32_t num_tokens;
  uint32_t out_blocks;                   // that serve own tokens, if there are any for other nodes
  uint32_t most_in_blocks, in_per_copy;  // for those of other nodes: see role_blocks()
  uint32_t slot_bytes;
  uint32_t scales_offset, record_offset;  // dispatch
  uint32_t is_fresh;
};

template <typename T>
__device__ inline T* at(const Mesh& mesh, int rank, uint64_t offset) {
  return reinterpret_cast<T*>(mesh.base[rank] + offset);
}

__device__ inline uint8_t* exchange_row(const Mesh& mesh, int rank, uint64_t epoch, int source) {
  const uint64_t index = (epoch & 1) * uint64_t(mesh.num_ranks) + uint64_t(source);
  return mesh.base[rank] + mesh.exchange_row + index * mesh.exchange_row_bytes;
}

}  // namespace commlib::cuda
