// The roles of combine: reduce on the expert rank, forward_reduce on the rail, final_reduce at
// home.
#pragma once

#include <memory>
#include <vector>

#include "cpu/op.hpp"
#include "cpu/ring_ends.hpp"
#include "cpu/role.hpp"
#include "cpu/routing_plan.hpp"
#include "layout/slot.hpp"

namespace commlib {

struct CombineContext {
  const Mesh* mesh;
  Proxy* proxy;
  RingTotals* totals;
  const HandleData* handle;
  CombineCall call;
  uint64_t epoch;
  int chunk_tokens;
  size_t ring_bytes;
  size_t chunk_bytes;
  size_t hidden;
  SlotLayout slot;               // partial row, then num_topk weight gradients if asked
  std::vector<uint64_t> grants;  // [rank] offset of the landing in its arena
  std::vector<std::unique_ptr<CombineLanding>> landing;  // [rank] for the ranks of this node

  const Group& group() const { return mesh->group(); }
  bool has_weight_grads() const { return slot.tail_bytes > 0; }
  RingGeometry ring(uint64_t num_slots) const {
    return make_ring(ring_bytes, chunk_bytes, slot.slot_bytes, num_slots);
  }
  // First slot of (source, writer) at the rank that collects source's rows on this node.
  uint8_t* landing_slots(int collector, int source, int writer) const {
    return mesh->arena_base(collector) + grants[size_t(collector)] +
           landing[size_t(collector)]->offset(source, writer);
  }
};

std::vector<std::unique_ptr<Role>> make_combine_roles(const CombineContext& context,
                                                      std::vector<CommandWriter>& writers);

}  // namespace commlib
