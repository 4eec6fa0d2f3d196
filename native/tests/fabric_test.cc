// A Fabric without an executor: what kernels do with its DeviceFabric, done by threads.
#include "proxy/fabric.hpp"

#include <doctest/doctest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <optional>
#include <thread>
#include <utility>

#include "tests/fake_transport.hpp"
#include "tests/other_rings.hpp"
#include "tests/wait_until.hpp"
#include "transport/providers.hpp"

using namespace commlib;
using namespace commlib::testing;

namespace {

constexpr size_t kRowBytes = 256, kRingBytes = 16384, kChunkBytes = 2048;
constexpr int kWriters = 3;

FabricConfig config_of(int rank, const std::vector<int>& nodes, int num_proxy_threads = 1) {
  FabricConfig config;
  config.rank = rank;
  config.node_of_rank = nodes;
  config.num_experts = int(nodes.size());
  config.num_writers = kWriters;
  config.num_proxy_threads = num_proxy_threads;
  config.exchange_row_bytes = kRowBytes;
  config.ring_bytes = kRingBytes;
  config.heartbeat_timeout_s = 60;
  config.make_transport = [](PutListener* listener, int own) {
    return make_loopback(listener, own);
  };
  return config;
}

// Takes all and completes nothing.
class SilentTransport final : public FakeTransport {
 public:
  using FakeTransport::FakeTransport;
  void register_device_region(const DeviceRegion&) override {}
};

// Finds a fault within progress(), and does not come back until it is let.
class FailingTransport final : public FakeTransport {
 public:
  FailingTransport(PutListener* listener, std::atomic<bool>* is_let)
      : FakeTransport(listener), listener_(listener), is_let_(is_let) {}
  int progress() override {
    if (std::exchange(has_failed_, true)) return FakeTransport::progress();
    fail({1, 7, "progress", "broken"});
    listener_->on_fault();
    while (!*is_let_) std::this_thread::yield();
    return 1;
  }

 private:
  PutListener* listener_;
  std::atomic<bool>* is_let_;
  bool has_failed_ = false;
};

class Fabrics {
 public:
  explicit Fabrics(const std::vector<int>& nodes, int num_proxy_threads = 1,
                   bool has_other_rings = false, const ThreadSetup& setup = {}) {
    std::vector<std::vector<uint8_t>> addresses;
    for (int rank = 0; rank < int(nodes.size()); ++rank) {
      FabricConfig config = config_of(rank, nodes, num_proxy_threads);
      config.thread_setup = setup;
      if (has_other_rings) config.rings = rings_.make(rank, nodes, kRingBytes);
      fabrics_.push_back(std::make_unique<Fabric>(config));
      addresses.push_back(fabrics_.back()->address());
    }
    for (auto& fabric : fabrics_) fabric->connect(addresses);
    for (auto& fabric : fabrics_) fabric->start_for_device();
    // What kernels wait for, too.
    for (auto& fabric : fabrics_) REQUIRE(fabric->wait_ready(10));
  }
  ~Fabrics() {
    std::vector<std::thread> threads;
    for (auto& fabric : fabrics_) threads.emplace_back([&fabric] { fabric->stop(true); });
    for (auto& thread : threads) thread.join();
  }
  Fabric& operator[](int rank) { return *fabrics_[size_t(rank)]; }
  DeviceFabric view(int rank) {
    Fabric& fabric = (*this)[rank];
    return fabric.device_view(
        {address(fabric.mesh().memory()), address(fabric.proxy().fifo_memory()),
         address(fabric.proxy().completions())},
        kChunkBytes);
  }

