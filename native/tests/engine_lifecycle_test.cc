// Set-up, the queue, closing, and several Runtimes in one process.
#include <doctest/doctest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstring>
#include <future>

#include "tests/oracle.hpp"
#include "tests/wait_until.hpp"

using namespace commlib;
using namespace commlib::testing;

namespace {

constexpr size_t kHidden = 32;

EngineConfig config_2x2() { return small_config({0, 0, 1, 1}, 8, 3, kHidden); }

std::vector<std::unique_ptr<Engine>> make_engines(
    EngineConfig config, const std::function<void(EngineConfig&)>& adapt = {}) {
  std::vector<std::unique_ptr<Engine>> engines;
  config.transport = "loopback";
  for (int rank = 0; rank < int(config.node_of_rank.size()); ++rank) {
    EngineConfig own = config;
    own.rank = rank;
    if (adapt) adapt(own);
    engines.push_back(std::make_unique<Engine>(own));
  }
  return engines;
}

std::vector<std::vector<uint8_t>> addresses_of(
    const std::vector<std::unique_ptr<Engine>>& engines) {
  std::vector<std::vector<uint8_t>> addresses;
  for (const auto& engine : engines) addresses.push_back(engine->address());
  return addresses;
}

std::string connect_error(Engine& engine, const std::vector<std::vector<uint8_t>>& addresses) {
  try {
    engine.connect(addresses);
    return "";
  } catch (const ConfigException& error) {
    return error.what();
  }
}

std::string config_error(const EngineConfig& config) {
  try {
    Engine engine(config);
    return "";
  } catch (const ConfigException& error) {
    return error.what();
  }
}

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

Scene make_scene(const EngineConfig& config, int64_t num_tokens, unsigned seed) {
  Scene scene;
  scene.config = config;
  for (int rank = 0; rank < scene.num_ranks(); ++rank)
    scene.tokens.push_back(random_tokens(rank, num_tokens, config, 0.1, seed));
  return scene;
}

// What one rank's thread does: dispatch and combine several times. False if anything is wrong.
bool work(EngineGroup& group, const Scene& scene, int rank, int repeats) {
  const Tokens& own = scene.tokens[size_t(rank)];
  std::vector<float> y, weights, out(own.x.size());
  fill_outputs(scene, rank, &y, &weights);
  for (int i = 0; i < repeats; ++i) {
    auto op = dispatch_op(own, Layout::kGrouped, 1);
    group.engine(rank).submit(op);
    if (op->wait_for(90).kind != OutcomeKind::kDone) return false;
    const std::vector<SceneRow> rows = scene_rows(scene, rank);
    if (op->landing.num_rows != rows.size()) return false;
    for (size_t row = 0; row < rows.size(); ++row)
      if (std::memcmp(
              rows_of(*op) + row * kHidden,
              scene.tokens[size_t(rows[row].source)].x.data() + size_t(rows[row].token) * kHidden,
              kHidden * 4) != 0)
        return false;
    auto combine = combine_op(op->handle, y.data(), out.data());
    group.engine(rank).submit(combine);
    if (combine->wait_for(90).kind != OutcomeKind::kDone) return false;
    for (size_t v = 0; v < out.size(); ++v)
      if (out[v] != combined(scene, rank, int64_t(v / kHidden), v % kHidden)) return false;
  }
  return true;
}

}  // namespace

TEST_CASE("connect: every rank refuses when one has another configuration") {
  for (const int odd : {0, 2}) {
    auto engines = make_engines(config_2x2(), [odd](EngineConfig& config) {
      config.config_digest = config.rank == odd ? 5 : 4;
    });
    const auto addresses = addresses_of(engines);
    for (auto& engine : engines) {
      const std::string message = connect_error(*engine, addresses);
      CHECK(contains(message, "rank " + std::to_string(odd == 0 ? 1 : odd)));
      CHECK(contains(message, "configuration"));
    }
    for (auto& engine : engines) {  // nothing has started, closing is easy
      CHECK(engine->close().kind == OutcomeKind::kDone);
      CHECK(!engine->has_fault());
    }
  }
}

