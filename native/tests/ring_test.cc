// Ring geometry, the two ends of a ring one by one, and both ends through two proxies.
#include <doctest/doctest.h>

#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "channel/counter.hpp"
#include "channel/role_blocks.hpp"
#include "tests/proxy_rig.hpp"

using namespace commlib;
using namespace commlib::testing;

namespace {

struct TestFifo {
  explicit TestFifo(size_t capacity)
      : slots(capacity),
        producer({FifoProducer{memory()}}, thread_of_channel),
        consumer{memory()} {}
  FifoMemory memory() { return {slots.data(), &tail, slots.size()}; }
  std::vector<CommandFields> pop_all() {
    std::vector<CommandFields> list;
    for (Command command{}; consumer.pop(&command);) list.push_back(decode(command));
    return list;
  }

  std::vector<Command> slots;
  alignas(kLine) uint64_t tail = 0;
  const std::vector<uint8_t> thread_of_channel = std::vector<uint8_t>(64);  // one thread
  CommandWriter producer;
  FifoConsumer consumer;
};

constexpr size_t kSlot = 32;
constexpr RingGeometry kGeometry{kSlot, 2, 4};  // 4 chunks of 2 slots
constexpr size_t kRingBytes = 4096;

// Writes slots until the ring refuses; returns how many.
uint64_t fill(SendRing& ring) {
  uint64_t written = 0;
  while (uint8_t* slot = ring.next_slot()) {
    std::memset(slot, 1, kSlot);
    ring.commit();
    ++written;
  }
  return written;
}

}  // namespace

TEST_CASE("geometry: random rings") {
  std::mt19937 random(3);
  const auto pick = [&](uint64_t low, uint64_t high) {
    return std::uniform_int_distribution<uint64_t>(low, high)(random);
  };
  for (int i = 0; i < 3000; ++i) {
    const size_t slot_bytes = pick(1, 64) * kCommandUnit;
    const size_t chunk_bytes = slot_bytes + pick(0, 4000);
    const size_t ring_bytes = 2 * chunk_bytes + pick(0, 20000);
    const uint64_t num_slots = pick(0, 500);
    const RingGeometry ring = make_ring(ring_bytes, chunk_bytes, slot_bytes, num_slots);
    CAPTURE(ring_bytes);
    CAPTURE(chunk_bytes);
    CAPTURE(slot_bytes);
    CAPTURE(num_slots);
    CHECK(ring.slots_per_chunk >= 1);
    CHECK(ring.chunk_bytes() <= chunk_bytes);
    CHECK(ring.num_chunks >= 2);  // one fills while another flies
    CHECK(ring.num_chunks * ring.chunk_bytes() <= ring_bytes);
    CHECK((ring.num_chunks + 1) * ring.chunk_bytes() > ring_bytes);
    const uint64_t chunks = num_chunks_of(ring, num_slots);
    CHECK(chunks * ring.slots_per_chunk >= num_slots);
    if (num_slots > 0) CHECK((chunks - 1) * ring.slots_per_chunk < num_slots);
    if (num_slots >= 4) CHECK(chunks >= 4);
  }
  // Slots larger than a chunk: chunks of one slot.
  const RingGeometry ring = make_ring(1000, 64, 256, 50);
  CHECK(ring.slots_per_chunk == 1);
  CHECK(ring.num_chunks == 3);
}

TEST_CASE("geometry: slots that are alive at the same time never overlap") {
  for (const RingGeometry& ring :
       {make_ring(1000, 200, 48, 1000), make_ring(4096, 64, 64, 100), make_ring(640, 160, 80, 7)}) {
    const uint64_t alive = ring.num_chunks * ring.slots_per_chunk;
    for (uint64_t first = 0; first < 3 * alive; first += ring.slots_per_chunk) {
      std::vector<bool> used(ring.num_chunks * ring.chunk_bytes());
      for (uint64_t slot = first; slot < first + alive; ++slot) {
        const size_t begin = ring.slot_offset(slot);
        CHECK(begin % kCommandUnit == 0);
        REQUIRE(begin + ring.slot_bytes <= used.size());
        for (size_t i = begin; i < begin + ring.slot_bytes; ++i) {
          REQUIRE(!used[i]);
          used[i] = true;
        }
      }
    }
  }
}

