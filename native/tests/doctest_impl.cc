// doctest itself, once for all test programs: in each of them it took longer than their own code.
#define DOCTEST_CONFIG_IMPLEMENT
#include <doctest/doctest.h>
