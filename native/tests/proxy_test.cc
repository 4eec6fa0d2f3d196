// The proxy thread over a transport that writes down what it is told, and over the loopback.
#include <doctest/doctest.h>

#include <algorithm>
#include <future>
#include <map>
#include <random>
#include <vector>

#include "tests/proxy_rig.hpp"

using namespace commlib;
using namespace commlib::testing;

namespace {

constexpr size_t kRingBytes = 4096;
constexpr uint64_t kClosed = ~0ull;

struct Planned {
  CommandFields fields;
  int peer;
};

// Random commands on all channels of `end`, pushed while the proxy works.
std::vector<Planned> push_random(ProxyEnd& end, int count, unsigned seed) {
  std::mt19937 random(seed);
  const auto& specs = end.proxy().channels().specs();
  std::vector<Planned> plan;
  for (int i = 0; i < count; ++i) {
    const uint32_t channel = uint32_t(random() % specs.size());
    const bool is_put = random() % 3 != 0;
    const CommandFields fields = {is_put ? CommandKind::kPut : CommandKind::kSignal,
                                  channel,
                                  uint32_t(random() % 5 + 1),
                                  is_put ? uint32_t(random() % 100 * 16) : 0,
                                  is_put ? random() % 100 * 16 : 0,
                                  is_put ? random() % 100 * 16 : 0};
    plan.push_back({fields, specs[channel].peer});
    while (!end.writer().push(encode(fields))) sched_yield();
  }
  return plan;
}

void say_goodbye_for_peers(ProxyEnd& end) {
  for (int peer : end.mesh().group().scale_out_peers(0))
    store_release(end.word(end.mesh().registered().heartbeat_in, peer), kClosed);
}

bool is_channel_signal(const ProxyEnd& end, const Event& event, uint32_t channel) {
  const ChannelSpec& spec = const_cast<ProxyEnd&>(end).proxy().channels().specs()[channel];
  return event.kind == Event::kSignal && event.peer == spec.peer &&
         event.remote_offset == spec.remote_signal_offset;
}

}  // namespace

TEST_CASE("threads share the other nodes evenly, and both ends of a connection agree") {
  for (int num_nodes = 2; num_nodes <= 33; ++num_nodes)
    for (int num_threads = 1; num_threads <= 8; ++num_threads)
      for (int node = 0; node < num_nodes; ++node) {
        std::vector<int> served(size_t(num_threads), 0);
        for (int peer = 0; peer < num_nodes; ++peer) {
          if (peer == node) continue;
          const int thread = proxy_thread_of(node, peer, num_nodes, num_threads);
          REQUIRE(thread == proxy_thread_of(peer, node, num_nodes, num_threads));
          ++served[size_t(thread)];
        }
        const auto [least, most] = std::minmax_element(served.begin(), served.end());
        // Of an odd number each node sits one round out, which may be one of the rarer threads'.
        CHECK(*most - *least <= 1 + num_nodes % 2);
      }
}