 private:
  static uint64_t address(const RegisteredMemory& memory) {
    return reinterpret_cast<uint64_t>(memory.base());
  }
  OtherRings rings_;
  std::vector<std::unique_ptr<Fabric>> fabrics_;
};

// As push_command in native/cuda/tier_exchange.cuh does it.
bool push(DeviceFabric& view, int writer, const CommandFields& fields) {
  const int fifo = writer * view.num_proxy_threads + view.proxy_thread_of[fields.channel];
  uint8_t* base = view.fifos + uint64_t(fifo) * view.fifo_stride;
  FifoProducer producer{{reinterpret_cast<Command*>(base),
                         reinterpret_cast<uint64_t*>(base + view.fifo_tail), view.fifo_capacity},
                        view.state.fifo_head[fifo],
                        view.state.fifo_cached_tail[fifo]};
  const bool is_pushed = producer.push(encode(fields));
  view.state.fifo_head[fifo] = producer.head;
  view.state.fifo_cached_tail[fifo] = producer.cached_tail;
  return is_pushed;
}

uint64_t word(const DeviceFabric& view, uint64_t offset) {
  return load_acquire(reinterpret_cast<const uint64_t*>(view.memory + offset));
}

uint64_t completed(const DeviceFabric& view, uint32_t channel) {
  return load_acquire(reinterpret_cast<const uint64_t*>(view.completions + kLine * channel));
}

uint8_t pattern(int from, int to, uint64_t chunk, int kind) {
  return uint8_t(from * 61 + to * 29 + int(chunk) * 7 + kind * 113);
}

// As ring_at there.
uint8_t* ring_at(const DeviceFabric& view, uint64_t offset) {
  return view.rings + (offset - view.control_bytes);
}

struct Lane {  // one ring, both ends
  int from, to;
  DeviceFabric *sender, *receiver;
  SendEnd send;
  RecvEnd recv;
  int kind;
};

}  // namespace

namespace {

void check_device_view(const std::vector<int>& nodes, int num_proxy_threads,
                       bool has_other_rings = false) {
  Fabrics fabrics(nodes, num_proxy_threads, has_other_rings);
  const int ranks = int(nodes.size());
  std::vector<DeviceFabric> views;
  for (int rank = 0; rank < ranks; ++rank) views.push_back(fabrics.view(rank));
  std::vector<Lane> lanes;
  for (int rank = 0; rank < ranks; ++rank) {
    DeviceFabric& own = views[size_t(rank)];
    REQUIRE(own.num_in_sources == int(fabrics[rank].mesh().group().in_sources(rank).size()));
    for (int i = 0; i < own.num_nodes - 1; ++i) {
      const int node = own.remote_nodes[i], rail = own.rail[rank][node];
      REQUIRE(own.node_of[rail] == node);
      DeviceFabric& there = views[size_t(rail)];
      REQUIRE(there.source_index[rank] >= 0);
      REQUIRE(there.in_sources[there.source_index[rank]] == rank);
      lanes.push_back(
          {rank, rail, &own, &there, own.dispatch_send[node], there.dispatch_recv[rank], 0});
      lanes.push_back(
          {rail, rank, &there, &own, there.combine_send[rank], own.combine_recv[node], 1});
    }
  }
  const RingGeometry ring = make_ring(kRingBytes, kChunkBytes, 512, 64);
  REQUIRE(ring.slots_per_chunk == 4);
  for (DeviceFabric& view : views) {
    REQUIRE(view.ring_bytes == kRingBytes);
    REQUIRE(view.chunk_bytes == kChunkBytes);
  }
  // Twice around every ring.
  for (uint64_t chunk = 0; chunk < 2 * ring.num_chunks; ++chunk) {
    for (const Lane& lane : lanes) {
      const uint64_t offset = ring.chunk_offset(chunk);
      std::memset(ring_at(*lane.sender, lane.send.local_offset + offset),
                  pattern(lane.from, lane.to, chunk, lane.kind), ring.chunk_bytes());
      REQUIRE(push(*lane.sender, 1,
                   {CommandKind::kPut, lane.send.channel, 1, uint32_t(ring.chunk_bytes()),
                    lane.send.local_offset + offset, lane.send.remote_offset + offset}));
    }
    for (const Lane& lane : lanes) {
      REQUIRE(wait_until([&] { return word(*lane.receiver, lane.recv.count) == chunk + 1; }));
      const uint8_t* at =
          ring_at(*lane.receiver, lane.recv.local_offset + ring.chunk_offset(chunk));
      const uint8_t want = pattern(lane.from, lane.to, chunk, lane.kind);
      REQUIRE(std::all_of(at, at + ring.chunk_bytes(), [&](uint8_t b) { return b == want; }));
      REQUIRE(
          push(*lane.receiver, 2, {CommandKind::kSignal, lane.recv.credit_channel, 1, 0, 0, 0}));
    }
    for (const Lane& lane : lanes) {
      REQUIRE(wait_until([&] {
        return word(*lane.sender, lane.send.credit) == chunk + 1 &&
               completed(*lane.sender, lane.send.channel) == chunk + 1;
      }));
    }
  }
  // Exchange rows of two epochs.
  for (uint64_t epoch : {1, 2}) {
    for (int rank = 0; rank < ranks; ++rank) {
      DeviceFabric& own = views[size_t(rank)];
      const uint64_t out = own.exchange_out[epoch & 1];
      std::memset(own.memory + out, pattern(rank, 0, epoch, 2), kRowBytes);
      for (int i = 0; i < own.num_nodes - 1; ++i) {
        const int node = own.remote_nodes[i];
        REQUIRE(push(own, 0,
                     {CommandKind::kPut, own.exchange_channel[node], 1, uint32_t(kRowBytes), out,
                      own.exchange_remote[epoch & 1][node]}));
      }
    }
    for (int rank = 0; rank < ranks; ++rank) {
      DeviceFabric& own = views[size_t(rank)];
      for (int i = 0; i < own.num_in_sources; ++i) {
        const int source = own.in_sources[i];
        REQUIRE(wait_until([&] { return word(own, own.exchange_count[source]) == epoch; }));
        const uint8_t* at = own.memory + own.exchange_in[epoch & 1][source];
        CHECK(at[0] == pattern(source, 0, epoch, 2));
        CHECK(at[kRowBytes - 1] == at[0]);
      }
    }
  }
}

}  // namespace