TEST_CASE("blocks for the load of a call, as tests/unit/test_traffic.py has it") {
  const uint64_t loads[][2] = {{100, 100}, {100, 101}, {100, 150}, {100, 800}, {3, 1}};
  const uint32_t blocks[] = {2, 3, 3, 7, 1};
  for (size_t i = 0; i < 5; ++i)
    CHECK(role_blocks(loads[i][0], loads[i][1], 2 * kPerCopyUnit, 7) == blocks[i]);
  CHECK(role_blocks(0, 0, 2 * kPerCopyUnit, 7) == 0);
}

TEST_CASE("tickets: arrived in an epoch") {
  std::mt19937_64 random(5);
  for (int i = 0; i < 2000; ++i) {
    // The upper half of a ticket holds the low bits of the epoch: they wrap.
    const uint64_t epoch = random() % 1000 + 1 + (random() % 2 == 0 ? 0 : (1ull << 32) - 500);
    const uint64_t count = random() % 100;
    const uint64_t expected = random() % 100;
    const uint64_t ticket = make_ticket(epoch, count);
    CHECK(arrived_in(ticket, epoch, expected) == std::min(count, expected));
    CHECK(arrived_in(ticket, epoch + 1 + random() % 5, expected) == 0);
    CHECK(arrived_in(ticket, epoch - 1, expected) == expected);  // the writer has gone on
    CHECK(arrived_in(make_ticket(epoch, 0), epoch, expected) == 0);
    CHECK(arrived_in(make_ticket(epoch, 0xffffffff), epoch + 1, expected) == 0);
  }
}

TEST_CASE("sender: a chunk is reused after its credit and its completion, not before") {
  ProxyEnd end(0, {0, 1}, kRingBytes);
  FakeTransport& fake = end.use_fake();
  end.proxy().start();
  end.proxy().set_busy(true);
  const uint32_t channel = end.proxy().channels().to_node(ChannelPurpose::kDispatchData, 1);
  uint64_t* credit = end.word(end.mesh().registered().dispatch_credit_in, 1);
  SendRing ring(kGeometry, 100, end.send_place(1), end.proxy(), end.writer());
  CHECK(fill(ring) == 8);
  REQUIRE(wait_until([&] { return fake.events(Event::kPut).size() == 4; }));
  const std::vector<Event> puts = fake.events(Event::kPut);
  const auto complete = [&](size_t from, size_t to) {
    for (size_t i = from; i < to; ++i) fake.complete(puts[i].value);
    REQUIRE(wait_until([&] { return end.proxy().completed(channel) == to; }));
  };

  complete(0, 1);
  CHECK(fill(ring) == 0);  // completion without credit
  store_release(credit, 3);
  CHECK(fill(ring) == 2);  // 3 credits, 1 completion
  complete(1, 4);
  CHECK(fill(ring) == 4);  // 3 credits, 4 completions
  CHECK(fill(ring) == 0);
  CHECK(ring.total() == 7);
  CHECK(ring.credits() == 3);
  CHECK(!ring.is_done());
}