TEST_CASE("connect: what is no address of ours is refused") {
  auto engines = make_engines(config_2x2());
  const auto good = addresses_of(engines);
  auto bad = good;
  bad.pop_back();
  CHECK(contains(connect_error(*engines[0], bad), "3 addresses for 4 ranks"));
  bad = good;
  bad[2].resize(10);
  CHECK(contains(connect_error(*engines[0], bad), "the address of rank 2 is too short"));
  bad = good;
  bad[3][0] ^= 1;
  CHECK(contains(connect_error(*engines[0], bad), "the address of rank 3"));
  bad = good;
  std::swap(bad[1], bad[2]);
  CHECK(contains(connect_error(*engines[0], bad), "the address of rank 1"));
  bad = good;
  bad[1].push_back(0);
  CHECK(contains(connect_error(*engines[0], bad), "the address of rank 1"));
  // Refused addresses leave the engine as it was.
  for (auto& engine : engines) CHECK(connect_error(*engine, good) == "");
  CHECK(contains(connect_error(*engines[0], good), "connected already"));
  std::vector<std::future<OutcomeKind>> closes;
  for (auto& engine : engines)
    closes.push_back(std::async(std::launch::async, [&engine] { return engine->close().kind; }));
  for (auto& outcome : closes) CHECK(outcome.get() == OutcomeKind::kDone);
}

TEST_CASE("sizes that cannot work are refused at once, with the values") {
  const EngineConfig good = small_config({0, 0}, 4, 2, 64);
  CHECK(config_error(good) == "");
  EngineConfig config = good;
  config.ring_bytes = config.chunk_bytes * 2 - 1;
  CHECK(contains(config_error(config), "ring_bytes=16383"));
  config.chunk_bytes = 100;     // less than a slot: chunks of one slot
  config.ring_bytes = 2 * 304;  // 64 * 4 + 16 + 2 * 12 each, rounded up
  CHECK(config_error(config) == "");
  config.ring_bytes = 2 * 304 - 1;
  CHECK(contains(config_error(config), "ring_bytes=607"));
  config = good;
  config.num_experts = 5;
  CHECK(contains(config_error(config), "num_experts=5"));
  config = good;
  config.rank = 2;
  CHECK(contains(config_error(config), "rank=2"));
  config = good;
  config.num_topk = 65;
  CHECK(contains(config_error(config), "num_topk=65"));
  config = good;
  config.num_threads = 0;
  CHECK(contains(config_error(config), "num_threads=0"));
  // What a command cannot name. Checked before anything is mapped.
  config = small_config({0, 1}, 4, 2, 64);
  config.transport = "loopback";
  config.chunk_bytes = size_t(4) << 30;
  config.ring_bytes = size_t(8) << 30;
  CHECK(contains(config_error(config), "chunk_bytes=4294967296"));
  config.ring_bytes = size_t(20) << 30;
  CHECK(contains(config_error(config), "ring_bytes=21474836480"));
}

TEST_CASE("max_in_flight: one more waits until an operation is over") {
  EngineConfig config = config_2x2();
  config.max_in_flight = 3;
  EngineGroup group(config);
  std::atomic<bool> may_step{false};
  group.engine(0).executor().set_step_filter([&](const char*) { return may_step.load(); });
  Ops queued;
  for (int i = 0; i < 3; ++i) {
    queued.push_back(barrier_op());
    group.engine(0).submit(queued.back());
  }
  queued.push_back(barrier_op());
  std::atomic<bool> is_submitted{false};
  std::thread fourth([&] {
    group.engine(0).submit(queued.back());
    is_submitted = true;
  });
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  CHECK(!is_submitted);
  CHECK(!queued[0]->is_finished());
  Ops others;
  for (int rank = 1; rank < 4; ++rank) {
    for (int i = 0; i < 3; ++i) {
      others.push_back(barrier_op());
      group.engine(rank).submit(others.back());
    }
  }
  may_step = true;
  fourth.join();
  for (int rank = 1; rank < 4; ++rank) {
    others.push_back(barrier_op());
    group.engine(rank).submit(others.back());
  }
  CHECK(all_are(EngineGroup::wait(queued), OutcomeKind::kDone));
  CHECK(all_are(EngineGroup::wait(others), OutcomeKind::kDone));
  // There is room again as soon as one has finished.
  for (int i = 0; i < 10; ++i)
    CHECK(all_are(group.run_ops({barrier_op(), barrier_op(), barrier_op(), barrier_op()}),
                  OutcomeKind::kDone));
  group.close();
}