TEST_CASE("rings, counts, credits and completions lie where the device view says") {
  for (const std::vector<int>& nodes :
       {std::vector<int>{0, 0, 1, 1}, {0, 0, 1}, {0, 1, 2, 2, 2, 3}})
    check_device_view(nodes, 1);
}

TEST_CASE("the same with rings in other memory") {
  check_device_view({0, 0, 1, 1}, 1, true);
  check_device_view({0, 1, 2, 2, 2, 3}, 3, true);
}

TEST_CASE("rings in other memory are ready when one has gone to every peer") {
  Fabrics fabrics({0, 1, 2, 2}, 2, true);
  for (int rank = 0; rank < 4; ++rank) {
    const DeviceFabric view = fabrics.view(rank);
    CHECK(view.rings != view.memory + view.control_bytes);
    CHECK(fabrics[rank].ring_reach() == DeviceReach::kUnseen);
    CHECK(fabrics[rank].proxy().counters().data_bytes == 0);
  }
  CHECK_FALSE(fabrics[0].board().raised());
  Fabrics whole({0, 1});
  const DeviceFabric view = whole.view(0);
  CHECK(view.rings == view.memory + view.control_bytes);
}

TEST_CASE("rings that nobody answers for are not ready, and of the wrong size not taken") {
  OtherRings rings;
  FabricConfig config = config_of(0, {0, 1});
  config.make_transport = [](PutListener* listener, int) {
    return std::make_unique<SilentTransport>(listener);
  };
  config.rings = rings.make(0, {0, 1}, kRingBytes);
  Fabric fabric(config);
  fabric.start_for_device();
  CHECK_FALSE(fabric.wait_ready(0.05));
  config.rings.bytes -= 64;
  CHECK_THROWS_WITH_AS(Fabric{config}, doctest::Contains(" bytes for rings, which take "),
                       ConfigException);
}

std::atomic<int> num_setups{0};
int set_context(void* context) {
  ++num_setups;
  return *static_cast<int*>(context);
}
// Like the driver's.
int exchange_capture_mode(int* mode) {
  num_setups += *mode;
  *mode = 0;
  return 0;
}

TEST_CASE("every proxy thread is set up before all else; one that cannot be is a fault") {
  int code = 0;
  {
    Fabrics fabrics({0, 1, 2}, 2, false, {&set_context, &code, &exchange_capture_mode, 10});
    REQUIRE(wait_until([] { return num_setups == 3 * 2 * (1 + 10); }));
    CHECK_FALSE(fabrics[0].board().raised());
  }
  code = 201;
  FabricConfig config = config_of(0, {0, 1});
  config.thread_setup = {&set_context, &code, &exchange_capture_mode, 10};
  Fabric fabric(config);
  fabric.start();
  REQUIRE(wait_until([&] { return fabric.board().raised(); }));
  CHECK(fabric.board().record().kind == FaultKind::kTransport);
  CHECK(fabric.board().record().code == 201);
}