TEST_CASE("sender: chunks wrap, the last one may be short") {
  ProxyEnd end(0, {0, 1}, kRingBytes);
  end.use_fake();
  TestFifo fifo(64);
  const SendRing::Place place = end.send_place(1);
  SendRing ring({kSlot, 3, 4}, 11, place, end.proxy(), fifo.producer);
  for (uint64_t i = 0; i < 11; ++i) {
    uint8_t* slot = ring.next_slot();
    REQUIRE(slot == place.base + (i / 3 % 4) * 3 * kSlot + (i % 3) * kSlot);
    ring.commit();
    // Only whole chunks travel, and the rest at the end.
    CHECK(fifo.pop_all().size() == ((i + 1) % 3 == 0 || i == 10 ? 1 : 0));
  }
  CHECK(ring.is_done());
  CHECK(ring.next_slot() == nullptr);

  // The commands themselves, with a second operation behind the first: totals go on, offsets begin
  // anew. Its chunks wait for the credits of the first.
  SendRing next({kSlot, 3, 4}, 5, place, end.proxy(), fifo.producer);
  CHECK(next.next_slot() == nullptr);
  CHECK(*place.total == 4);
}

TEST_CASE("sender: commands name the chunk, its bytes and its place at the peer") {
  ProxyEnd end(0, {0, 1}, kRingBytes);
  end.use_fake();
  TestFifo fifo(64);
  const SendRing::Place place = end.send_place(1);
  SendRing ring({kSlot, 3, 4}, 8, place, end.proxy(), fifo.producer);
  CHECK(fill(ring) == 8);
  const std::vector<CommandFields> commands = fifo.pop_all();
  REQUIRE(commands.size() == 3);
  for (size_t i = 0; i < 3; ++i) {
    CHECK(commands[i].kind == CommandKind::kPut);
    CHECK(commands[i].channel == place.channel);
    CHECK(commands[i].count == 1);
    CHECK(commands[i].bytes == (i < 2 ? 3 : 2) * kSlot);
    CHECK(commands[i].src_offset == place.local_offset + i * 3 * kSlot);
    CHECK(commands[i].dst_offset == place.remote_offset + i * 3 * kSlot);
  }
}

TEST_CASE("sender: a full FIFO holds the chunk back until flush") {
  ProxyEnd end(0, {0, 1}, kRingBytes);
  end.use_fake();
  TestFifo fifo(1);
  SendRing ring(kGeometry, 6, end.send_place(1), end.proxy(), fifo.producer);
  CHECK(fill(ring) == 4);  // the second chunk found the FIFO full
  CHECK(ring.total() == 1);
  CHECK(!ring.flush());
  CHECK(fifo.pop_all().size() == 1);
  CHECK(ring.flush());
  CHECK(ring.total() == 2);
  CHECK(!ring.flush());  // nothing is held back any more
  CHECK(fill(ring) == 2);
  CHECK(ring.written() == 6);
  CHECK(!ring.is_done());  // written, but the last chunk is not posted
  CHECK(fifo.pop_all().size() == 1);
  CHECK(ring.flush());
  CHECK(ring.is_done());
  CHECK(fifo.pop_all().size() == 1);
  CHECK(ring.total() == 3);
}

TEST_CASE("sender and receiver of nothing are done at once") {
  ProxyEnd end(0, {0, 1}, kRingBytes);
  end.use_fake();
  TestFifo fifo(4);
  SendRing send(make_ring(kRingBytes, 1024, kSlot, 0), 0, end.send_place(1), end.proxy(),
                fifo.producer);
  CHECK(send.is_done());
  CHECK(send.next_slot() == nullptr);
  RecvRing receive(make_ring(kRingBytes, 1024, kSlot, 0), 0, end.recv_place(1), fifo.producer);
  CHECK(receive.available() == 0);
  receive.release(0);
  CHECK(receive.is_drained());
  CHECK(fifo.pop_all().empty());
}

