// UCX provider: between threads of this process, and against a second process (this program
// started again with --peer) that can be stopped and killed.
#include <doctest/doctest.h>
#include <malloc.h>
#include <poll.h>
#include <sys/uio.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <optional>

#include "tests/peer_process.hpp"
#include "tests/scoped_variable.hpp"
#include "tests/stream_pair.hpp"
#include "transport/providers.hpp"

namespace commlib::testing {
namespace {

constexpr StreamShape kSmall{7168, 4000, 16};
constexpr StreamShape kLarge{256 << 10, 1000, 8};
// More in flight than socket buffers take: the window of a stopped receiver closes.
constexpr StreamShape kEndless{256 << 10, 1ull << 40, 64};

std::unique_ptr<Transport> make_node_transport(PutListener* listener, int rank) {
  return make_transport("ucx", listener, rank);
}

void check_pair(const char* tls, StreamShape shape) {
  ScopedTls scoped(tls);
  Node a(0, shape, make_node_transport), b(1, shape, make_node_transport);
  check_stream_pair(a, b);
}

// tcp+self keeps two processes of one host off shared memory.
constexpr const char* kTcp = "tcp,self";

TEST_CASE("threads, tcp: every word is there when the signal is") {
  check_pair(kTcp, kSmall);
  check_pair(kTcp, {256 << 10, 300, 8});
}

TEST_CASE("threads, default transports: every word is there when the signal is") {
  check_pair(nullptr, kSmall);
  check_pair(nullptr, {256 << 10, 300, 8});
}

void check_processes(const char* tls, const char* shape_name, const StreamShape& shape) {
  ScopedTls scoped(tls);
  PeerProcess peer({"--peer", shape_name});
  Node node(0, shape, make_node_transport);
  peer.connect(node);
  const double seconds = stream_to_peer(node, kPatience);
  REQUIRE(seconds >= 0);
  MESSAGE(node.transport->describe(), ": ",
          static_cast<double>(shape.messages * shape.slot_bytes) / seconds / 1e9, " GB/s");
  CHECK(peer.bad_words() == 0);
  CHECK(node.tokens.each_once(shape.messages));
  CHECK_FALSE(node.transport->take_fault().has_value());
  CHECK(peer.end(node) == 0);
}

TEST_CASE("processes, tcp, 7 KB") { check_processes(kTcp, "small", kSmall); }
TEST_CASE("processes, tcp, 256 KB") { check_processes(kTcp, "large", kLarge); }
TEST_CASE("processes, default transports, 7 KB") { check_processes(nullptr, "small", kSmall); }
TEST_CASE("processes, default transports, 256 KB") { check_processes(nullptr, "large", kLarge); }

void step_for(Stream& stream, double seconds) {
  const auto start = Clock::now();
  while (seconds_since(start) < seconds) stream.step();
}

// Returns once the peer has consumed something.
void step_until_flowing(Stream& stream) {
  const auto start = Clock::now();
  while (stream.acknowledged() == 0 && seconds_since(start) < kPatience) stream.step();
  REQUIRE(stream.acknowledged() > 0);
}

void check_kill(const char* tls, bool is_stopped_first) {
  ScopedTls scoped(tls);
  PeerProcess peer({"--peer", "endless"});
  Node node(0, kEndless, make_node_transport);
  peer.connect(node);
  Stream stream(node, 1, true, false);
  step_until_flowing(stream);
  step_for(stream, 0.2);
  if (is_stopped_first) {  // then puts are in flight when it dies
    peer.signal(SIGSTOP);
    step_for(stream, 0.2);
    CHECK_FALSE(node.transport->idle());
  }
  peer.signal(SIGKILL);
  CHECK(peer.wait() == -SIGKILL);
  const auto killed = Clock::now();
  std::optional<TransportFault> fault;
  while (!fault && seconds_since(killed) < 5.0) {
    stream.step();
    fault = node.transport->take_fault();
  }
  REQUIRE(fault.has_value());
  CHECK(node.tokens.num_faults() == 1);
  CHECK(fault->peer == 1);
  CHECK(fault->message.find("rank 1") != std::string::npos);
  MESSAGE("after ", seconds_since(killed) * 1e3, " ms: ", fault->message);
  const uint64_t first = stream.sent();
  node.transport->put(1, 0, 0, 4096, first);  // completes, although nobody is there
  node.transport->put_signal(1, 0, 1);
  const auto drain = Clock::now();
  while (!node.transport->idle() && seconds_since(drain) < 2.0) node.transport->progress();
  CHECK(node.transport->idle());
  CHECK_FALSE(node.transport->take_fault().has_value());
  const auto closing = Clock::now();
  node.transport->shutdown(2.0);
  CHECK(seconds_since(closing) < 2.5);
  CHECK(node.tokens.each_once(first + 1));
}

TEST_CASE("tcp: a killed peer is a fault that names it") { check_kill(kTcp, false); }
TEST_CASE("tcp: killed with puts in flight") { check_kill(kTcp, true); }

TEST_CASE("default transports: killed with puts in flight") { check_kill(nullptr, true); }

// Shared memory alone does not tell that its other user has gone: no fault, that is the heartbeat's
// business; closing keeps its time-out and reports every token.
TEST_CASE("shared memory: a killed peer is silent and closing does not wait for it") {
  ScopedTls scoped("^tcp");
  PeerProcess peer({"--peer", "endless"});
  Node node(0, kEndless, make_node_transport);
  peer.connect(node);
  Stream stream(node, 1, true, false);
  step_until_flowing(stream);
  peer.signal(SIGSTOP);
  step_for(stream, 0.2);
  CHECK_FALSE(node.transport->idle());  // puts are in flight when it dies
  peer.signal(SIGKILL);
  CHECK(peer.wait() == -SIGKILL);
  const uint64_t first = stream.sent();
  node.transport->put(1, 0, 0, 4096, first);
  // Not the stream's turn: with room left it would use the number `first` as well.
  const auto put = Clock::now();
  while (seconds_since(put) < 0.5) node.transport->progress();
  CHECK_FALSE(node.transport->idle());
  CHECK_FALSE(node.transport->take_fault().has_value());
  const auto closing = Clock::now();
  node.transport->shutdown(0.5);
  CHECK(seconds_since(closing) >= 0.5);
  CHECK(seconds_since(closing) < 1.6);
  CHECK(node.tokens.each_once(first + 1));
}

// The peer process: leaves while its own puts cannot get away.
int run_quitter() {
  mallopt(M_PERTURB, 0x100);  // what is freed is filled with zeros, see start_quitter()
  Node node(1, kEndless, make_node_transport);
  write_blob(4, node.transport->address());
  node.transport->connect(0, read_blob(3));
  Stream stream(node, 0, true, false);
  while (stream.acknowledged() == 0) stream.step();
  write_all(4, "f", 1);
  step_for(stream, 0.3);
  if (node.transport->idle()) return 3;
  node.transport->shutdown(0.0);
  return node.tokens.each_once(stream.sent()) ? 0 : 4;
}

// With an allocator that overwrites all that is freed, so that UCX crashes if it still follows a
// pointer from there.
PeerProcess start_quitter() {
  ScopedVariable glibc("GLIBC_TUNABLES", "glibc.malloc.tcache_count=0");
  ScopedVariable asan("ASAN_OPTIONS", "max_free_fill_size=1048576:free_fill_byte=0");
  ScopedVariable quiet("UCX_LOG_LEVEL", "error");  // UCX warns of each operation that is left
  return PeerProcess({"--peer", "quitter"});
}

TEST_CASE("shutdown with puts outstanding reads nothing that it has freed") {
  ScopedTls scoped(kTcp);
  PeerProcess peer = start_quitter();
  Node node(0, kEndless, make_node_transport);
  peer.connect(node);
  Stream stream(node, 1, false, true);
  pollfd is_flowing{peer.in(), POLLIN, 0};
  const auto start = Clock::now();
  while (poll(&is_flowing, 1, 0) == 0 && seconds_since(start) < kPatience) stream.step();
  CHECK(peer.wait() == 0);  // meanwhile this end takes nothing in
}

// Long enough for the receive window to close and for keepalive rounds to pass.
void check_stop(const char* tls, double seconds) {
  ScopedTls scoped(tls);
  PeerProcess peer({"--peer", "endless"});
  Node node(0, kEndless, make_node_transport);
  peer.connect(node);
  Stream stream(node, 1, true, false);
  step_until_flowing(stream);
  peer.signal(SIGSTOP);
  step_for(stream, 0.1);
  const uint64_t before = stream.acknowledged();
  step_for(stream, seconds);
  CHECK(stream.acknowledged() == before);
  CHECK_FALSE(node.transport->take_fault().has_value());
  peer.signal(SIGCONT);
  step_for(stream, 0.5);
  CHECK(stream.acknowledged() > before);
  CHECK_FALSE(node.transport->take_fault().has_value());
  // Closing does not wait for a stopped peer beyond its time-out, and reports every token.
  peer.signal(SIGSTOP);
  step_for(stream, 0.1);
  CHECK_FALSE(node.transport->idle());
  const auto closing = Clock::now();
  node.transport->shutdown(0.5);
  CHECK(seconds_since(closing) < 1.6);
  CHECK(node.tokens.each_once(stream.sent()));
}

TEST_CASE("tcp: a stopped peer is no fault and traffic resumes") { check_stop(kTcp, 3.0); }
TEST_CASE("default transports: a stopped peer is no fault and traffic resumes") {
  check_stop(nullptr, 1.5);
}

// The peer process: takes one message, shuts down, frees its region and puts other memory at the
// same place, which must stay as it is while the other end goes on putting.
int run_leaver() {
  const size_t bytes = kSmall.region_bytes();
  void* place = nullptr;
  {
    Node node(1, kSmall, make_node_transport);
    place = node.base;
    write_blob(4, node.transport->address());
    node.transport->connect(0, read_blob(3));
    while (node.load(kSmall.sequence_offset()) == 0) node.transport->progress();
    node.transport->shutdown(0.0);
  }
  void* other = mmap(place, bytes, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
  if (other != place) return 3;
  std::memset(other, 0x5a, bytes);
  write_all(4, "f", 1);
  uint8_t go = 0;
  read_all(3, &go, 1);
  const auto* first = static_cast<const uint8_t*>(other);
  return std::all_of(first, first + bytes, [](uint8_t byte) { return byte == 0x5a; }) ? 0 : 4;
}

void check_leaver(const char* tls, bool is_noticed) {
  ScopedTls scoped(tls);
  PeerProcess peer({"--peer", "leaver"});
  Node node(0, kSmall, make_node_transport);
  peer.connect(node);
  MESSAGE(node.transport->describe());
  uint64_t sent = 0;
  const auto send = [&] {
    if (sent > 0 && !node.tokens.is_done(sent - 1)) return;
    node.transport->put(1, 0, kSmall.receive_offset(sent), kSmall.slot_bytes, sent);
    node.transport->fence(1);
    node.transport->put_signal(1, kSmall.sequence_offset(), ++sent);
  };
  send();
  pollfd has_left{peer.in(), POLLIN, 0};
  const auto start = Clock::now();
  while (poll(&has_left, 1, 0) == 0 && seconds_since(start) < kPatience) node.transport->progress();
  uint8_t freed = 0;
  read_all(peer.in(), &freed, 1);
  const auto left = Clock::now();
  while (seconds_since(left) < 0.3) {
    send();
    node.transport->progress();
  }
  write_all(peer.out(), "g", 1);
  CHECK(peer.wait() == 0);
  CHECK(sent > 1);
  CHECK(node.transport->take_fault().has_value() == is_noticed);
}

TEST_CASE("nothing lands in what a peer has put in place of its region") {
  check_leaver(kTcp, true);
  check_leaver(nullptr, true);
  check_leaver("all", true);
  check_leaver("^tcp", false);  // shared memory: messages that nobody takes in
}

// What UCX asks before it offers cma.
bool can_write_to_processes() {
  uint64_t from = 1, to = 0;
  const iovec local{&from, sizeof from}, remote{&to, sizeof to};
  return process_vm_writev(getpid(), &local, 1, &remote, 1, 0) == sizeof from;
}

TEST_CASE("a transport that writes into another process's memory is refused") {
  if (!can_write_to_processes()) {
    MESSAGE("this machine has none");
    return;
  }
  StreamShape shape{4096, 1, 1};
  for (const char* tls : {"sm,tcp,self", "cma,tcp,self"}) {
    Node plain(0, shape, make_node_transport);
    ScopedTls scoped(tls);
    Node a(1, shape, make_node_transport), b(2, shape, make_node_transport);
    const std::string expected = "UCX_TLS=" + std::string(tls) + " lets this rank write to rank 2";
    CHECK_THROWS_WITH_AS(a.transport->connect(2, b.transport->address()),
                         doctest::Contains(expected.c_str()), TransportException);
    // A rank that has none in its address is not reached by one either.
    CHECK_NOTHROW(a.transport->connect(0, plain.transport->address()));
  }
}

TEST_CASE("a peer that was never connected from here may send") {
  ScopedTls scoped(kTcp);
  StreamShape shape{4096, 1, 4};
  Node a(0, shape, make_node_transport);
  {
    Node b(1, shape, make_node_transport);
    b.transport->connect(0, a.transport->address());
    b.transport->put(0, 0, 0, 4096, 0);
    b.transport->fence(0);
    b.transport->put_signal(0, shape.sequence_offset(), 9);
    const auto start = Clock::now();
    while (a.load(shape.sequence_offset()) != 9 && seconds_since(start) < 3.0) {
      a.transport->progress();
      b.transport->progress();
    }
    CHECK(a.load(shape.sequence_offset()) == 9);
  }
  const auto start = Clock::now();
  while (seconds_since(start) < 0.2) a.transport->progress();  // b has gone: not our fault
  CHECK_FALSE(a.transport->take_fault().has_value());
}

TEST_CASE("misuse is reported, not transmitted") {
  StreamShape shape{4096, 1, 4};
  Node a(0, shape, make_node_transport), b(1, shape, make_node_transport);
  CHECK_THROWS_AS(a.transport->connect(1, {1, 2, 3}), TransportException);
  CHECK_THROWS_AS(a.transport->register_region(a.base, 4096), TransportException);
  a.transport->put(5, 0, 0, 8, 0);
  auto fault = a.transport->take_fault();
  REQUIRE(fault.has_value());
  CHECK(fault->peer == 5);
  a.transport->connect(2, b.transport->address());
  a.transport->put(2, 0, shape.region_bytes(), 8, 1);
  fault = a.transport->take_fault();
  REQUIRE(fault.has_value());
  CHECK(fault->peer == 2);
  CHECK(fault->message.find("outside the region") != std::string::npos);
  a.transport->progress();
  CHECK(a.tokens.each_once(2));
}

}  // namespace
}  // namespace commlib::testing

int main(int argc, char** argv) {
  using namespace commlib::testing;
  signal(SIGPIPE, SIG_IGN);
  if (argc == 3 && std::strcmp(argv[1], "--peer") == 0) {
    const std::string name = argv[2];
    if (name == "leaver") return run_leaver();
    if (name == "quitter") return run_quitter();
    return run_peer(name == "small"   ? kSmall
                    : name == "large" ? kLarge
                                      : kEndless,
                    make_node_transport);
  }
  return doctest::Context(argc, argv).run();
}