TEST_CASE("one put per command, counters after the data, totals add up") {
  ProxyEnd end(0, {0, 1, 1, 2}, kRingBytes);
  FakeTransport& fake = end.use_fake();
  end.proxy().start();
  end.proxy().set_busy(true);
  const std::vector<Planned> plan = push_random(end, 3000, 1);
  uint64_t num_puts = 0, data_bytes = 0, exchange_bytes = 0;
  std::map<uint32_t, uint64_t> totals;
  const auto& specs = end.proxy().channels().specs();
  for (const Planned& planned : plan) {
    totals[planned.fields.channel] += planned.fields.count;
    if (planned.fields.kind != CommandKind::kPut) continue;
    ++num_puts;
    const bool is_exchange = specs[planned.fields.channel].purpose == ChannelPurpose::kExchange;
    (is_exchange ? exchange_bytes : data_bytes) += planned.fields.bytes;
  }
  REQUIRE(wait_until([&] { return end.proxy().counters().commands == plan.size(); }));
  say_goodbye_for_peers(end);
  end.proxy().stop(true, 30);  // now the log is complete
  const std::vector<Event> events = fake.events();

  // Every put command is one put, in order, unchanged.
  size_t at = 0;
  for (const Event& event : events) {
    if (event.kind != Event::kPut) continue;
    while (at < plan.size() && plan[at].fields.kind != CommandKind::kPut) ++at;
    REQUIRE(at < plan.size());
    const CommandFields& fields = plan[at].fields;
    const bool is_same = event.peer == plan[at].peer && event.bytes == fields.bytes &&
                         event.local_offset == fields.src_offset &&
                         event.remote_offset == fields.dst_offset;
    CHECK(is_same);
    ++at;
  }
  CHECK(fake.events(Event::kPut).size() == num_puts);
  std::map<uint64_t, int> tokens;
  for (const Event& event : fake.events(Event::kPut)) CHECK(++tokens[event.value] == 1);

  // A channel's counter never falls, ends at the sum, and follows a fence after the peer's puts.
  uint64_t num_signals = 0;
  for (uint32_t channel = 0; channel < specs.size(); ++channel) {
    uint64_t last = 0;
    for (const Event& event : events) {
      if (!is_channel_signal(end, event, channel)) continue;
      CHECK(event.value > last);
      last = event.value;
      ++num_signals;
    }
    CHECK(last == totals[channel]);
  }
  std::map<int, bool> has_unfenced;
  for (const Event& event : events) {
    if (event.kind == Event::kPut) has_unfenced[event.peer] = true;
    if (event.kind == Event::kFence) has_unfenced[event.peer] = false;
    for (uint32_t channel = 0; channel < specs.size(); ++channel)
      if (is_channel_signal(end, event, channel)) CHECK(!has_unfenced[event.peer]);
  }

  const ProxyCounters counters = end.proxy().counters();
  CHECK(counters.commands == plan.size());
  CHECK(counters.data_bytes == data_bytes);
  CHECK(counters.exchange_bytes == exchange_bytes);
  CHECK(counters.signals == num_signals);
  CHECK(data_bytes > 0);
  CHECK(exchange_bytes > 0);
}

TEST_CASE("several FIFOs feed one proxy") {
  ProxyEnd end(0, {0, 1, 2, 3}, kRingBytes, 3);
  FakeTransport& fake = end.use_fake();
  end.proxy().start();
  for (int i = 0; i < 3; ++i) {
    CommandWriter producer = end.proxy().writer(i);
    const uint32_t channel = end.proxy().channels().to_node(ChannelPurpose::kDispatchData, i + 1);
    for (int n = 0; n < 50; ++n)
      REQUIRE(producer.push(encode({CommandKind::kPut, channel, 1, 16, 0, size_t(n) * 16})));
  }
  REQUIRE(wait_until([&] { return fake.events(Event::kPut).size() == 150; }));
  std::map<int, size_t> next;  // order within a FIFO is kept
  for (const Event& event : fake.events(Event::kPut)) {
    CHECK(event.remote_offset == next[event.peer]);
    next[event.peer] += 16;
  }
}

TEST_CASE("completed() is the prefix of puts that completed, in whatever order they do") {
  ProxyEnd end(0, {0, 1, 2}, kRingBytes);
  FakeTransport& fake = end.use_fake();
  end.proxy().start();
  end.proxy().set_busy(true);
  const uint32_t channels[2] = {end.proxy().channels().to_node(ChannelPurpose::kDispatchData, 1),
                                end.proxy().channels().to_node(ChannelPurpose::kDispatchData, 2)};
  constexpr size_t kPuts = 60;
  for (size_t i = 0; i < 2 * kPuts; ++i)
    REQUIRE(end.writer().push(encode({CommandKind::kPut, channels[i % 2], 1, 16, 0, 0})));
  REQUIRE(wait_until([&] { return fake.events(Event::kPut).size() == 2 * kPuts; }));
  const std::vector<Event> puts = fake.events(Event::kPut);
  std::vector<size_t> order(puts.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), std::mt19937(5));

  std::vector<bool> is_complete(puts.size());
  const auto prefix = [&](size_t lane) {
    uint64_t count = 0;
    while (count < kPuts && is_complete[2 * count + lane]) ++count;
    return count;
  };
  for (size_t index : order) {
    is_complete[index] = true;
    fake.complete(puts[index].value);
    // Too low means not handled yet; too high would be a slot reused while it is being read.
    REQUIRE(wait_until([&] {
      return end.proxy().completed(channels[0]) >= prefix(0) &&
             end.proxy().completed(channels[1]) >= prefix(1);
    }));
    CHECK(end.proxy().completed(channels[0]) == prefix(0));
    CHECK(end.proxy().completed(channels[1]) == prefix(1));
  }
  CHECK(prefix(0) == kPuts);
}

