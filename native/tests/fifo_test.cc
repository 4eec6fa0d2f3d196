// Command encoding and the command FIFO, alone and between two threads.
#include "channel/fifo.hpp"

#include <doctest/doctest.h>
#include <sched.h>

#include <deque>
#include <random>
#include <thread>
#include <vector>

using namespace commlib;

namespace {

constexpr size_t kMaxOffset = 0xffffffffull * kCommandUnit;

struct TestFifo {
  explicit TestFifo(size_t capacity) : slots(capacity) {}
  FifoMemory memory() { return {slots.data(), &tail, slots.size()}; }

  std::vector<Command> slots;
  alignas(kLine) uint64_t tail = 0;
};

class RandomFields {
 public:
  explicit RandomFields(unsigned seed) : random_(seed) {}
  CommandFields next() {
    return {static_cast<CommandKind>(pick(7)),  uint32_t(pick(kMaxChannels - 1)),
            uint32_t(pick(kMaxCommandCount)),   uint32_t(pick(0xffffffffull)),
            pick(0xffffffffull) * kCommandUnit, pick(0xffffffffull) * kCommandUnit};
  }

 private:
  // 0..top, often one of the ends.
  uint64_t pick(uint64_t top) {
    switch (random_() % 4) {
      case 0:
        return 0;
      case 1:
        return top;
      default:
        return std::uniform_int_distribution<uint64_t>(0, top)(random_);
    }
  }
  std::mt19937_64 random_;
};

bool is_same(const CommandFields& a, const CommandFields& b) {
  return a.kind == b.kind && a.channel == b.channel && a.count == b.count && a.bytes == b.bytes &&
         a.src_offset == b.src_offset && a.dst_offset == b.dst_offset;
}

CommandFields numbered(uint64_t number) {
  return {CommandKind::kPut, uint32_t(number % kMaxChannels), 1, uint32_t(number), 0, 0};
}

// The producer publishes payload[i] by command i; nothing else orders the two threads.
uint64_t count_mismatches(size_t capacity, uint64_t num_commands) {
  TestFifo fifo(capacity);
  struct Payload {
    uint64_t words[4];
  };
  std::vector<Payload> payload(num_commands);
  std::thread producer([&] {
    FifoProducer end{fifo.memory()};
    for (uint64_t i = 0; i < num_commands; ++i) {
      for (uint64_t w = 0; w < 4; ++w) payload[i].words[w] = i * 4 + w;
      const Command command = encode(numbered(i));
      while (!end.push(command)) sched_yield();
    }
  });
  FifoConsumer end{fifo.memory()};
  uint64_t mismatches = 0;
  for (uint64_t i = 0; i < num_commands; ++i) {
    Command command{};
    while (!end.pop(&command)) sched_yield();
    if (!is_same(decode(command), numbered(i))) ++mismatches;
    for (uint64_t w = 0; w < 4; ++w)
      if (payload[i].words[w] != i * 4 + w) ++mismatches;
  }
  producer.join();
  Command command{};
  if (end.pop(&command)) ++mismatches;
  return mismatches;
}

}  // namespace

TEST_CASE("commands survive encoding") {
  RandomFields random(1);
  for (int i = 0; i < 20000; ++i) {
    const CommandFields fields = random.next();
    const Command command = encode(fields);
    CHECK((command.lo & kPhaseBit) == 0);
    CHECK(is_same(decode(command), fields));
    // The phase bit belongs to the FIFO: it changes nothing for the reader.
    CHECK(is_same(decode({command.lo | kPhaseBit, command.hi}), fields));
  }
}

TEST_CASE("fields of a command do not overlap") {
  const CommandFields zero{CommandKind::kNone, 0, 0, 0, 0, 0};
  for (int field = 0; field < 6; ++field) {
    CommandFields one = zero;
    if (field == 0) one.kind = static_cast<CommandKind>(7);
    if (field == 1) one.channel = kMaxChannels - 1;
    if (field == 2) one.count = kMaxCommandCount;
    if (field == 3) one.bytes = 0xffffffffu;
    if (field == 4) one.src_offset = kMaxOffset;
    if (field == 5) one.dst_offset = kMaxOffset;
    CHECK_MESSAGE(is_same(decode(encode(one)), one), "field " << field);
  }
}

TEST_CASE("a full FIFO refuses, an empty one gives nothing") {
  for (size_t capacity : {size_t(1), size_t(2), size_t(8)}) {
    TestFifo fifo(capacity);
    FifoProducer producer{fifo.memory()};
    FifoConsumer consumer{fifo.memory()};
    Command command{};
    for (uint64_t lap = 0; lap < 5; ++lap) {
      CHECK(!consumer.pop(&command));
      for (uint64_t i = 0; i < capacity; ++i)
        CHECK(producer.push(encode(numbered(lap * capacity + i))));
      CHECK(!producer.push(encode(numbered(99))));
      CHECK(!producer.push(encode(numbered(99))));  // a refused push leaves no trace
      for (uint64_t i = 0; i < capacity; ++i) {
        REQUIRE(consumer.pop(&command));
        CHECK(is_same(decode(command), numbered(lap * capacity + i)));
      }
    }
  }
}

TEST_CASE("laps: random pushes and pops against a queue") {
  for (size_t capacity : {size_t(1), size_t(2), size_t(4), size_t(16)}) {
    TestFifo fifo(capacity);
    FifoProducer producer{fifo.memory()};
    FifoConsumer consumer{fifo.memory()};
    std::deque<CommandFields> model;
    RandomFields fields(unsigned(capacity) + 7);
    std::mt19937 random{unsigned(capacity)};
    uint64_t popped = 0;
    for (int step = 0; step < 4000; ++step) {
      if (random() % 2 == 0) {
        // An all-zero command counts as well: only the phase bit tells whether a slot is valid.
        const CommandFields next =
            random() % 4 == 0 ? CommandFields{CommandKind::kNone, 0, 0, 0, 0, 0} : fields.next();
        Command command = encode(next);
        if (random() % 2 == 0) command.lo |= kPhaseBit;  // the producer sets the phase, not we
        const bool is_pushed = producer.push(command);
        CHECK(is_pushed == (model.size() < capacity));
        if (is_pushed) model.push_back(next);
      } else {
        Command command{};
        const bool is_popped = consumer.pop(&command);
        REQUIRE(is_popped == !model.empty());
        if (!is_popped) continue;
        CHECK(is_same(decode(command), model.front()));
        model.pop_front();
        CHECK(fifo.tail == ++popped);
      }
    }
    CHECK(popped > 20 * capacity);  // many laps
  }
}

TEST_CASE("the phase flips every lap and begins with 1") {
  for (uint64_t capacity : {1, 2, 1024})
    for (uint64_t lap = 0; lap < 4; ++lap) {
      const uint64_t phase = lap % 2 == 0 ? kPhaseBit : 0;
      CHECK(fifo_phase(lap * capacity, capacity) == phase);
      CHECK(fifo_phase(lap * capacity + capacity - 1, capacity) == phase);
    }
}

TEST_CASE("two threads: a popped command publishes its payload") {
  CHECK(count_mismatches(1024, 100000) == 0);
  CHECK(count_mismatches(4, 4000) == 0);
  CHECK(count_mismatches(1, 1000) == 0);
}
