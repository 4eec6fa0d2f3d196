// Verbs provider over real RDMA ports, for instance soft-RoCE (launch/rdma-guest):
//
//   verbs_test --nics rxe0 --peer-nics rxe1 [doctest options]
//
// Not one of ctest's: it needs a device.
#include <doctest/doctest.h>
#include <linux/capability.h>
#include <sys/resource.h>
#include <sys/syscall.h>

#include <cstring>
#include <numeric>

#include "tests/device_region.hpp"
#include "tests/rdma/verbs_rig.hpp"

namespace commlib::testing {
namespace {

void check_pair(const StreamShape& shape, const NodeMaker& make) {
  Node a(0, shape, make), b(1, shape, make);
  check_stream_pair(a, b);
}

}  // namespace

TEST_CASE("threads, signals by write: every word is there when the signal is") {
  check_pair(kSmall, maker(false));
  check_pair(kLarge, maker(false));
}

TEST_CASE("threads, signals by immediate: every word is there when the signal is") {
  check_pair(kSmall, maker(true));
  check_pair(kLarge, maker(true));
}

TEST_CASE("windows of few operations or few bytes only make it slower") {
  for (const auto& [operations, bytes] : {std::pair<uint32_t, size_t>{2, 8 << 20}, {128, 8192}}) {
    check_pair({7168, 100, 16}, [&](PutListener* listener, int rank) {
      TransportOptions options = options_of(rank);
      options.send_operations = operations;
      options.send_bytes = bytes;
      return make_verbs(listener, rank, options);
    });
  }
}

TEST_CASE("the two ends need not send their signals in the same way") {
  check_pair({7168, 100, 16}, [&](PutListener* listener, int rank) {
    return make_verbs(listener, rank, options_of(rank, rank == 0));
  });
}

TEST_CASE("a smaller packet size than the port's") {
  check_pair({7168, 100, 16}, [&](PutListener* listener, int rank) {
    TransportOptions options = options_of(rank);
    options.mtu = rank == 0 ? 1024 : 2047;
    return make_verbs(listener, rank, options);
  });
}

TEST_CASE("processes, both ways of signalling") {
  for (const bool by_immediate : {false, true}) {
    PeerProcess peer = start_peer("small");
    Node node(0, kSmall, maker(by_immediate));
    peer.connect(node);
    REQUIRE(stream_to_peer(node, kPatience) >= 0);
    CHECK(peer.bad_words() == 0);
    CHECK(node.tokens.each_once(kSmall.messages));
    check_no_fault(node);
    CHECK(peer.end(node) == 0);
  }
}

TEST_CASE("a put larger than the device's messages") {
  StreamShape shape{20 << 20, 1, 1};
  Node a(0, shape, maker()), b(1, shape, maker());
  connect(a, b);
  const size_t words = shape.slot_bytes / 8;
  std::iota(a.words(0), a.words(0) + words, 1);
  a.transport->put(1, 0, shape.receive_offset(0), shape.slot_bytes, 0);
  a.transport->fence(1);
  a.transport->put_signal(1, shape.sequence_offset(), 1);
  REQUIRE(progress_until(a, b, [&] { return b.load(shape.sequence_offset()) == 1; }));
  CHECK(std::memcmp(a.words(0), b.words(shape.receive_offset(0)), shape.slot_bytes) == 0);
  REQUIRE(progress_until(a, b, [&] { return a.transport->idle(); }));
  CHECK(a.tokens.each_once(1));
}

TEST_CASE("a device that is not there is named, with those that are") {
  TokenCounter tokens;
  TransportOptions options;
  options.nics = {"mlx5_77"};
  try {
    make_verbs(&tokens, 0, options);
    FAIL("accepted");
  } catch (const TransportException& error) {
    const std::string message = error.what();
    CHECK(message.find("mlx5_77 is not there") != std::string::npos);
    CHECK(message.find(split(own_nics)[0] + ":1") != std::string::npos);
  }
}

TEST_CASE("device memory: nothing crosses the border") {
  check_borders(maker());
  check_borders(maker(true));
}
TEST_CASE("device memory: registration") { check_registration(maker()); }

TEST_CASE("device memory: every word is there when the signal is") {
  for (const bool by_immediate : {false, true})
    check_pair({7168, 400, 16, true}, maker(by_immediate));
  Node a(0, {7168, 1, 1, true}, maker()), b(1, a.shape, maker());
  connect(a, b);
  CHECK(a.transport->device_reach(1) == DeviceReach::kDirect);
}

TEST_CASE("device memory: a dmabuf that the device refuses gives way to registration by address") {
  StreamShape shape{4096, 1, 1};
  TokenCounter tokens;
  Node b(1, shape, maker());
  auto transport = make_verbs(&tokens, 0, options_of(0));
  Mapping host(4096);
  std::vector<uint64_t> memory(512, 42);
  transport->register_region(host.base(), 4096);
  DeviceRegion region;
  region.base = memory.data();
  region.bytes = memory.size() * 8;
  region.dmabuf_fd = memfd_create("not-a-dmabuf", 0);
  transport->register_device_region(region);
  close(region.dmabuf_fd);
  MESSAGE(transport->describe());
  CHECK(transport->describe().find("device memory by address, dmabuf: ") != std::string::npos);
  transport->connect(1, b.transport->address());
  transport->put(1, 4096, shape.receive_offset(0), 4096, 0);
  transport->put_signal(1, shape.sequence_offset(), 1);
  const auto start = Clock::now();
  while (b.load(shape.sequence_offset()) != 1 && seconds_since(start) < kPatience) {
    transport->progress();
    b.transport->progress();
  }
  CHECK(b.load(shape.sequence_offset()) == 1);
  CHECK(*b.words(shape.receive_offset(0)) == 42);
}

TEST_CASE("device memory that cannot be registered is an error of its own kind") {
  TokenCounter tokens;
  Mapping host(4096);
  auto transport = make_verbs(&tokens, 0, options_of(0));
  transport->register_region(host.base(), 4096);
  CHECK_THROWS_WITH_AS(
      transport->register_device_region({reinterpret_cast<void*>(4096), 4096, -1, 0}),
      doctest::Contains("rank 0: cannot register 4096 bytes of device memory"),
      RegistrationException);
}

TEST_CASE("auto takes verbs where there is a port") {
  TokenCounter tokens;
  CHECK(has_verbs());
  CHECK(make_transport("auto", &tokens, 0)->name() == "verbs");
  const std::string text = describe_verbs();
  MESSAGE(text);
  CHECK(text.find(split(own_nics)[0] + ":1 gid ") != std::string::npos);
}

TEST_CASE("several ports share the peers") {
  if (split(own_nics).size() < 2) return;
  StreamShape shape{4096, 1, 1};
  Node a(0, shape, maker()), b(1, shape, maker()), c(2, shape, maker());
  for (Node* node : {&b, &c}) {
    a.transport->connect(node->rank, node->transport->address());
    a.transport->put_signal(node->rank, shape.sequence_offset(), 1);
    REQUIRE(progress_until(a, *node, [&] { return node->load(shape.sequence_offset()) == 1; }));
  }
  const std::string text = a.transport->describe();
  for (const std::string& nic : split(own_nics))
    CHECK_MESSAGE(text.find(": rc/" + nic + ":1") != std::string::npos, text);
}

TEST_CASE("too low a limit on locked memory is an error that says how to raise it") {
  PeerProcess peer({"--nics", own_nics, "--peer-nics", peer_nics, "--low-limit"});
  const auto message = read_blob(peer.in());
  const std::string text(message.begin(), message.end());
  MESSAGE(text);
  CHECK(text.find("ulimit -l unlimited") != std::string::npos);
  CHECK(text.find("locked memory limit is 65536 bytes") != std::string::npos);
  CHECK(text.find("(values)") == std::string::npos);
  CHECK(peer.wait() == 0);
}

// The process of the last case: without the privilege to lock what it likes.
int run_low_limit() {
  const rlimit limit{65536, 65536};
  __user_cap_header_struct head{_LINUX_CAPABILITY_VERSION_3, 0};
  __user_cap_data_struct none[2] = {};
  if (setrlimit(RLIMIT_MEMLOCK, &limit) != 0 || syscall(SYS_capset, &head, none) != 0) return 2;
  std::string text = "registered";
  try {
    Node node(1, kSmall, maker());
  } catch (const RegistrationException& error) {
    text = error.what();
    if (error.needed() <= error.available() || error.available() != 65536) text += " (values)";
  } catch (const std::exception& error) {
    text = std::string("another error: ") + error.what();
  }
  write_blob(4, {text.begin(), text.end()});
  return 0;
}

}  // namespace commlib::testing

int main(int argc, char** argv) {
  using namespace commlib::testing;
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    const bool has_value = i + 1 < argc;
    if (word == "--nics" && has_value) own_nics = argv[++i];
    if (word == "--peer-nics" && has_value) peer_nics = argv[++i];
    if (word == "--peer" && has_value)
      return run_peer(std::strcmp(argv[i + 1], "small") == 0 ? kSmall : kEndless, maker());
    if (word == "--low-limit") return run_low_limit();
  }
  if (own_nics.empty() || peer_nics.empty()) {
    std::fprintf(stderr, "verbs_test --nics NAME[,NAME] --peer-nics NAME[,NAME] [option...]\n");
    return 2;
  }
  return doctest::Context(argc, argv).run();
}
