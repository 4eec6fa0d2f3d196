// Bad input, disagreement, lack of memory: all ranks learn of it in the same call and go on.
#include <doctest/doctest.h>

#include <cstring>
#include <functional>

#include "tests/oracle.hpp"
#include "tests/wait_until.hpp"

using namespace commlib;
using namespace commlib::testing;

namespace {

constexpr size_t kHidden = 32;
constexpr int kExperts = 8;
constexpr int kTopk = 3;

EngineConfig config_2x2() { return small_config({0, 0, 1, 1}, kExperts, kTopk, kHidden); }

std::vector<Tokens> tokens_of(const EngineConfig& config, int64_t num_tokens, unsigned seed) {
  std::vector<Tokens> all;
  for (int rank = 0; rank < int(config.node_of_rank.size()); ++rank)
    all.push_back(random_tokens(rank, num_tokens, config, 0.1, seed));
  return all;
}

Ops dispatch_ops(const std::vector<Tokens>& tokens) {
  Ops ops;
  for (const Tokens& own : tokens) ops.push_back(dispatch_op(own, Layout::kGrouped, 1));
  return ops;
}

// Dispatch and combine that must succeed and be right.
void check_usable(EngineGroup& group, const EngineConfig& config, unsigned seed,
                  int64_t num_tokens = 9) {
  Scene scene;
  scene.config = config;
  scene.tokens = tokens_of(config, num_tokens, seed);
  const Ops ops = dispatch_ops(scene.tokens);
  REQUIRE(all_are(group.run_ops(ops), OutcomeKind::kDone));
  std::vector<std::vector<float>> ys(ops.size()), weights(ops.size()), outs(ops.size());
  Ops combines;
  for (size_t rank = 0; rank < ops.size(); ++rank) {
    fill_outputs(scene, int(rank), &ys[rank], &weights[rank]);
    outs[rank].resize(scene.tokens[rank].x.size());
    combines.push_back(combine_op(ops[rank]->handle, ys[rank].data(), outs[rank].data()));
  }
  REQUIRE(all_are(group.run_ops(combines), OutcomeKind::kDone));
  for (size_t rank = 0; rank < ops.size(); ++rank) {
    bool is_same = true;
    for (size_t i = 0; i < outs[rank].size(); ++i)
      is_same &= outs[rank][i] == combined(scene, int(rank), int64_t(i / kHidden), i % kHidden);
    CHECK(is_same);
  }
}

// All ranks: this kind, the same message. Returns the message.
std::string same_message(const std::vector<Outcome>& outcomes, OutcomeKind kind) {
  for (const Outcome& outcome : outcomes) {
    CHECK(outcome.kind == kind);
    CHECK(outcome.message == outcomes[0].message);
  }
  return outcomes[0].message;
}

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

}  // namespace

TEST_CASE("bad input on one rank is told to all, in the same call") {
  const EngineConfig config = config_2x2();
  EngineGroup group(config);
  const auto try_one = [&](int rank, const std::function<void(Op&, Tokens&)>& spoil) {
    std::vector<Tokens> tokens = tokens_of(config, 6, 1);
    const Ops ops = dispatch_ops(tokens);
    spoil(*ops[size_t(rank)], tokens[size_t(rank)]);
    const std::string message = same_message(group.run_ops(ops), OutcomeKind::kRejected);
    CHECK(contains(message, "rank " + std::to_string(rank) + ": "));
    check_usable(group, config, 2);
    return message;
  };
  for (int rank = 0; rank < 4; ++rank) {
    CAPTURE(rank);
    CHECK(contains(try_one(rank, [](Op&, Tokens& t) { t.topk_idx[4] = 8; }),
                   "expert id 8 at token 1, slot 1 on rank " + std::to_string(rank) +
                       " is not -1 or in 0..7"));
  }
  CHECK(contains(try_one(1, [](Op&, Tokens& t) { t.topk_idx[0] = t.topk_idx[1] = 5; }),
                 "expert 5 occurs twice"));
  CHECK(contains(try_one(2,
                         [](Op&, Tokens& t) {
                           t.topk_idx[3] = 0;
                           t.topk_idx[4] = t.topk_idx[5] = -1;
                           t.weights[3] = NAN;
                         }),
                 "is not finite"));
  CHECK(contains(try_one(3, [](Op& op, Tokens&) { op.reject = "x has 7 columns, not 32"; }),
                 "x has 7 columns, not 32"));
  group.close();
  for (int rank = 0; rank < 4; ++rank) CHECK(!group.engine(rank).has_fault());
}

