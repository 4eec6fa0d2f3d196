// The fixed record that travels with every token: forwarders, expand and combine need nothing else.
#pragma once

#include "common/types.hpp"

namespace commlib {

// One of a token's num_topk choices. expert -1: masked. row: the final row in the output of the
// expert's rank (grouped: expert-major; rows: one per token and rank).
struct RecordEntry {
  int32_t expert;
  int32_t row;
  float weight;
};

struct RecordHeader {
  int32_t source_rank;
  int32_t token;
  int32_t num_topk;
  uint32_t epoch;  // low bits of the operation's epoch: a stale slot is recognised, never used
};

static_assert(sizeof(RecordEntry) == 12 && sizeof(RecordHeader) == 16);

constexpr int kMaxTopk = 64;  // bounds what roles keep on their stack

COMMLIB_HD constexpr size_t record_bytes(int num_topk) {
  return sizeof(RecordHeader) + sizeof(RecordEntry) * static_cast<size_t>(num_topk);
}

COMMLIB_HD RecordEntry* record_entries(void* record) {
  return reinterpret_cast<RecordEntry*>(static_cast<uint8_t*>(record) + sizeof(RecordHeader));
}

COMMLIB_HD const RecordEntry* record_entries(const void* record) {
  return reinterpret_cast<const RecordEntry*>(static_cast<const uint8_t*>(record) +
                                              sizeof(RecordHeader));
}

}  // namespace commlib