TEST_CASE("operations finish in the order they were submitted, without anybody waiting") {
  const Scene scene = make_scene(config_2x2(), 7, 1);
  EngineGroup group(scene.config);
  std::vector<Ops> queue;
  for (int i = 0; i < 6; ++i) {
    Ops ops;
    for (int rank = 0; rank < 4; ++rank)
      ops.push_back(i % 2 == 0 ? dispatch_op(scene.tokens[size_t(rank)], Layout::kGrouped, 1)
                               : barrier_op());
    group.submit(ops);
    queue.push_back(ops);
  }
  CHECK(all_are(EngineGroup::wait(queue.back()), OutcomeKind::kDone));
  uint64_t epoch = 0;
  for (size_t i = 0; i < queue.size(); ++i)
    for (const auto& op : queue[i]) {
      CHECK(op->is_finished());
      if (i % 2 == 0) CHECK(op->handle->epoch > epoch);
      if (i % 2 == 0 && op == queue[i].back()) epoch = op->handle->epoch;
    }
  group.close();
}

TEST_CASE("reports may be read while operations run") {
  EngineConfig config = config_2x2();
  config.num_threads = 2;
  const Scene scene = make_scene(config, 300, 3);
  EngineGroup group(config);
  Ops ops;
  for (int rank = 0; rank < 4; ++rank)
    ops.push_back(dispatch_op(scene.tokens[size_t(rank)], Layout::kGrouped, 1));
  const MemoryReport before = group.engine(0).memory();
  group.submit(ops);
  ProxyCounters last;
  while (!ops[0]->is_finished()) {
    const MemoryReport now = group.engine(0).memory();
    CHECK(now.arena_bytes >= before.arena_bytes);
    const ProxyCounters counters = group.engine(0).proxy_counters();
    CHECK(counters.commands >= last.commands);
    last = counters;
    group.engine(0).role_counters();
  }
  CHECK(all_are(EngineGroup::wait(ops), OutcomeKind::kDone));
  CHECK(group.engine(0).memory().arena_bytes > before.arena_bytes);  // it grew meanwhile
  CHECK(group.engine(0).role_counters().at("push").rows > 0);
  CHECK(group.engine(0).proxy_counters().data_bytes > 0);
  group.close();
}

TEST_CASE("close: once, twice, never connected; nothing is accepted afterwards") {
  EngineGroup group(config_2x2());
  for (const Outcome& outcome : group.close()) CHECK(outcome.kind == OutcomeKind::kDone);
  for (const Outcome& outcome : group.close()) CHECK(outcome.kind == OutcomeKind::kDone);
  CHECK_THROWS_AS(group.engine(1).submit(barrier_op()), ConfigException);
  auto engines = make_engines(config_2x2());
  for (auto& engine : engines) CHECK(engine->close().kind == OutcomeKind::kDone);
  const auto untouched = make_engines(config_2x2());  // destroyed as they are
}

TEST_CASE("close waits for what is queued") {
  const Scene scene = make_scene(config_2x2(), 30, 1);
  EngineGroup group(scene.config);
  Ops ops;
  for (int rank = 0; rank < 4; ++rank)
    ops.push_back(dispatch_op(scene.tokens[size_t(rank)], Layout::kGrouped, 1));
  group.submit(ops);
  for (const Outcome& outcome : group.close()) CHECK(outcome.kind == OutcomeKind::kDone);
  for (const auto& op : ops) CHECK(op->wait_for(0).kind == OutcomeKind::kDone);
}

TEST_CASE("ranks may be destroyed one by one after they have closed") {
  // Those that are still there look at the memory of those that have gone: their heartbeats.
  for (int repeat = 0; repeat < 3; ++repeat) {
    EngineGroup group(config_2x2());
    group.run([&](int rank) {
      group.engine(rank).close();
      group.destroy(rank);
    });
  }
}

