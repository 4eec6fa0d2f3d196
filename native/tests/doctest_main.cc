// main() of the test programs that have none of their own: in a static library, so that it is
// linked only where one is missing.
#include <doctest/doctest.h>

int main(int argc, char** argv) { return doctest::Context(argc, argv).run(); }
