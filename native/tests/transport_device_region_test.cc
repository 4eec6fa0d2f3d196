// Regions of host and of device memory behind one range of offsets: loopback and faults on top of
// it. The device memory is another mapping of host memory.
#include <doctest/doctest.h>

#include "tests/device_region.hpp"
#include "tests/faulty_transport.hpp"
#include "tests/stream_pair.hpp"
#include "transport/providers.hpp"
#include "transport/region_map.hpp"

namespace commlib::testing {
namespace {

std::unique_ptr<Transport> make_node_transport(PutListener* listener, int rank) {
  return make_loopback(listener, rank);
}

TEST_CASE("offsets become addresses of the region that they lie in") {
  RegionMap<char> map;
  CHECK_FALSE(map.find(0, 0).has_value());
  map.add(0x10000, 256, 'h');
  CHECK_FALSE(map.find(256, 8).has_value());
  map.add(0x90000, 512, 'd');
  CHECK(map.find(0, 256)->address == 0x10000);
  CHECK(map.find(248, 8)->key == 'h');
  CHECK(map.find(256, 512)->address == 0x90000);
  CHECK(map.find(264, 8)->address == 0x90008);
  CHECK(map.find(264, 8)->key == 'd');
  for (const auto& [offset, bytes] : {std::pair<size_t, size_t>{248, 16},
                                      {0, 257},
                                      {760, 16},
                                      {769, 0},
                                      {8, size_t(-8)},
                                      {size_t(-8), 16}})
    CHECK_FALSE(map.find(offset, bytes).has_value());
  CHECK(map.find_word(248)->address == 0x10000 + 248);
  for (const size_t offset : {size_t(256), size_t(4), size_t(768), size_t(-8)})
    CHECK_FALSE(map.find_word(offset).has_value());
}

TEST_CASE("loopback: nothing crosses the border") { check_borders(make_node_transport); }
TEST_CASE("loopback: registration") { check_registration(make_node_transport); }

TEST_CASE("loopback: every word is there when the signal is") {
  Node a(0, {7168, 3000, 8, true}, make_node_transport), b(1, a.shape, make_node_transport);
  check_stream_pair(a, b);
}

TEST_CASE("the same with delays and another order") {
  auto injected = std::make_shared<InjectedFaults>();
  const auto make = [&](PutListener* listener, int rank) {
    FaultPlan plan;
    plan.seed = 5;
    plan.max_delay = 6;
    plan.reorder = true;
    return std::make_unique<FaultyTransport>(listener, rank, plan, injected, make_node_transport);
  };
  Node a(0, {4096, 1000, 8, true}, make), b(1, a.shape, make);
  check_stream_pair(a, b);
  CHECK(injected->reordered > 0);
}

}  // namespace
}  // namespace commlib::testing