TEST_CASE("a rank that has said good-bye and gone is neither lost nor touched") {
  EngineConfig config = config_2x2();
  config.heartbeat_timeout_s = 0.4;  // beats and looks at the peers every 20 ms
  EngineGroup group(config);
  // Ranks 1 to 3 are in the barrier of rank 0's close, and go on living.
  Ops barriers;
  for (int rank = 1; rank < 4; ++rank) {
    barriers.push_back(barrier_op());
    group.engine(rank).submit(barriers.back());
  }
  CHECK(group.engine(0).close().kind == OutcomeKind::kDone);
  CHECK(all_are(EngineGroup::wait(barriers), OutcomeKind::kDone));
  group.destroy(0);
  const double begin = now_s();
  REQUIRE(wait_until([&] { return now_s() - begin > 2 * config.heartbeat_timeout_s; }));
  // Ranks 1 to 3 may starve each other on a busy machine, but nobody may name rank 0.
  for (int rank = 1; rank < 4; ++rank)
    if (group.engine(rank).has_fault()) CHECK(group.engine(rank).fault().peer != 0);
}

TEST_CASE("outputs outlive their engine") {
  const Scene scene = make_scene(config_2x2(), 9, 1);
  Ops ops;
  {
    EngineGroup group(scene.config);
    for (int rank = 0; rank < 4; ++rank)
      ops.push_back(dispatch_op(scene.tokens[size_t(rank)], Layout::kGrouped, 1));
    REQUIRE(all_are(group.run_ops(ops), OutcomeKind::kDone));
    group.close();
  }
  for (int rank = 0; rank < 4; ++rank) {
    const std::vector<SceneRow> rows = scene_rows(scene, rank);
    for (size_t i = 0; i < rows.size(); ++i)
      CHECK(rows_of(*ops[size_t(rank)])[i * kHidden] ==
            scene.tokens[size_t(rows[i].source)].x[size_t(rows[i].token) * kHidden]);
  }
}

#if !defined(__SANITIZE_THREAD__)  // does not support forks of processes with threads
TEST_CASE("a forked child cannot use the Runtime, nor hurt it by leaving") {
  const Scene scene = make_scene(config_2x2(), 9, 1);
  EngineGroup group(scene.config);
  const pid_t pid = fork();
  REQUIRE(pid >= 0);
  if (pid == 0) {
    int result = 0;
    for (int rank = 0; rank < 4; ++rank) {
      try {
        group.engine(rank).submit(barrier_op());
        result = 1;
      } catch (const ConfigException&) {
      }
      group.engine(rank).close();
      group.destroy(rank);
    }
    _exit(result);
  }
  int status = -1;
  REQUIRE(waitpid(pid, &status, 0) == pid);
  CHECK(WIFEXITED(status));
  CHECK(WEXITSTATUS(status) == 0);
  std::vector<std::future<bool>> results;
  for (int rank = 0; rank < 4; ++rank)
    results.push_back(
        std::async(std::launch::async, [&, rank] { return work(group, scene, rank, 1); }));
  for (auto& result : results) CHECK(result.get());
  for (const Outcome& outcome : group.close()) CHECK(outcome.kind == OutcomeKind::kDone);
}
#endif

TEST_CASE("several Runtimes of one process do not disturb each other") {
  const Scene a = make_scene(config_2x2(), 11, 1);
  Scene b = make_scene(small_config({0, 1, 1}, 6, 2, kHidden), 14, 2);
  b.config.num_threads = 2;
  EngineGroup group_a(a.config), group_b(b.config);
  std::vector<std::future<bool>> results;
  for (int rank = 0; rank < 4; ++rank)
    results.push_back(
        std::async(std::launch::async, [&, rank] { return work(group_a, a, rank, 8); }));
  for (int rank = 0; rank < 3; ++rank)
    results.push_back(
        std::async(std::launch::async, [&, rank] { return work(group_b, b, rank, 12); }));
  for (auto& result : results) CHECK(result.get());
  group_a.close();
  std::vector<std::future<bool>> more;
  for (int rank = 0; rank < 3; ++rank)
    more.push_back(std::async(std::launch::async, [&, rank] { return work(group_b, b, rank, 2); }));
  for (auto& result : more) CHECK(result.get());
  group_b.close();
}