TEST_CASE("receiver: arrivals, credits per drained chunk, short last chunk") {
  ProxyEnd end(1, {0, 1}, kRingBytes);
  end.use_fake();
  TestFifo fifo(64);
  const RecvRing::Place place = end.recv_place(0);
  uint64_t* count = end.word(end.mesh().registered().dispatch_count_in, 0);
  uint64_t before = 0;
  for (int operation = 0; operation < 3; ++operation) {
    RecvRing ring({kSlot, 3, 4}, 7, place, fifo.producer);  // chunks of 3, 3 and 1
    CHECK(ring.available() == 0);
    store_release(count, before + 1);
    CHECK(ring.available() == 3);
    store_release(count, before + 3);
    CHECK(ring.available() == 7);
    ring.release(2);
    CHECK(fifo.pop_all().empty());  // the chunk is not drained yet
    ring.release(3);
    ring.release(3);
    ring.release(5);
    const auto first = fifo.pop_all();
    REQUIRE(first.size() == 1);
    CHECK(first[0].kind == CommandKind::kSignal);
    CHECK(first[0].channel == place.credit_channel);
    CHECK(first[0].count == 1);
    CHECK(!ring.is_drained());
    ring.release(7);
    const auto rest = fifo.pop_all();
    REQUIRE(rest.size() == 1);
    CHECK(rest[0].count == 2);
    CHECK(ring.is_drained());
    before += 3;
    CHECK(*place.total == before);
  }
}

TEST_CASE("receiver: credits that do not fit a command or the FIFO are not lost") {
  ProxyEnd end(1, {0, 1}, kRingBytes);
  end.use_fake();
  constexpr uint64_t kSlots = 3 * kMaxCommandCount + 10;
  store_release(end.word(end.mesh().registered().dispatch_count_in, 0), kSlots);
  TestFifo fifo(1);
  RecvRing ring({kSlot, 1, 4}, kSlots, end.recv_place(0), fifo.producer);
  uint64_t sum = 0;
  int rounds = 0;
  for (; !ring.is_drained() && rounds < 10; ++rounds) {
    ring.release(kSlots);
    for (const CommandFields& command : fifo.pop_all()) {
      CHECK(command.count <= kMaxCommandCount);
      sum += command.count;
    }
  }
  CHECK(rounds == 4);
  CHECK(sum == kSlots);
}

TEST_CASE("both ends through two proxies, ring size and slot size change per operation") {
  ProxyPair pair(kRingBytes);
  struct Operation {
    size_t slot_bytes;
    uint64_t num_slots;
  };
  std::vector<Operation> operations = {{64, 400}, {256, 1}, {32, 0}, {1008, 37}, {16, 1000}};
  std::mt19937 random(11);
  for (int i = 0; i < 20; ++i) operations.push_back({(random() % 30 + 1) * 16, random() % 200});
  const double deadline = now_s() + 60;
  std::vector<uint64_t> wrong;
  bool is_sent = true;
  // Operations follow each other without a barrier: credits of the last one are still under way
  // when the next begins.
  std::thread sender([&] {
    for (size_t i = 0; i < operations.size() && is_sent; ++i) {
      const Operation& op = operations[i];
      is_sent = send_slots(pair.end(0), make_ring(kRingBytes, 1024, op.slot_bytes, op.num_slots),
                           op.num_slots, i, deadline);
      // The exchange's part: nobody starts an operation before all have finished the last.
      while (load_acquire(pair.end(0).word(pair.end(0).mesh().registered().dispatch_credit_in, 1)) <
                 *pair.end(0).send_place(1).total &&
             now_s() < deadline)
        sched_yield();
    }
  });
  for (size_t i = 0; i < operations.size(); ++i) {
    const Operation& op = operations[i];
    wrong.push_back(receive_slots(pair.end(1),
                                  make_ring(kRingBytes, 1024, op.slot_bytes, op.num_slots),
                                  op.num_slots, i, deadline));
  }
  sender.join();
  CHECK(is_sent);
  for (size_t i = 0; i < wrong.size(); ++i) CHECK_MESSAGE(wrong[i] == 0, "operation " << i);
  CHECK(!pair.end(0).board().raised());
  CHECK(!pair.end(1).board().raised());
  const uint64_t sent = *pair.end(0).send_place(1).total;
  CHECK(sent == *pair.end(1).recv_place(0).total);
  CHECK(sent > 100);
}
