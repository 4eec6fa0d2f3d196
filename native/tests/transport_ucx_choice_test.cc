// Which provider a name means, on this machine.
#include <doctest/doctest.h>

#include "tests/transport_stream.hpp"
#include "transport/providers.hpp"

namespace commlib::testing {
namespace {

TEST_CASE("auto takes ucx where there is no RDMA port") {
  TokenCounter tokens;
  const std::string expected = has_verbs() ? "verbs" : "ucx";
  CHECK(make_transport("auto", &tokens, 0)->name() == expected);
  MESSAGE(describe_verbs());
}

TEST_CASE("verbs without a port, or without a library, is an error that says so") {
  TokenCounter tokens;
  TransportOptions options;
  options.nics = {"no_such_port"};
  CHECK_THROWS_WITH_AS(make_transport("verbs", &tokens, 3, options),
                       doctest::Contains("rank 3: verbs: "), TransportException);
}

}  // namespace
}  // namespace commlib::testing
