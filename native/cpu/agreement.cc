#include "cpu/agreement.hpp"

namespace commlib {

const char* op_name(OpKind kind) {
  switch (kind) {
    case OpKind::kDispatch:
      return "dispatch";
    case OpKind::kCachedDispatch:
      return "cached_dispatch";
    case OpKind::kCombine:
      return "combine";
    case OpKind::kBarrier:
      return "barrier";
  }
  return "?";
}

namespace {

const char* dtype_name(Dtype dtype) {
  return dtype == Dtype::kF32 ? "float32" : dtype == Dtype::kBf16 ? "bfloat16" : "float8_e4m3fn";
}

}  // namespace

std::string describe_call(const Op& op) {
  std::string text = op_name(op.kind);
  const bool is_dispatch = op.kind == OpKind::kDispatch || op.kind == OpKind::kCachedDispatch;
  if (is_dispatch) {
    static const char* const kCasts[] = {"none", "e4m3", "e4m3_pow2"};
    text += std::string(" dtype=") + dtype_name(op.dispatch.dtype) +
            " cast=" + kCasts[size_t(op.dispatch.cast)];
  }
  if (op.kind == OpKind::kDispatch)
    text += std::string(" layout=") +
            (op.dispatch.layout == Layout::kGrouped ? "grouped" : "rows") +
            " expert_alignment=" + std::to_string(op.dispatch.alignment);
  if (op.kind == OpKind::kCombine)
    text += std::string(" dtype=") + dtype_name(op.combine.dtype) +
            " weight_grads=" + (op.combine.has_weight_grads ? "yes" : "no");
  if (op.kind == OpKind::kCachedDispatch || op.kind == OpKind::kCombine)
    text += " handle=" + std::to_string(op.handle ? op.handle->epoch : 0);
  return text;
}

Outcome judge(const ExchangeTable& table) {
  Outcome outcome;
  outcome.kind = OutcomeKind::kDone;
  const auto add = [&outcome](size_t rank, const std::string& text) {
    if (!outcome.message.empty()) outcome.message += "; ";
    outcome.message += "rank " + std::to_string(rank) + ": " + text;
  };
  for (size_t rank = 0; rank < table.headers.size(); ++rank) {
    const ExchangeHeader& header = table.headers[rank];
    if (header.status == RowStatus::kOk) continue;
    if (outcome.kind != OutcomeKind::kRejected)
      outcome.kind =
          header.status == RowStatus::kRejected ? OutcomeKind::kRejected : OutcomeKind::kCapacity;
    if (header.status == RowStatus::kCapacity) {
      outcome.needed = header.needed;
      outcome.available = header.grant_bytes;
    }
    add(rank, header.text);
  }
  if (outcome.kind != OutcomeKind::kDone) return outcome;
  for (size_t rank = 1; rank < table.headers.size(); ++rank) {
    if (table.headers[rank].config_hash == table.headers[0].config_hash) continue;
    outcome.kind = OutcomeKind::kRejected;
    outcome.message = "ranks disagree about the call: rank 0 calls '" +
                      std::string(table.headers[0].text) + "', rank " + std::to_string(rank) +
                      " calls '" + table.headers[rank].text + "'";
    return outcome;
  }
  return outcome;
}

LandingShape landing_shape(const Op& op, size_t hidden, int num_topk) {
  const DispatchCall& call = op.dispatch;
  const Dtype payload = call.cast == Cast::kNone ? call.dtype : Dtype::kE4m3;
  LandingShape shape;
  shape.row_bytes = hidden * dtype_bytes(payload);
  shape.scales_bytes = payload == Dtype::kE4m3 ? hidden / kScaleBlock * sizeof(float) : 0;
  shape.num_topk = num_topk;
  shape.is_fresh = op.kind == OpKind::kDispatch;
  shape.layout = shape.is_fresh ? call.layout : op.handle->layout;
  shape.alignment = shape.is_fresh ? call.alignment : op.handle->alignment;
  return shape;
}

SlotLayout combine_slot(const Op& op, size_t hidden, int num_topk) {
  const size_t grads = op.combine.has_weight_grads ? size_t(num_topk) * sizeof(float) : 0;
  return make_slot(hidden * dtype_bytes(op.combine.dtype), 0, grads);
}

std::vector<size_t> needed_bytes(const Group& group, const Op& op, const ExchangeTable& table,
                                 size_t hidden, int num_topk) {
  std::vector<size_t> needed(size_t(group.num_ranks()), 0);
  for (int rank = 0; rank < group.num_ranks(); ++rank) {
    if (op.kind == OpKind::kDispatch)
      needed[size_t(rank)] =
          dispatch_landing(group, table.counts, landing_shape(op, hidden, num_topk), rank)
              .total_bytes;
    else if (op.kind == OpKind::kCachedDispatch)
      needed[size_t(rank)] =
          dispatch_landing(group, op.handle->counts, landing_shape(op, hidden, num_topk), rank)
              .total_bytes;
    else if (op.kind == OpKind::kCombine)
      needed[size_t(rank)] = CombineLanding(group, op.handle->counts,
                                            combine_slot(op, hidden, num_topk).slot_bytes, rank)
                                 .total_bytes();
  }
  return needed;
}

}  // namespace commlib