TEST_CASE("the same with several proxy threads, each of which serves some nodes") {
  const std::vector<int> nodes = {0, 1, 2, 2, 2, 3};
  for (const int threads : {2, 3, 8}) {
    check_device_view(nodes, threads);
    Fabrics fabrics(nodes, threads);
    const DeviceFabric view = fabrics.view(0);
    CHECK(view.num_proxy_threads == std::min(threads, 3));
    std::vector<bool> is_used(size_t(view.num_proxy_threads));
    for (int node : {1, 2, 3}) {
      const uint8_t thread = view.proxy_thread_of[view.exchange_channel[node]];
      REQUIRE(thread < view.num_proxy_threads);
      is_used[thread] = true;
      // All channels to a peer, and the peer's to us, pass through threads of one number.
      CHECK(view.proxy_thread_of[view.dispatch_send[node].channel] == thread);
      const int rail = view.rail[0][node];
      const DeviceFabric there = fabrics.view(rail);
      CHECK(there.proxy_thread_of[there.dispatch_recv[0].credit_channel] == thread);
    }
    CHECK(std::all_of(is_used.begin(), is_used.end(), [](bool used) { return used; }));
  }
  CHECK_THROWS_WITH_AS(Fabric(config_of(0, nodes, 9)), "num_proxy_threads=9 is not in 1..8",
                       ConfigException);
}

void check_failing(bool is_closed) {
  uint64_t word = 0;
  std::atomic<bool> is_let{false};
  FabricConfig config = config_of(0, {0, 1});
  config.stop_word = &word;
  config.make_transport = [&](PutListener* listener, int) {
    return std::make_unique<FailingTransport>(listener, &is_let);
  };
  Fabric fabric(config);
  Mesh& mesh = fabric.mesh();
  if (is_closed)  // the peer has said so
    std::memset(mesh.memory().base() + RegisteredRegion::line(mesh.registered().heartbeat_in, 1),
                0xff, sizeof(uint64_t));
  fabric.start();
  REQUIRE(wait_until([&] { return load_acquire(&word) == 1; }));
  CHECK_FALSE(fabric.board().raised());  // it has not come back yet
  std::optional<FaultRecord> found;
  std::atomic<bool> is_answered{false};
  std::thread asking([&] {
    found = fabric.fault();
    is_answered = true;
  });
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  CHECK_FALSE(is_answered);
  is_let = true;
  asking.join();
  CHECK(found.has_value() == !is_closed);
  CHECK(fabric.board().raised() == !is_closed);
  CHECK(load_acquire(&word) == (is_closed ? 0 : 1));
  if (found) CHECK((found->peer == 1 && found->code == 7));
}

TEST_CASE("kernels end before the provider comes back with a fault; who asks for it waits") {
  check_failing(false);
}
TEST_CASE("kernels go on if what broke is the connection to a peer that has closed") {
  check_failing(true);
}

TEST_CASE("kernels hear of a fault") {
  uint64_t word = 0;
  FabricConfig config = config_of(0, {0, 1});
  config.stop_word = &word;
  Fabric fabric(config);
  CHECK(load_acquire(&word) == 0);
  fabric.raise_lost(1);
  CHECK(load_acquire(&word) == 1);
}

TEST_CASE("a fault of one rank reaches all, also one that a kernel has found") {
  Fabrics fabrics({0, 0, 1, 1});
  FaultRecord fault;
  fault.kind = FaultKind::kTimeout;
  fault.rank = 3;
  fault.peer = 2;
  fault.set_phase("dispatch/forward");
  fabrics[3].board().raise(fault);
  for (int rank = 0; rank < 4; ++rank) {
    REQUIRE(wait_until([&] { return fabrics[rank].board().raised(); }));
    CHECK(fabrics[rank].board().record().rank == 3);
    CHECK(fabrics[rank].board().record().peer == 2);
  }
  fabrics[0].raise_lost(1);  // comes too late
  CHECK(fabrics[0].board().record().kind == FaultKind::kTimeout);
}

#if !defined(__SANITIZE_THREAD__)  // does not support forks of processes with threads
TEST_CASE("a forked child leaves without touching what is the parent's") {
  auto fabrics = std::make_unique<Fabrics>(std::vector<int>{0, 1});
  const pid_t child = fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    alarm(20);
    fabrics.reset();
    _exit(0);
  }
  int status = -1;
  REQUIRE(waitpid(child, &status, 0) == child);
  CHECK(status == 0);
  CHECK_FALSE((*fabrics)[0].board().raised());
}
#endif

TEST_CASE("a device view serves as many ranks as a warp has lanes") {
  std::vector<int> nodes;
  for (int rank = 0; rank < kMaxFabricRanks + 1; ++rank) nodes.push_back(rank / 8);
  Fabric fabric(config_of(0, nodes));
  CHECK_THROWS_WITH_AS(fabric.device_view({1, 2, 3}, kChunkBytes),
                       "num_ranks=33 is above what a warp serves: 32", ConfigException);
}
