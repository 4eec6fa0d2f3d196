// The protocol under a race detector. `--seed-missing-release` makes the transport store its
// signals without release: ThreadSanitizer must report that (see native/CMakeLists.txt), or its
// silence about everything else means nothing.
#include <cstdio>
#include <cstring>
#include <thread>

#include "tests/proxy_rig.hpp"

using namespace commlib;
using namespace commlib::testing;

int main(int argc, char** argv) {
  LoopbackOptions options;
  options.seed_missing_release = argc > 1 && std::strcmp(argv[1], "--seed-missing-release") == 0;
  constexpr size_t kRingBytes = 4096;
  constexpr uint64_t kSlots = 500;
  const RingGeometry geometry = make_ring(kRingBytes, 512, 64, kSlots);
  const double deadline = now_s() + 60;
  ProxyPair pair(kRingBytes, options);
  bool is_sent = false;
  std::thread sender([&] { is_sent = send_slots(pair.end(0), geometry, kSlots, 1, deadline); });
  const uint64_t wrong = receive_slots(pair.end(1), geometry, kSlots, 1, deadline);
  sender.join();
  std::printf("%s, %llu wrong words\n", is_sent ? "all sent" : "not all sent",
              static_cast<unsigned long long>(wrong));
  return is_sent && wrong == 0 ? 0 : 1;
}
