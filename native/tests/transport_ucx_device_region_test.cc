// UCX provider with a device region, which is another mapping of host memory here: UCX takes it for
// what it is, everything else is as on a device.
#include <doctest/doctest.h>

#include "tests/device_region.hpp"
#include "tests/peer_process.hpp"
#include "tests/scoped_variable.hpp"
#include "tests/stream_pair.hpp"
#include "transport/providers.hpp"

namespace commlib::testing {
namespace {

constexpr StreamShape kShape{7168, 4000, 16, true};

std::unique_ptr<Transport> make_node_transport(PutListener* listener, int rank) {
  TransportOptions options;
  options.has_device_region = true;
  return make_transport("ucx", listener, rank, options);
}

TEST_CASE("nothing crosses the border") {
  ScopedTls scoped("tcp,self");
  check_borders(make_node_transport);
}
TEST_CASE("registration") { check_registration(make_node_transport); }

TEST_CASE("threads: every word is there when the signal is") {
  for (const char* tls : {"tcp,self", static_cast<const char*>(nullptr)}) {
    ScopedTls scoped(tls);
    Node a(0, kShape, make_node_transport), b(1, kShape, make_node_transport);
    check_stream_pair(a, b);
  }
}

TEST_CASE("processes: every word is there when the signal is") {
  PeerProcess peer({"--peer"});
  Node node(0, kShape, make_node_transport);
  peer.connect(node);
  REQUIRE(stream_to_peer(node, kPatience) >= 0);
  const std::string text = node.transport->describe();
  MESSAGE(text);
  CHECK(text.find("fence by flush, device memory taken for the host's") != std::string::npos);
  // No GPU has been here: nothing that a GPU's lane could be used for.
  CHECK(node.transport->device_reach(1) == DeviceReach::kUnseen);
  CHECK(peer.bad_words() == 0);
  CHECK(peer.end(node) == 0);
}

TEST_CASE("a stopped peer holds up the signals to it alone") {
  PeerProcess peer({"--peer"});
  Node node(0, kShape, make_node_transport);
  Node other(2, kShape, make_node_transport);
  peer.connect(node);
  node.transport->connect(2, other.transport->address());
  Stream stream(node, 1, true, false);
  const auto start = Clock::now();
  while (stream.acknowledged() == 0 && seconds_since(start) < kPatience) stream.step();
  peer.signal(SIGSTOP);
  while (!node.transport->idle() && seconds_since(start) < 1) stream.step();
  const auto stopped = Clock::now();
  for (uint64_t i = 1; i <= 20; ++i) {
    node.transport->put(2, kShape.send_offset(0), kShape.receive_offset(0), 4096, 1000000 + i);
    node.transport->fence(2);
    node.transport->put_signal(2, kShape.sequence_offset(), i);
    while (other.load(kShape.sequence_offset()) != i && seconds_since(stopped) < 10) {
      stream.step();
      other.transport->progress();
    }
  }
  CHECK(other.load(kShape.sequence_offset()) == 20);
  CHECK(seconds_since(stopped) < 5);
  CHECK_FALSE(node.transport->take_fault().has_value());
  node.transport->shutdown(0.1);
}

TEST_CASE("a region that the options have not announced is refused") {
  Mapping memory(4096), device(4096);
  TokenCounter tokens;
  auto transport = make_transport("ucx", &tokens, 0);
  transport->register_region(memory.base(), 4096);
  CHECK_THROWS_AS(transport->register_device_region({device.base(), 4096, -1, 0}),
                  TransportException);
}

TEST_CASE("also with a device region, host memory stays out of reach of other processes") {
  for (const char* tls : {"all", "^tcp"}) {
    ScopedTls scoped(tls);
    Node a(0, kShape, make_node_transport), b(1, kShape, make_node_transport);
    a.transport->connect(1, b.transport->address());
    const std::string text = a.transport->describe();
    for (const char* way : {"cma/", "knem/", "xpmem/", "rocm_ipc/", "ze_ipc/"})
      CHECK(text.find(way) == std::string::npos);
  }
}

}  // namespace
}  // namespace commlib::testing

int main(int argc, char** argv) {
  using namespace commlib::testing;
  signal(SIGPIPE, SIG_IGN);
  if (argc == 2 && std::strcmp(argv[1], "--peer") == 0)
    return run_peer(kShape, make_node_transport);
  return doctest::Context(argc, argv).run();
}
