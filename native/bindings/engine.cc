// The engine. Addresses of tensors cross as integers; the caller keeps the tensors alive until the
// operation is over.
#include "cpu/engine.hpp"

#include <nanobind/stl/map.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bindings/bindings.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace commlib::bindings {
namespace {

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

std::shared_ptr<Op> submit(Engine& engine, std::shared_ptr<Op> op) {
  nb::gil_scoped_release release;  // it waits while the queue is full
  engine.submit(op);
  return op;
}

std::shared_ptr<Op> dispatch(Engine& engine, uintptr_t x, uintptr_t scales, uintptr_t topk_idx,
                             uintptr_t topk_weights, int64_t num_tokens, uint32_t dtype,
                             uint32_t cast, uint32_t layout, size_t alignment,
                             std::shared_ptr<HandleData> handle) {
  auto op = std::make_shared<Op>();
  op->kind = handle ? OpKind::kCachedDispatch : OpKind::kDispatch;
  op->handle = std::move(handle);
  op->dispatch = {pointer<void>(x),
                  pointer<float>(scales),
                  pointer<int64_t>(topk_idx),
                  pointer<float>(topk_weights),
                  num_tokens,
                  Dtype(dtype),
                  Cast(cast),
                  Layout(layout),
                  alignment};
  return submit(engine, op);
}

std::shared_ptr<Op> combine(Engine& engine, std::shared_ptr<HandleData> handle, uintptr_t y,
                            uintptr_t row_weights, bool has_weight_grads, uintptr_t weight_grads,
                            uintptr_t out, uintptr_t out_weight_grads, uint32_t dtype) {
  auto op = std::make_shared<Op>();
  op->kind = OpKind::kCombine;
  op->handle = std::move(handle);
  op->combine = {pointer<void>(y),   pointer<float>(row_weights),
                 has_weight_grads,   pointer<float>(weight_grads),
                 pointer<void>(out), pointer<float>(out_weight_grads),
                 Dtype(dtype)};
  return submit(engine, op);
}

// The caller refused its own input: publish the reason in place of the operation.
std::shared_ptr<Op> reject(Engine& engine, const std::string& reason) {
  auto op = std::make_shared<Op>();
  op->kind = OpKind::kBarrier;
  op->reject = reason;
  return submit(engine, op);
}

std::shared_ptr<Op> barrier(Engine& engine) { return submit(engine, std::make_shared<Op>()); }

nb::bytes address(const Engine& engine) {
  const auto blob = engine.address();
  return nb::bytes(reinterpret_cast<const char*>(blob.data()), blob.size());
}

void connect(Engine& engine, const std::vector<nb::bytes>& blobs) {
  std::vector<std::vector<uint8_t>> addresses;
  for (const nb::bytes& blob : blobs) {
    const auto* data = reinterpret_cast<const uint8_t*>(blob.c_str());
    addresses.emplace_back(data, data + blob.size());
  }
  nb::gil_scoped_release release;
  engine.connect(addresses);
}

nb::dict counters(const Engine& engine) {
  nb::dict out;
  const ProxyCounters proxy = engine.proxy_counters();
  out["commands"] = proxy.commands;
  out["data_bytes"] = proxy.data_bytes;
  out["exchange_bytes"] = proxy.exchange_bytes;
  out["signals"] = proxy.signals;
  nb::dict roles;
  for (const auto& [name, role] : engine.role_counters()) {
    nb::dict values;
    values["rows"] = role.rows;
    values["bytes_read"] = role.bytes_read;
    values["bytes_written"] = role.bytes_written;
    roles[name.c_str()] = values;
  }
  out["roles"] = roles;
  return out;
}

nb::dict memory(const Engine& engine) {
  const MemoryReport report = engine.memory();
  nb::dict out;
  out["registered_bytes"] = report.registered_bytes;
  out["arena_bytes"] = report.arena_bytes;
  out["arena_used_bytes"] = report.arena_used_bytes;
  return out;
}

void register_config(nb::module_& module) {
  nb::class_<EngineConfig>(module, "EngineConfig")
      .def(nb::init<>())
      .def_rw("rank", &EngineConfig::rank)
      .def_rw("node_of_rank", &EngineConfig::node_of_rank)
      .def_rw("hidden", &EngineConfig::hidden)
      .def_rw("num_experts", &EngineConfig::num_experts)
      .def_rw("num_topk", &EngineConfig::num_topk)
      .def_rw("num_threads", &EngineConfig::num_threads)
      .def_rw("num_proxy_threads", &EngineConfig::num_proxy_threads)
      .def_rw("chunk_tokens", &EngineConfig::chunk_tokens)
      .def_rw("chunk_bytes", &EngineConfig::chunk_bytes)
      .def_rw("ring_bytes", &EngineConfig::ring_bytes)
      .def_rw("arena_bytes", &EngineConfig::arena_bytes)
      .def_rw("max_arena_bytes", &EngineConfig::max_arena_bytes)
      .def_rw("max_in_flight", &EngineConfig::max_in_flight)
      .def_rw("timeout_s", &EngineConfig::timeout_s)
      .def_rw("heartbeat_timeout_s", &EngineConfig::heartbeat_timeout_s)
      .def_rw("config_digest", &EngineConfig::config_digest)
      .def_rw("transport", &EngineConfig::transport)
      .def_rw("transport_options", &EngineConfig::transport_options);
}

void register_transport_options(nb::module_& module) {
  nb::class_<TransportOptions>(module, "TransportOptions")
      .def(nb::init<>())
      .def_rw("local_rank", &TransportOptions::local_rank)
      .def_rw("node", &TransportOptions::node)
      .def_rw("near_pci", &TransportOptions::near_pci)
      .def_rw("nics", &TransportOptions::nics)
      .def_rw("max_nics", &TransportOptions::max_nics)
      .def_rw("gid_index", &TransportOptions::gid_index)
      .def_rw("mtu", &TransportOptions::mtu)
      .def_rw("ack_timeout", &TransportOptions::ack_timeout)
      .def_rw("retry_count", &TransportOptions::retry_count)
      .def_rw("rnr_retry_count", &TransportOptions::rnr_retry_count)
      .def_rw("traffic_class", &TransportOptions::traffic_class)
      .def_rw("service_level", &TransportOptions::service_level)
      .def_rw("signal_by_immediate", &TransportOptions::signal_by_immediate)
      .def_rw("send_operations", &TransportOptions::send_operations)
      .def_rw("send_bytes", &TransportOptions::send_bytes);
}

}  // namespace

void register_engine(nb::module_& module) {
  register_transport_options(module);
  register_config(module);
  nb::class_<Engine>(module, "Engine")
      .def(nb::init<const EngineConfig&>(), nb::call_guard<nb::gil_scoped_release>())
      .def("address", &address)
      .def("connect", &connect, "addresses"_a)
      .def("dispatch", &dispatch, "x"_a, "scales"_a, "topk_idx"_a, "topk_weights"_a, "num_tokens"_a,
           "dtype"_a, "cast"_a, "layout"_a, "alignment"_a, "handle"_a.none())
      .def("combine", &combine, "handle"_a, "y"_a, "row_weights"_a, "has_weight_grads"_a,
           "weight_grads"_a, "out"_a, "out_weight_grads"_a, "dtype"_a)
      .def("reject", &reject, "reason"_a)
      .def("barrier", &barrier)
      .def("close", &Engine::close, nb::call_guard<nb::gil_scoped_release>())
      .def("abandon", &Engine::abandon, nb::call_guard<nb::gil_scoped_release>())
      .def("status", &Engine::status)
      .def("describe_transport", &Engine::describe_transport)
      .def("counters", &counters)
      .def("memory", &memory);
}

}  // namespace commlib::bindings