TEST_CASE("two bad ranks are both named; long texts end somewhere") {
  const EngineConfig config = config_2x2();
  EngineGroup group(config);
  std::vector<Tokens> tokens = tokens_of(config, 6, 1);
  const Ops ops = dispatch_ops(tokens);
  ops[0]->reject = "first reason";
  ops[3]->reject = std::string(1000, 'y');
  const std::string message = same_message(group.run_ops(ops), OutcomeKind::kRejected);
  CHECK(contains(message, "rank 0: first reason; rank 3: yyy"));
  CHECK(message.size() < 600);
  check_usable(group, config, 2);
}

TEST_CASE("bad input to a combine or a cached dispatch") {
  const EngineConfig config = config_2x2();
  EngineGroup group(config);
  const std::vector<Tokens> tokens = tokens_of(config, 6, 1);
  const Ops ops = dispatch_ops(tokens);
  REQUIRE(all_are(group.run_ops(ops), OutcomeKind::kDone));
  for (const OpKind kind : {OpKind::kCachedDispatch, OpKind::kCombine}) {
    Ops bad;
    std::vector<std::vector<float>> outs(4, std::vector<float>(6 * kHidden, -5));
    for (size_t rank = 0; rank < 4; ++rank)
      bad.push_back(kind == OpKind::kCombine
                        ? combine_op(ops[rank]->handle, nullptr, outs[rank].data())
                        : cached_op(ops[rank]->handle, tokens[rank]));
    bad[2]->reject = "no";
    CHECK(same_message(group.run_ops(bad), OutcomeKind::kRejected) == "rank 2: no");
    for (const auto& out : outs)  // nothing moves
      CHECK(std::count(out.begin(), out.end(), -5.0f) == long(out.size()));
  }
  check_usable(group, config, 3);
}

