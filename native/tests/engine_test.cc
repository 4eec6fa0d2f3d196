// Dispatch and combine end to end in the native core: ranks are threads, scale-out is the loopback
// provider. The expected rows are written down naively here, in the order of docs/design.md.
#include <doctest/doctest.h>

#include "tests/engine_group.hpp"
#include "tests/other_rings.hpp"

using namespace commlib;
using namespace commlib::testing;

namespace {

struct Case {
  std::vector<int> node_of_rank;
  int num_experts;
  int num_topk;
  size_t hidden;
  std::vector<int64_t> num_tokens;  // [rank]
  double mask_share = 0;
  size_t alignment = 1;
  int num_threads = 1;
  size_t ring_bytes = 64 << 10;
  size_t chunk_bytes = 8 << 10;
  int num_proxy_threads = 1;
  bool has_other_rings = false;  // not in one piece with the rest of the region
};

EngineConfig config_of(const Case& c) {
  EngineConfig config;
  config.node_of_rank = c.node_of_rank;
  config.hidden = c.hidden;
  config.num_experts = c.num_experts;
  config.num_topk = c.num_topk;
  config.num_threads = c.num_threads;
  config.num_proxy_threads = c.num_proxy_threads;
  config.chunk_tokens = 4;
  config.ring_bytes = c.ring_bytes;
  config.chunk_bytes = c.chunk_bytes;
  config.arena_bytes = 64 << 10;  // small: the first calls must grow it
  config.max_arena_bytes = 1 << 30;
  config.timeout_s = 20;
  config.heartbeat_timeout_s = 20;
  return config;
}

struct Row {
  int source;
  int64_t token;
  int k;
};

// Rows of `rank` in the grouped layout: expert ascending, (source, token) ascending.
std::vector<std::vector<Row>> expected_rows(const Case& c, const std::vector<Tokens>& all,
                                            int rank) {
  const int per_rank = c.num_experts / int(c.node_of_rank.size());
  std::vector<std::vector<Row>> rows(static_cast<size_t>(per_rank));
  for (int i = 0; i < per_rank; ++i)
    for (int s = 0; s < int(all.size()); ++s)
      for (int64_t t = 0; t < all[size_t(s)].num_tokens; ++t)
        for (int k = 0; k < c.num_topk; ++k)
          if (all[size_t(s)].topk_idx[size_t(t * c.num_topk + k)] == rank * per_rank + i)
            rows[size_t(i)].push_back({s, t, k});
  return rows;
}

void check_grouped(const Case& c, const std::vector<Tokens>& all, int rank, const Op& op) {
  const auto expected = expected_rows(c, all, rank);
  const float* x = reinterpret_cast<const float*>(op.output->data() + op.landing.rows_offset);
  const float* w = reinterpret_cast<const float*>(op.output->data() + op.landing.weights_offset);
  size_t row = 0;
  for (const auto& expert_rows : expected) {
    for (const Row& r : expert_rows) {
      bool is_same = w[row] == all[size_t(r.source)].weights[size_t(r.token * c.num_topk + r.k)];
      for (size_t i = 0; i < c.hidden; ++i)
        is_same &= x[row * c.hidden + i] == identity(r.source, r.token, i);
      CHECK_MESSAGE(is_same, "rank " << rank << " row " << row << " is not source " << r.source
                                     << " token " << r.token);
      ++row;
    }
    for (; row % c.alignment != 0; ++row) {
      bool is_zero = w[row] == 0;
      for (size_t i = 0; i < c.hidden; ++i) is_zero &= x[row * c.hidden + i] == 0;
      CHECK_MESSAGE(is_zero, "padding row " << row << " of rank " << rank << " is not zero");
    }
  }
  CHECK(row == op.landing.num_rows);
}

// Each row doubled and summed without weights: x * 2 * (number of unmasked slots), exact in FP32.
void check_combined(const Case& c, const Tokens& own, int rank, const std::vector<float>& out) {
  for (int64_t t = 0; t < own.num_tokens; ++t) {
    int slots = 0;
    for (int k = 0; k < c.num_topk; ++k) slots += own.topk_idx[size_t(t * c.num_topk + k)] >= 0;
    bool is_same = true;
    for (size_t i = 0; i < c.hidden; ++i)
      is_same &= out[size_t(t) * c.hidden + i] == identity(rank, t, i) * 2 * float(slots);
    CHECK_MESSAGE(is_same, "combined token " << t << " of rank " << rank << " is wrong");
  }
}

void run_case(const Case& c, int repeats = 2) {
  OtherRings rings;
  EngineGroup group(config_of(c), [&](EngineConfig& own) {
    if (c.has_other_rings) own.rings = rings.make(own.rank, c.node_of_rank, c.ring_bytes);
  });
  for (int repeat = 0; repeat < repeats; ++repeat) {
    std::vector<Tokens> all;
    for (int rank = 0; rank < group.size(); ++rank)
      all.push_back(make_tokens(rank, c.num_tokens[size_t(rank)], c.hidden, c.num_topk,
                                c.num_experts, c.mask_share, unsigned(repeat + 1)));
    std::vector<std::shared_ptr<Op>> ops(all.size());
    std::vector<std::vector<float>> outs(all.size());
    std::vector<std::vector<float>> grads(all.size());
    group.run([&](int rank) {
      const Tokens& own = all[size_t(rank)];
      auto op = dispatch_op(own, Layout::kGrouped, c.alignment);
      group.engine(rank).submit(op);
      if (op->wait().kind != OutcomeKind::kDone) return;
      ops[size_t(rank)] = op;
      // By handle: the same rows again.
      auto again = std::make_shared<Op>();
      again->kind = OpKind::kCachedDispatch;
      again->handle = op->handle;
      again->dispatch.x = own.x.data();
      again->dispatch.num_tokens = own.num_tokens;
      group.engine(rank).submit(again);
      if (again->wait().kind != OutcomeKind::kDone) return;
      const size_t bytes = size_t(op->landing.num_rows) * c.hidden * sizeof(float);
      CHECK(std::memcmp(op->output->data() + op->landing.rows_offset,
                        again->output->data() + again->landing.rows_offset, bytes) == 0);

      const float* rows = rows_of(*op);
      std::vector<float> y(rows, rows + size_t(op->landing.num_rows) * c.hidden);
      for (float& value : y) value *= 2;
      const float* row_weights =
          reinterpret_cast<const float*>(op->output->data() + op->landing.weights_offset);
      outs[size_t(rank)].assign(own.x.size(), -1);
      grads[size_t(rank)].assign(own.weights.size(), -1);
      auto combine = std::make_shared<Op>();
      combine->kind = OpKind::kCombine;
      combine->handle = op->handle;
      combine->combine.y = y.data();
      combine->combine.has_weight_grads = true;
      combine->combine.weight_grads = row_weights;
      combine->combine.out = outs[size_t(rank)].data();
      combine->combine.out_weight_grads = grads[size_t(rank)].data();
      group.engine(rank).submit(combine);
      if (combine->wait().kind != OutcomeKind::kDone) outs[size_t(rank)].clear();
    });
    for (int rank = 0; rank < group.size(); ++rank) {
      REQUIRE(ops[size_t(rank)]);
      check_grouped(c, all, rank, *ops[size_t(rank)]);
      REQUIRE(outs[size_t(rank)].size() == all[size_t(rank)].x.size());
      check_combined(c, all[size_t(rank)], rank, outs[size_t(rank)]);
      for (size_t i = 0; i < grads[size_t(rank)].size(); ++i) {
        const float expected =
            all[size_t(rank)].topk_idx[i] < 0 ? 0.0f : all[size_t(rank)].weights[i];
        CHECK(grads[size_t(rank)][i] == expected);
      }
    }
  }
  group.close();
  for (int rank = 0; rank < group.size(); ++rank) CHECK(!group.engine(rank).has_fault());
}

}  // namespace

