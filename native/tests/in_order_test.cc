// Numbers of what is posted and completes in any order.
#include "common/in_order.hpp"

#include <doctest/doctest.h>

namespace commlib::testing {
namespace {

TEST_CASE("the prefix ends before the first that is missing") {
  InOrder order;
  for (uint64_t number = 0; number < 5; ++number) CHECK(order.post() == number);
  CHECK(order.complete(1));
  CHECK(order.complete(3));
  CHECK(order.num_complete() == 0);
  CHECK(order.complete(0));
  CHECK(order.num_complete() == 2);
  CHECK(order.post() == 5);
  CHECK(order.complete(2));
  CHECK(order.num_complete() == 4);
  CHECK(order.num_posted() == 6);
}

TEST_CASE("a second report changes nothing, one of what nobody has posted is told") {
  InOrder order;
  order.post();
  order.post();
  CHECK(order.complete(1));
  CHECK(order.complete(1));
  CHECK(order.num_complete() == 0);
  CHECK(order.complete(0));
  CHECK(order.complete(0));
  CHECK(order.num_complete() == 2);
  CHECK_FALSE(order.complete(2));
}

}  // namespace
}  // namespace commlib::testing