TEST_CASE("ranks that disagree about the call are told what each of them calls") {
  const EngineConfig config = config_2x2();
  EngineGroup group(config);
  const std::vector<Tokens> tokens = tokens_of(config, 6, 1);
  const Ops first = dispatch_ops(tokens);
  const Ops second = dispatch_ops(tokens);
  REQUIRE(all_are(group.run_ops(first), OutcomeKind::kDone));
  REQUIRE(all_are(group.run_ops(second), OutcomeKind::kDone));
  std::vector<float> out(6 * kHidden), grads(6 * kTopk);
  const auto y = [&](size_t rank) { return rows_of(*first[rank]); };

  const auto disagree = [&](const std::function<std::shared_ptr<Op>(size_t)>& make,
                            const std::function<std::shared_ptr<Op>(size_t)>& make_odd,
                            const std::string& usual, const std::string& odd) {
    for (const size_t rank : {0, 1, 3}) {
      Ops ops;
      for (size_t r = 0; r < 4; ++r) ops.push_back(r == rank ? make_odd(r) : make(r));
      const std::string message = same_message(group.run_ops(ops), OutcomeKind::kRejected);
      CAPTURE(message);
      CHECK(contains(message, "ranks disagree about the call"));
      CHECK(contains(message, usual));
      CHECK(contains(message, odd));
      CHECK(contains(message, "rank " + std::to_string(rank)));
    }
  };
  const auto fresh = [&](size_t r) { return dispatch_op(tokens[r], Layout::kGrouped, 1); };
  const auto cached = [&](size_t r) { return cached_op(first[r]->handle, tokens[r]); };
  const auto combine = [&](size_t r) { return combine_op(first[r]->handle, y(r), out.data()); };
  const auto with = [](auto make, auto change) {
    return [=](size_t r) {
      auto op = make(r);
      change(*op);
      return op;
    };
  };
  disagree(
      fresh, [&](size_t r) { return dispatch_op(tokens[r], Layout::kRows, 1); }, "layout=grouped",
      "layout=rows");
  disagree(
      fresh, [&](size_t r) { return dispatch_op(tokens[r], Layout::kGrouped, 16); },
      "expert_alignment=1", "expert_alignment=16");
  disagree(fresh, with(fresh, [](Op& op) { op.dispatch.dtype = Dtype::kBf16; }), "dtype=float32",
           "dtype=bfloat16");
  disagree(fresh, with(fresh, [](Op& op) { op.dispatch.cast = Cast::kE4m3; }), "cast=none",
           "cast=e4m3");
  disagree(fresh, cached, "'dispatch ", "'cached_dispatch ");
  disagree(fresh, combine, "'dispatch ", "'combine ");
  disagree(fresh, [](size_t) { return barrier_op(); }, "'dispatch ", "'barrier'");
  disagree(
      cached, [&](size_t r) { return cached_op(second[r]->handle, tokens[r]); },
      "handle=" + std::to_string(first[0]->handle->epoch),
      "handle=" + std::to_string(second[0]->handle->epoch));
  disagree(combine,
           with(combine,
                [&](Op& op) {
                  op.combine.has_weight_grads = true;
                  op.combine.weight_grads = grads.data();
                  op.combine.out_weight_grads = grads.data();
                }),
           "weight_grads=no", "weight_grads=yes");
  disagree(combine, with(combine, [](Op& op) { op.combine.dtype = Dtype::kBf16; }), "dtype=float32",
           "dtype=bfloat16");
  check_usable(group, config, 2);
  group.close();
  for (int rank = 0; rank < 4; ++rank) CHECK(!group.engine(rank).has_fault());
}

TEST_CASE("no room on one rank: all get the same capacity error, and the next call works") {
  EngineConfig config = config_2x2();
  config.max_arena_bytes = 128 << 10;
  EngineGroup group(config);
  std::vector<Tokens> tokens = tokens_of(config, 2000, 1);
  // Everything to rank 2, whose experts are 4 and 5: the others have room.
  for (Tokens& own : tokens)
    for (size_t i = 0; i < own.topk_idx.size(); ++i)
      own.topk_idx[i] = i % 3 == 0 ? 4 : i % 3 == 1 ? 5 : -1;
  const std::vector<Outcome> outcomes = group.run_ops(dispatch_ops(tokens));
  const std::string message = same_message(outcomes, OutcomeKind::kCapacity);
  CHECK(contains(message, "rank 2: "));
  CHECK(!contains(message, "rank 1: "));
  CHECK(contains(message, "max_arena_bytes"));
  for (const Outcome& outcome : outcomes) {
    CHECK(outcome.needed == outcomes[0].needed);
    CHECK(outcome.needed >= 2 * 4 * 2000 * kHidden * 4);
    CHECK(outcome.available == outcomes[0].available);
    CHECK(outcome.available <= config.max_arena_bytes);
    CHECK(outcome.available > 0);
  }
  check_usable(group, config, 2);
  group.close();
  for (int rank = 0; rank < 4; ++rank) CHECK(!group.engine(rank).has_fault());
}