TEST_CASE("a completion that comes twice counts once, one of nothing is a fault") {
  ProxyEnd end(0, {0, 1}, kRingBytes);
  FakeTransport& fake = end.use_fake();
  const uint32_t channel = end.proxy().channels().to_node(ChannelPurpose::kDispatchData, 1);
  for (int i = 0; i < 4; ++i)
    REQUIRE(end.writer().push(encode({CommandKind::kPut, channel, 1, 16, 0, 0})));
  end.proxy().start();
  REQUIRE(wait_until([&] { return fake.events(Event::kPut).size() == 4; }));
  end.proxy().stop(false, 0);  // from here on the listener is called on this thread
  const std::vector<Event> puts = fake.events(Event::kPut);
  for (size_t i : {1, 0, 1, 0, 3, 3}) end.proxy().listener()->on_put_complete(puts[i].value);
  CHECK(end.proxy().completed(channel) == 2);
  CHECK(!end.board().raised());
  end.proxy().listener()->on_put_complete(puts[2].value);
  CHECK(end.proxy().completed(channel) == 4);
  end.proxy().listener()->on_put_complete(puts[3].value + 1);
  REQUIRE(end.board().raised());
  CHECK(end.board().record().kind == FaultKind::kTransport);
  CHECK(end.board().record().expected == 4);
  CHECK(end.board().record().seen == 4);
  CHECK(end.proxy().completed(channel) == 4);
}

TEST_CASE("loopback: who sees the counter sees the data") {
  ProxyPair pair(kRingBytes);  // the provider reorders all that no fence keeps in order
  ProxyEnd& from = pair.end(0);
  ProxyEnd& to = pair.end(1);
  const uint32_t channel = from.proxy().channels().to_node(ChannelPurpose::kDispatchData, 1);
  const size_t source = from.mesh().registered().dispatch_send_ring_of(1);
  const size_t target = to.mesh().registered().dispatch_recv_ring_of(0);
  auto* out = reinterpret_cast<uint64_t*>(from.mesh().memory().base() + source);
  const auto* in = reinterpret_cast<const uint64_t*>(to.mesh().memory().base() + target);
  const uint64_t* count = to.word(to.mesh().registered().dispatch_count_in, 0);
  constexpr uint64_t kPuts = 200;
  for (uint64_t i = 0; i < kPuts; ++i) {
    out[2 * i] = i + 1;
    out[2 * i + 1] = ~i;
    while (!from.writer().push(
        encode({CommandKind::kPut, channel, 1, 16, source + 16 * i, target + 16 * i})))
      sched_yield();
    const uint64_t seen = load_acquire(count);
    if (seen > 0) CHECK(in[2 * (seen - 1)] == seen);
  }
  REQUIRE(wait_until([&] { return load_acquire(count) == kPuts; }));
  for (uint64_t i = 0; i < kPuts; ++i) {
    CHECK(in[2 * i] == i + 1);
    CHECK(in[2 * i + 1] == ~i);
  }
}

TEST_CASE("a clean stop posts what is queued and says good-bye") {
  ProxyEnd end(0, {0, 1}, kRingBytes);
  FakeTransport& fake = end.use_fake();
  const uint32_t channel = end.proxy().channels().to_node(ChannelPurpose::kDispatchData, 1);
  for (int i = 0; i < 1000; ++i)
    REQUIRE(end.writer().push(encode({CommandKind::kPut, channel, 1, 16, 0, 0})));
  say_goodbye_for_peers(end);
  end.proxy().start();
  const double begin = now_s();
  end.proxy().stop(true, 30);
  end.proxy().stop(true, 30);  // idempotent
  CHECK(now_s() - begin < 20);
  CHECK(fake.events(Event::kPut).size() == 1000);
  CHECK(fake.is_shut_down());
  const Event last = fake.events().back();
  CHECK(last.kind == Event::kSignal);
  CHECK(last.value == kClosed);
  CHECK(last.remote_offset == RegisteredRegion::line(end.mesh().registered_of(1).heartbeat_in, 0));
  CHECK(load_acquire(end.mesh().arena_word(0, end.mesh().control().heartbeat)) == kClosed);
}

