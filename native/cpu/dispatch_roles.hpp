// The roles of dispatch: push and expand inside the node, send and forward between nodes.
#pragma once

#include <memory>
#include <vector>

#include "cpu/op.hpp"
#include "cpu/ring_ends.hpp"
#include "cpu/role.hpp"
#include "cpu/routing_plan.hpp"
#include "layout/slot.hpp"

namespace commlib {

// What all roles of one dispatch share. Read-only while they run.
struct DispatchContext {
  const Mesh* mesh;
  Proxy* proxy;
  RingTotals* totals;
  HandleData* handle;
  DispatchCall call;
  uint64_t epoch;
  bool is_fresh;
  int chunk_tokens;
  size_t ring_bytes;
  size_t chunk_bytes;
  size_t hidden;
  size_t in_row_bytes;                   // of call.x
  LandingShape shape;                    // of what travels
  std::vector<uint64_t> grants;          // [rank] offset of the landing in its arena
  std::vector<DispatchLanding> landing;  // [rank] filled for the ranks of this node

  const Group& group() const { return mesh->group(); }
  SlotLayout slot() const {
    return make_slot(shape.row_bytes, shape.scales_bytes,
                     is_fresh ? record_bytes(shape.num_topk) : 0);
  }
  RingGeometry ring(uint64_t num_slots) const {
    return make_ring(ring_bytes, chunk_bytes, slot().slot_bytes, num_slots);
  }
  // Start of a part of the landing of a rank of this node.
  uint8_t* landing_part(int rank, size_t offset) const {
    return mesh->arena_base(rank) + grants[size_t(rank)] + offset;
  }
};

// A row as it travels: cast once if asked, else a view of the caller's memory.
class RowSource {
 public:
  explicit RowSource(const DispatchContext& context);
  struct Row {
    const void* data;
    const float* scales;
  };
  Row fetch(size_t token);

 private:
  const DispatchContext& context_;
  std::vector<uint8_t> cast_row_;
  std::vector<float> cast_scales_;
};

// Writes rows of one source to the ranks of this node that want them (push and forward).
class LocalScatter {
 public:
  LocalScatter(const DispatchContext& context, int source);
  bool wants(const uint8_t* record) const;
  // Copies the row to every wanting rank; returns the number of row copies written.
  int write(const uint8_t* record, const void* row, const float* scales);
  // Publishes what was written since the last call.
  void publish();

 private:
  struct Target {
    uint8_t* rows;
    uint8_t* scales;
    uint8_t* records;
    uint64_t* arrived;
    uint64_t base;  // first record of the source at the target
    uint64_t written = 0;
    uint64_t published = 0;
  };
  void write_row(Target& target, int32_t row, const void* data, const float* scales);

  const DispatchContext& context_;
  std::vector<Target> targets_;  // [local rank]
};

std::vector<std::unique_ptr<Role>> make_dispatch_roles(const DispatchContext& context,
                                                       std::vector<CommandWriter>& writers);

}  // namespace commlib
