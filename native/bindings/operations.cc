// Operations, handles and the memory they hand out.
#include <nanobind/ndarray.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bindings/bindings.hpp"
#include "cpu/op.hpp"

namespace nb = nanobind;

namespace commlib::bindings {
namespace {

using Bytes = nb::ndarray<nb::numpy, uint8_t, nb::ndim<1>>;

// A writable view of part of a slab that keeps the slab alive.
Bytes view(const std::shared_ptr<Slab>& slab, size_t offset, size_t bytes) {
  auto* kept = new std::shared_ptr<Slab>(slab);
  nb::capsule owner(kept, [](void* p) noexcept { delete static_cast<std::shared_ptr<Slab>*>(p); });
  return Bytes(slab->data() + offset, {bytes}, owner);
}

// Waits without the GIL, looking for signals (Ctrl-C) ten times a second.
Outcome wait(Op& op) {
  for (;;) {
    Outcome outcome;
    {
      nb::gil_scoped_release release;
      outcome = op.wait_for(0.1);
    }
    if (outcome.kind != OutcomeKind::kPending) return outcome;
    if (PyErr_CheckSignals() != 0) throw nb::python_error();
  }
}

}  // namespace

nb::dict fault_dict(const FaultRecord& fault) {
  nb::dict out;
  out["kind"] = int(fault.kind);
  out["rank"] = fault.rank;
  out["peer"] = fault.peer;
  out["channel"] = fault.channel;
  out["code"] = fault.code;
  out["tag"] = fault.tag;
  out["expected"] = fault.expected;
  out["seen"] = fault.seen;
  out["phase"] = std::string(fault.phase);
  out["detail"] = std::string(fault.detail);
  return out;
}

void register_operations(nb::module_& module) {
  nb::enum_<OutcomeKind>(module, "OutcomeKind")
      .value("PENDING", OutcomeKind::kPending)
      .value("DONE", OutcomeKind::kDone)
      .value("REJECTED", OutcomeKind::kRejected)
      .value("CAPACITY", OutcomeKind::kCapacity)
      .value("FAULT", OutcomeKind::kFault);

  nb::class_<Outcome>(module, "Outcome")
      .def_ro("kind", &Outcome::kind)
      .def_ro("message", &Outcome::message)
      .def_ro("needed", &Outcome::needed)
      .def_ro("available", &Outcome::available)
      .def_ro("waited_phase", &Outcome::waited_phase)
      .def_ro("waited_peer", &Outcome::waited_peer)
      .def_ro("waited_channel", &Outcome::waited_channel)
      .def_prop_ro("fault", [](const Outcome& o) { return fault_dict(o.fault); });

  nb::class_<HandleData>(module, "HandleData")
      .def_ro("epoch", &HandleData::epoch)
      .def_ro("num_tokens", &HandleData::num_tokens)
      .def_ro("num_rows", &HandleData::num_rows)
      .def_prop_ro("num_records", &HandleData::num_records)
      .def_ro("rows_per_expert", &HandleData::rows_per_expert)
      .def_prop_ro("load",
                   [](const HandleData& handle) {  // tokens per expert over all ranks
                     const RoutingCounts& counts = handle.counts;
                     std::vector<uint64_t> load(size_t(counts.num_experts), 0);
                     for (int s = 0; s < counts.num_ranks; ++s)
                       for (int e = 0; e < counts.num_experts; ++e)
                         load[size_t(e)] += counts.expert(s, e);
                     return load;
                   })
      .def_prop_ro("tokens_per_rank",
                   [](const HandleData& handle) {  // [source][rank]
                     const RoutingCounts& counts = handle.counts;
                     std::vector<std::vector<uint32_t>> table;
                     for (int s = 0; s < counts.num_ranks; ++s) {
                       table.emplace_back();
                       for (int r = 0; r < counts.num_ranks; ++r)
                         table.back().push_back(counts.rank(s, r));
                     }
                     return table;
                   })
      .def_prop_ro("tokens_per_node", [](const HandleData& handle) {  // [source][node]
        const RoutingCounts& counts = handle.counts;
        std::vector<std::vector<uint32_t>> table;
        for (int s = 0; s < counts.num_ranks; ++s) {
          table.emplace_back();
          for (int n = 0; n < counts.num_nodes; ++n) table.back().push_back(counts.node(s, n));
        }
        return table;
      });

  nb::class_<Op>(module, "Op")
      .def("wait", &wait, "Blocks until the operation is over.")
      .def("is_finished", &Op::is_finished)
      .def_ro("handle", &Op::handle)
      .def_prop_ro(
          "spans",
          [](const Op& op) {  // (name, begin, end) in seconds of CLOCK_MONOTONIC
            nb::list spans;
            for (const OpSpan& span : op.spans)
              spans.append(nb::make_tuple(span.name, span.begin_s, span.end_s));
            return spans;
          },
          "Of a finished operation.")
      .def_prop_ro("num_rows", [](const Op& op) { return op.landing.num_rows; })
      .def("rows",
           [](const Op& op, size_t row_bytes) {
             return view(op.output, op.landing.rows_offset, op.landing.num_rows * row_bytes);
           })
      .def("scales",
           [](const Op& op, size_t scales_bytes) {
             return view(op.output, op.landing.scales_offset, op.landing.num_rows * scales_bytes);
           })
      .def("weights",
           [](const Op& op, size_t count) {
             return view(op.output, op.landing.weights_offset, count * sizeof(float));
           })
      .def("topk_idx", [](const Op& op, size_t count) {
        return view(op.output, op.landing.topk_idx_offset, count * sizeof(int64_t));
      });
}

}  // namespace commlib::bindings
