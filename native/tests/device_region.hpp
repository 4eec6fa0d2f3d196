// What every provider must do with a device region. Needs doctest.
#pragma once

#include <vector>

#include "tests/transport_stream.hpp"

namespace commlib::testing {

// Puts and signals that reach over the border of the regions, or over the end, move nothing; those
// that end at a border do.
inline void check_borders(const NodeMaker& make) {
  const StreamShape shape{4096, 1, 2, true};
  const size_t border = shape.host_bytes(), end = shape.region_bytes();
  struct Case {
    size_t local, remote, bytes;
    std::string expected;  // part of the fault's message; empty: it moves
  };
  const std::string crosses = " crosses from host into device memory at 4096";
  const std::vector<Case> cases = {
      {border - 64, 512, 64, ""},
      {512, border - 64, 64, ""},
      {border, border, 64, ""},
      {512, border, 64, ""},
      {border, 512, 64, ""},
      {end - 64, end - 64, 64, ""},
      {border - 8, border, 16, "local offset=4088 bytes=16" + crosses},
      {border, border - 8, 16, "remote offset=4088 bytes=16" + crosses},
      {0, 0, end, " offset=0 bytes=" + std::to_string(end) + crosses},
      {end - 8, border, 16, " is outside the region of " + std::to_string(end) + " bytes"},
      {border, end - 8, 16, " is outside the region of " + std::to_string(end) + " bytes"},
      {border, size_t(-8), 16, " is outside the region of " + std::to_string(end) + " bytes"},
  };
  for (const Case& each : cases) {
    Node a(0, shape, make), b(1, shape, make);
    a.transport->connect(1, b.transport->address());
    for (size_t offset = 0; offset < end; offset += 8) *a.words(offset) = offset + 1;
    a.transport->put(1, each.local, each.remote, each.bytes, 0);
    a.transport->fence(1);
    a.transport->put_signal(1, 1024, 7);
    const auto start = Clock::now();
    const auto has_come = [&] { return b.load(1024) == 7 || !each.expected.empty(); };
    while ((!has_come() || !a.transport->idle()) && seconds_since(start) < 30) {
      a.transport->progress();
      b.transport->progress();
    }
    CHECK(a.tokens.each_once(1));
    const auto fault = a.transport->take_fault();
    const std::string message = fault ? fault->message : "";
    CAPTURE(each.local);
    CAPTURE(each.remote);
    CAPTURE(message);
    CHECK(fault.has_value() == !each.expected.empty());
    CHECK(message.find(each.expected) != std::string::npos);
    for (size_t offset = 0; offset < end; offset += 8) {
      const bool is_inside =
          each.expected.empty() && offset >= each.remote && offset < each.remote + each.bytes;
      if (offset != 1024)
        REQUIRE(*b.words(offset) == (is_inside ? offset - each.remote + each.local + 1 : 0));
    }
  }
  for (const size_t word : {border, end - 8, end, size_t(4)}) {
    Node a(0, shape, make), b(1, shape, make);
    a.transport->connect(1, b.transport->address());
    a.transport->put_signal(1, word, 7);
    const auto fault = a.transport->take_fault();
    REQUIRE(fault.has_value());
    CHECK(fault->peer == 1);
    CHECK(fault->message.find(word < end && word >= border
                                  ? "in device memory, which begins at 4096"
                                  : "word misaligned, or offset=") != std::string::npos);
  }
}

// A device region comes once, behind a host region, and peers without one are reached as before.
inline void check_registration(const NodeMaker& make) {
  const StreamShape split{4096, 1, 2, true}, plain{4096, 1, 2};
  Node a(0, split, make), b(1, plain, make);
  const DeviceRegion region{a.device.base(), split.device_bytes(), -1, 0};
  CHECK_THROWS_AS(a.transport->register_device_region(region), TransportException);
  TokenCounter tokens;
  CHECK_THROWS_AS(make(&tokens, 2)->register_device_region(region), TransportException);
  a.transport->connect(1, b.transport->address());
  b.transport->connect(0, a.transport->address());
  CHECK(a.transport->device_reach(1) == DeviceReach::kUnseen);
  *a.words(split.send_offset(0)) = 42;
  *b.words(plain.send_offset(0)) = 43;
  a.transport->put(1, split.send_offset(0), plain.receive_offset(0), 64, 0);
  b.transport->put(0, plain.send_offset(0), split.receive_offset(0), 64, 0);
  for (Node* node : {&a, &b}) node->transport->fence(1 - node->rank);
  a.transport->put_signal(1, plain.sequence_offset(), 1);
  b.transport->put_signal(0, split.sequence_offset(), 1);
  const auto start = Clock::now();
  while ((a.load(split.sequence_offset()) == 0 || b.load(plain.sequence_offset()) == 0) &&
         seconds_since(start) < 30) {
    a.transport->progress();
    b.transport->progress();
  }
  CHECK(*b.words(plain.receive_offset(0)) == 42);
  CHECK(*a.words(split.receive_offset(0)) == 43);
}

}  // namespace commlib::testing