TEST_CASE("a clean stop waits for the good-byes of remote peers, but not for ever") {
  {
    ProxyEnd end(0, {0, 1, 2}, kRingBytes);
    FakeTransport& fake = end.use_fake();
    end.proxy().start();
    auto stopped = std::async(std::launch::async, [&] { end.proxy().stop(true, 60); });
    const auto has_said_goodbye = [&] {
      const auto signals = fake.events(Event::kSignal);
      return !signals.empty() && signals.back().value == kClosed;
    };
    REQUIRE(wait_until(has_said_goodbye));
    store_release(end.word(end.mesh().registered().heartbeat_in, 1), kClosed);
    CHECK(stopped.wait_for(std::chrono::milliseconds(100)) == std::future_status::timeout);
    CHECK(!fake.is_shut_down());  // rank 2 may still need our progress
    store_release(end.word(end.mesh().registered().heartbeat_in, 2), kClosed);
    CHECK(stopped.wait_for(std::chrono::seconds(30)) == std::future_status::ready);
  }
  ProxyEnd end(0, {0, 1}, kRingBytes);
  end.use_fake();
  end.proxy().start();
  const double begin = now_s();
  end.proxy().stop(true, 0.3);
  CHECK(now_s() - begin >= 0.3);
  CHECK(now_s() - begin < 20);
}

TEST_CASE("an unclean stop does not pretend to be a good-bye") {
  ProxyEnd end(0, {0, 1}, kRingBytes);
  FakeTransport& fake = end.use_fake();
  end.proxy().start();
  end.proxy().stop(false, 0);
  for (const Event& event : fake.events(Event::kSignal)) CHECK(event.value != kClosed);
  CHECK(fake.is_shut_down());
}

TEST_CASE("after a fault nothing that is queued goes out, and no good-bye") {
  for (const bool is_clean : {false, true}) {
    ProxyEnd end(0, {0, 1}, kRingBytes);
    FakeTransport& fake = end.use_fake();
    FaultRecord fault;
    fault.kind = FaultKind::kTimeout;
    REQUIRE(end.board().raise(fault));
    const uint32_t channel = end.proxy().channels().to_node(ChannelPurpose::kDispatchData, 1);
    for (int i = 0; i < 10; ++i)
      REQUIRE(end.writer().push(encode({CommandKind::kPut, channel, 1, 16, 0, 0})));
    end.proxy().start();
    // The record of the fault is one put.
    REQUIRE(wait_until([&] { return fake.events(Event::kPut).size() > 0; }));
    end.proxy().stop(is_clean, 0.2);
    const std::vector<Event> puts = fake.events(Event::kPut);
    REQUIRE(puts.size() == 1);
    CHECK(puts[0].bytes == sizeof(FaultRecord));
    for (const Event& event : fake.events(Event::kSignal)) CHECK(event.value != kClosed);
    CHECK(fake.is_shut_down());
  }
}

TEST_CASE("a frozen proxy does nothing, and goes on where it stopped") {
  ProxyEnd end(0, {0, 1}, kRingBytes);
  FakeTransport& fake = end.use_fake(0.1);
  end.proxy().start();
  REQUIRE(wait_until([&] { return !fake.events(Event::kSignal).empty(); }));
  end.proxy().set_frozen(true);
  size_t before = 0;
  double since = now_s();
  REQUIRE(wait_until([&] {  // the step under way ends: no beat for ten periods
    const size_t count = fake.events().size();
    if (std::exchange(before, count) != count) since = now_s();
    return now_s() - since > 0.05;
  }));
  REQUIRE(end.writer().push(encode({CommandKind::kPut, 0, 1, 16, 0, 0})));
  const double begin = now_s();
  REQUIRE(wait_until([&] { return now_s() - begin > 0.05; }));
  CHECK(fake.events(Event::kPut).empty());
  end.proxy().set_frozen(false);
  REQUIRE(wait_until([&] { return fake.events(Event::kPut).size() == 1; }));
}