TEST_CASE("memory that handles and outputs hold comes back with them") {
  EngineConfig config = config_2x2();
  config.max_arena_bytes = 256 << 10;
  EngineGroup group(config);
  const std::vector<Tokens> tokens = tokens_of(config, 60, 1);
  std::vector<Ops> held;
  std::vector<Outcome> outcomes;
  for (int i = 0; i < 100; ++i) {
    const Ops ops = dispatch_ops(tokens);
    outcomes = group.run_ops(ops);
    if (outcomes[0].kind != OutcomeKind::kDone) break;
    held.push_back(ops);
  }
  same_message(outcomes, OutcomeKind::kCapacity);
  CHECK(held.size() > 2);
  const size_t num_held = held.size();
  held.erase(held.begin() + 1);  // room for one more
  REQUIRE(all_are(group.run_ops(dispatch_ops(tokens)), OutcomeKind::kDone));
  for (int repeat = 0; repeat < 3; ++repeat) {
    held.resize(1);  // and again up to the limit
    for (;;) {
      const Ops ops = dispatch_ops(tokens);
      if (!all_are(group.run_ops(ops), OutcomeKind::kDone)) break;
      held.push_back(ops);
    }
    CHECK(held.size() == num_held);
  }
  held.clear();
  // The executor drops its own reference a moment after it reports the outcome.
  for (int rank = 0; rank < 4; ++rank)
    CHECK(wait_until([&] { return group.engine(rank).memory().arena_used_bytes == 0; }));
  check_usable(group, config, 2);
}

TEST_CASE("the registered region does not grow with the tokens, the arena does") {
  const EngineConfig config = config_2x2();
  EngineGroup group(config);
  const MemoryReport before = group.engine(0).memory();
  check_usable(group, config, 1, 400);
  const MemoryReport after = group.engine(0).memory();
  CHECK(before.registered_bytes > 4 * config.ring_bytes);
  CHECK(after.registered_bytes == before.registered_bytes);
  CHECK(after.arena_bytes > before.arena_bytes);
}

TEST_CASE("many handles stay valid side by side") {
  const EngineConfig config = config_2x2();
  EngineGroup group(config);
  constexpr unsigned kHandles = 24;
  std::vector<Scene> scenes(kHandles);
  std::vector<Ops> ops;
  for (unsigned i = 0; i < kHandles; ++i) {
    scenes[i].config = config;
    scenes[i].tokens = tokens_of(config, 5 + i % 4, i);
    ops.push_back(dispatch_ops(scenes[i].tokens));
    REQUIRE(all_are(group.run_ops(ops[i]), OutcomeKind::kDone));
  }
  for (unsigned n = 0; n < kHandles; ++n) {
    const unsigned i = (n * 7 + 3) % kHandles;  // in another order than they were made
    std::vector<std::vector<float>> ys(4), weights(4), outs(4);
    Ops combines;
    for (size_t rank = 0; rank < 4; ++rank) {
      fill_outputs(scenes[i], int(rank), &ys[rank], &weights[rank]);
      outs[rank].resize(scenes[i].tokens[rank].x.size());
      combines.push_back(combine_op(ops[i][rank]->handle, ys[rank].data(), outs[rank].data()));
    }
    REQUIRE(all_are(group.run_ops(combines), OutcomeKind::kDone));
    bool is_same = true;
    for (size_t rank = 0; rank < 4; ++rank)
      for (size_t v = 0; v < outs[rank].size(); ++v)
        is_same &=
            outs[rank][v] == combined(scenes[i], int(rank), int64_t(v / kHidden), v % kHidden);
    CHECK(is_same);
    for (size_t rank = 0; rank < 4; ++rank) {  // the output is still what was dispatched
      const std::vector<SceneRow> rows = scene_rows(scenes[i], int(rank));
      for (size_t row = 0; row < rows.size(); ++row)
        CHECK(rows_of(*ops[i][rank])[row * kHidden] ==
              scenes[i].tokens[size_t(rows[row].source)].x[size_t(rows[row].token) * kHidden]);
    }
    if (n % 2 == 0) ops[i].clear();  // holes for the others to land in
    check_usable(group, config, 100 + n, 3);
  }
}
