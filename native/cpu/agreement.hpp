// What the ranks must agree about before an operation moves data: the call, and room for its rows.
// Pure functions of the call and the exchanged rows, so that every rank reaches the same verdict.
#pragma once

#include <string>
#include <vector>

#include "cpu/exchange.hpp"
#include "cpu/op.hpp"
#include "cpu/routing_plan.hpp"
#include "layout/slot.hpp"

namespace commlib {

const char* op_name(OpKind kind);

// What must be equal on all ranks, in words; its hash is compared, the words are shown.
std::string describe_call(const Op& op);

// kDone if the operation may go on (room apart), else who refuses it or disagrees.
Outcome judge(const ExchangeTable& table);

// Rows as a dispatch carries them, and slots as a combine does.
LandingShape landing_shape(const Op& op, size_t hidden, int num_topk);
SlotLayout combine_slot(const Op& op, size_t hidden, int num_topk);

// [rank] bytes that the operation writes into each rank's arena.
std::vector<size_t> needed_bytes(const Group& group, const Op& op, const ExchangeTable& table,
                                 size_t hidden, int num_topk);

}  // namespace commlib
