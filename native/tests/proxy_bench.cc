// What the proxy thread itself costs: commands per second and added latency, over a transport that
// moves nothing. Prints one line each; not a test, its figures depend on what else the machine
// does.
//
//   proxy_bench [COMMANDS]
#include <time.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>

#include "tests/proxy_rig.hpp"

using namespace commlib;
using namespace commlib::testing;

namespace {

constexpr size_t kRingBytes = 1 << 20;
constexpr double kLimit = 120;  // seconds, for each measurement

double cpu_s(clockid_t clock) {
  timespec time{};
  clock_gettime(clock, &time);
  return double(time.tv_sec) + 1e-9 * double(time.tv_nsec);
}

// The proxy thread's: all of the process but this thread.
double proxy_cpu_s() { return cpu_s(CLOCK_PROCESS_CPUTIME_ID) - cpu_s(CLOCK_THREAD_CPUTIME_ID); }

struct Rate {
  double per_second;
  double per_cpu_second;  // of the proxy thread, whatever else the machine runs
};

// One rank of two nodes, its proxy running, commands on one channel.
class Bench {
 public:
  Bench() : end_(0, {0, 1}, kRingBytes) {
    end_.set_transport(make_null(end_.proxy().listener(), 0));
    channel_ = end_.proxy().channels().to_node(ChannelPurpose::kDispatchData, 1);
    end_.proxy().start();
    end_.proxy().set_busy(true);
  }

  // From the first push to the last completion.
  Rate rate(uint64_t count) {
    const uint64_t goal = end_.proxy().completed(channel_) + count;
    const double begin = now_s(), cpu_begin = proxy_cpu_s();
    for (uint64_t i = 0; i < count; ++i)
      while (!end_.writer().push(command())) pause(begin);
    while (end_.proxy().completed(channel_) < goal) pause(begin);
    return {double(count) / (now_s() - begin), double(count) / (proxy_cpu_s() - cpu_begin)};
  }

  // Seconds from the push of a lone command to the sight of its completion, sorted.
  // `silence_s`: since the completion before, long enough for the proxy to have gone to sleep.
  std::vector<double> latencies(uint64_t count, double silence_s) {
    std::vector<double> seconds;
    const double begin = now_s();
    for (uint64_t i = 0; i < count; ++i) {
      if (silence_s > 0) std::this_thread::sleep_for(std::chrono::duration<double>(silence_s));
      const uint64_t goal = end_.proxy().completed(channel_) + 1;
      const double pushed = now_s();
      end_.writer().push(command());
      while (end_.proxy().completed(channel_) < goal) pause(begin);
      seconds.push_back(now_s() - pushed);
    }
    std::sort(seconds.begin(), seconds.end());
    return seconds;
  }

 private:
  Command command() const { return encode({CommandKind::kPut, channel_, 1, 4096, 0, 0}); }
  void pause(double begin) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
    if (++num_pauses_ % 65536 != 0) return;
    sched_yield();  // where both threads must share a core
    if (now_s() - begin > kLimit) {
      std::fprintf(stderr, "no progress within %.0f s\n", kLimit);
      std::exit(1);
    }
  }

  ProxyEnd end_;
  uint32_t channel_ = 0;
  uint64_t num_pauses_ = 0;
};

}  // namespace

int main(int argc, char** argv) {
  const uint64_t count = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 3000000;
  Bench bench;
  bench.rate(count / 10);  // warm
  std::vector<double> wall, cpu;
  for (int repeat = 0; repeat < 9; ++repeat) {
    const Rate rate = bench.rate(count);
    wall.push_back(rate.per_second / 1e6);
    cpu.push_back(rate.per_cpu_second / 1e6);
  }
  std::sort(wall.begin(), wall.end());
  std::sort(cpu.begin(), cpu.end());
  std::printf(
      "null transport, one FIFO, million commands: per second median %.2f (%.2f to %.2f), per CPU "
      "second of the proxy median %.2f (%.2f to %.2f)\n",
      wall[4], wall.front(), wall.back(), cpu[4], cpu.front(), cpu.back());
  const auto report = [](const char* when, const std::vector<double>& seconds) {
    const auto share = [&](double part) {
      return seconds[size_t(part * double(seconds.size()))] * 1e6;
    };
    std::printf("push to completion, %s: median %.2f us, 10%% %.2f us, 90%% %.2f us\n", when,
                share(0.5), share(0.1), share(0.9));
  };
  report("one command after the other", bench.latencies(count / 30, 0));
  report("after 1 ms of silence", bench.latencies(500, 1e-3));
  return 0;
}