TEST_CASE("one rank") { run_case({{0}, 4, 2, 8, {5}}); }
TEST_CASE("one node") { run_case({{0, 0, 0}, 6, 3, 16, {17, 9, 23}, 0.1, 4}); }
TEST_CASE("2 nodes x 2") { run_case({{0, 0, 1, 1}, 8, 3, 32, {37, 0, 11, 50}, 0.2, 8}); }
TEST_CASE("4 nodes x 1") { run_case({{0, 1, 2, 3}, 8, 4, 16, {20, 31, 8, 1}}); }
TEST_CASE("uneven nodes") { run_case({{0, 0, 0, 1, 2, 2}, 12, 4, 16, {9, 8, 30, 12, 5, 14}}); }
TEST_CASE("interleaved nodes") { run_case({{0, 1, 0, 1}, 8, 8, 16, {25, 12, 18, 9}}); }
TEST_CASE("one expert per rank, all masked rank") {
  run_case({{0, 0, 1, 1}, 4, 1, 16, {13, 7, 0, 21}, 0.9});
}
TEST_CASE("two threads per rank") {
  run_case({{0, 0, 1, 1}, 8, 3, 32, {40, 22, 31, 50}, 0.1, 1, 2});
}
TEST_CASE("several proxy threads per rank") {
  for (const int proxies : {2, 3, 8}) {
    Case c{{0, 0, 1, 1, 2, 2, 3, 3}, 16, 5, 32, {40, 22, 31, 50, 0, 17, 9, 33}, 0.1, 1, 2};
    c.num_proxy_threads = proxies;
    run_case(c);
  }
  Case uneven{{0, 0, 0, 1, 2, 2}, 12, 4, 16, {9, 8, 30, 12, 5, 14}};
  uneven.num_proxy_threads = 2;
  run_case(uneven);
}
TEST_CASE("rings in other memory") {
  Case c{{0, 0, 1, 2}, 8, 3, 32, {37, 0, 11, 50}, 0.2, 8};
  c.has_other_rings = true;
  c.num_proxy_threads = 2;
  run_case(c);
}
TEST_CASE("ring wraps many times") {
  run_case({{0, 1}, 4, 2, 64, {400, 300}, 0, 1, 1, 4 << 10, 1 << 10}, 3);
}
