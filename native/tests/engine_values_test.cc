// Values: order of summation, payload dtypes, layouts, FP8, bit by bit against the oracle.
#include <doctest/doctest.h>

#include <cstring>

#include "tests/random_nodes.hpp"
#include "tests/scene_run.hpp"

using namespace commlib;
using namespace commlib::testing;

namespace {

const std::vector<int> kOneNode = {0, 0, 0};
const std::vector<int> kTwoByTwo = {0, 0, 1, 1};
const std::vector<int> kUneven = {0, 0, 0, 1, 2, 2};

// The fields of `scene` that say how tokens travel, all combinations.
void run_all(Scene scene) {
  for (const Dtype dtype : {Dtype::kF32, Dtype::kBf16})
    for (const bool is_weighted : {false, true}) {
      scene.dtype = dtype;
      scene.is_weighted = is_weighted;
      CAPTURE(is_weighted);
      run_scene(scene);
    }
}

}  // namespace

TEST_CASE("sums in the documented order: one node") { run_all(make_scene(kOneNode, 4, 5)); }
TEST_CASE("sums in the documented order: 2 nodes x 2") { run_all(make_scene(kTwoByTwo, 4, 8)); }
TEST_CASE("sums in the documented order: uneven nodes") { run_all(make_scene(kUneven, 2, 7)); }
TEST_CASE("sums in the documented order: every expert of every rank") {
  run_all(make_scene({0, 1, 1}, 3, 9, 0));
}

TEST_CASE("the oracle tells orders apart") {
  // Ranks in one node or each in its own: BF16 hops elsewhere, other bits.
  Scene scene = make_scene(kTwoByTwo, 2, 6);
  scene.dtype = Dtype::kBf16;
  Scene other = scene;
  other.config.node_of_rank = {0, 0, 0, 0};
  int differences = 0;
  for (size_t c = 0; c < scene.config.hidden; ++c)
    differences += combined(scene, 0, 0, c) != combined(other, 0, 0, c);
  CHECK(differences > 0);
}

TEST_CASE("rows layout: local ids, weights, and combine of rows reduced by the caller") {
  for (const auto& nodes : {kOneNode, kTwoByTwo, kUneven}) {
    Scene scene = make_scene(nodes, 3, 4, 0.3);
    scene.layout = Layout::kRows;
    run_all(scene);
    EngineGroup group(scene.config);
    const Ops ops = dispatch(group, scene, payloads_of(scene));
    const int num_topk = scene.config.num_topk;
    for (int rank = 0; rank < scene.num_ranks(); ++rank) {
      const std::vector<SceneRow> rows = scene_rows(scene, rank);
      for (size_t i = 0; i < rows.size() * size_t(num_topk); ++i) {
        const SceneRow& r = rows[i / size_t(num_topk)];
        const int k = int(i % size_t(num_topk));
        const int64_t local = scene.expert(r.source, r.token, k) - rank * scene.per_rank();
        const bool is_here =
            scene.expert(r.source, r.token, k) >= 0 && local >= 0 && local < scene.per_rank();
        CHECK(topk_idx_of(*ops[size_t(rank)])[i] == (is_here ? local : -1));
        CHECK(weights_of(*ops[size_t(rank)])[i] ==
              (is_here ? scene.weight(r.source, r.token, k) : 0.0f));
      }
    }
  }
}

TEST_CASE("rows layout: gradients of the weights go home") {
  Scene scene = make_scene(kTwoByTwo, 2, 3, 0.2);
  scene.layout = Layout::kRows;
  EngineGroup group(scene.config);
  const Ops ops = dispatch(group, scene, payloads_of(scene));
  const size_t num_topk = size_t(scene.config.num_topk);
  std::vector<std::vector<float>> y(4), unused(4), grads(4), out(4), home(4);
  Ops combines;
  for (int rank = 0; rank < 4; ++rank) {
    const size_t r = size_t(rank);
    fill_outputs(scene, rank, &y[r], &unused[r]);
    for (const SceneRow& row : scene_rows(scene, rank))
      for (size_t k = 0; k < num_topk; ++k)
        grads[r].push_back(expert_output(int(k), row.source, row.token, 500));
    out[r].resize(scene.tokens[r].x.size());
    home[r].assign(scene.tokens[r].weights.size(), NAN);
    combines.push_back(combine_op(ops[r]->handle, y[r].data(), out[r].data()));
    combines.back()->combine.has_weight_grads = true;
    combines.back()->combine.weight_grads = grads[r].data();
    combines.back()->combine.out_weight_grads = home[r].data();
  }
  REQUIRE(all_are(group.run_ops(combines), OutcomeKind::kDone));
  for (int rank = 0; rank < 4; ++rank)
    for (size_t i = 0; i < home[size_t(rank)].size(); ++i) {
      const int64_t token = int64_t(i / num_topk);
      const int k = int(i % num_topk);
      CHECK(home[size_t(rank)][i] ==
            (scene.expert(rank, token, k) < 0 ? 0.0f : expert_output(k, rank, token, 500)));
    }
}

TEST_CASE("FP8: rows are cast once, scales travel along") {
  for (const auto& nodes : {kOneNode, kTwoByTwo})
    for (const Dtype dtype : {Dtype::kF32, Dtype::kBf16})
      for (const Cast mode : {Cast::kE4m3, Cast::kE4m3Pow2}) {
        Scene scene = make_scene(nodes, 3, 4, 0.1, 256);
        scene.alignment = 4;
        EngineGroup group(scene.config);
        scene.dtype = dtype;
        const auto payloads = payloads_of(scene);
        Ops ops, again;
        for (size_t rank = 0; rank < scene.tokens.size(); ++rank) {
          ops.push_back(dispatch_op(scene.tokens[rank], Layout::kGrouped, scene.alignment));
          ops[rank]->dispatch.x = payloads[rank].data();
          ops[rank]->dispatch.dtype = dtype;
          ops[rank]->dispatch.cast = mode;
        }
        REQUIRE(all_are(group.run_ops(ops), OutcomeKind::kDone));
        for (size_t rank = 0; rank < scene.tokens.size(); ++rank) {
          again.push_back(cached_op(ops[rank]->handle, scene.tokens[rank]));
          again[rank]->dispatch = ops[rank]->dispatch;
        }
        REQUIRE(all_are(group.run_ops(again), OutcomeKind::kDone));
        const size_t hidden = scene.config.hidden;
        for (int rank = 0; rank < scene.num_ranks(); ++rank) {
          const std::vector<SceneRow> rows = scene_rows(scene, rank);
          for (size_t i = 0; i < rows.size(); ++i) {
            std::vector<uint8_t> codes(hidden);
            std::vector<float> scales(hidden / kScaleBlock);
            if (rows[i].source >= 0)
              kRowKernelsGeneric.cast(codes.data(), scales.data(),
                                      payloads[size_t(rows[i].source)].data() +
                                          size_t(rows[i].token) * hidden * dtype_bytes(dtype),
                                      dtype, hidden, mode);
            for (const Op* op : {ops[size_t(rank)].get(), again[size_t(rank)].get()}) {
              CHECK(std::memcmp(rows_of<uint8_t>(*op) + i * hidden, codes.data(), hidden) == 0);
              CHECK(std::memcmp(scales_of(*op) + i * scales.size(), scales.data(),
                                scales.size() * 4) == 0);
            }
          }
        }
      }
}

TEST_CASE("FP8: rows that are quantised already keep their bytes and scales") {
  for (const auto& nodes : {kOneNode, kTwoByTwo, kUneven}) {
    const Scene scene = make_scene(nodes, 2, 5, 0.1, 128 * 3);
    const size_t hidden = scene.config.hidden;
    EngineGroup group(scene.config);
    std::vector<std::vector<uint8_t>> codes;
    std::vector<std::vector<float>> scales;
    Ops ops;
    for (int rank = 0; rank < scene.num_ranks(); ++rank) {
      const Tokens& own = scene.tokens[size_t(rank)];
      codes.emplace_back(size_t(own.num_tokens) * hidden);
      scales.emplace_back(size_t(own.num_tokens) * 3);
      for (size_t i = 0; i < codes.back().size(); ++i) codes.back()[i] = uint8_t(rank * 31 + i * 7);
      for (size_t i = 0; i < scales.back().size(); ++i)
        scales.back()[i] = float(rank * 1000) + float(i);
      ops.push_back(dispatch_op(own, Layout::kGrouped, 1));
      ops.back()->dispatch.x = codes.back().data();
      ops.back()->dispatch.scales = scales.back().data();
      ops.back()->dispatch.dtype = Dtype::kE4m3;
    }
    REQUIRE(all_are(group.run_ops(ops), OutcomeKind::kDone));
    for (int rank = 0; rank < scene.num_ranks(); ++rank) {
      const std::vector<SceneRow> rows = scene_rows(scene, rank);
      REQUIRE(ops[size_t(rank)]->landing.num_rows == rows.size());
      for (size_t i = 0; i < rows.size(); ++i) {
        const size_t s = size_t(rows[i].source), t = size_t(rows[i].token);
        CHECK(std::memcmp(rows_of<uint8_t>(*ops[size_t(rank)]) + i * hidden,
                          codes[s].data() + t * hidden, hidden) == 0);
        CHECK(std::memcmp(scales_of(*ops[size_t(rank)]) + i * 3, scales[s].data() + t * 3, 12) ==
              0);
      }
    }
  }
}

TEST_CASE("repeated results are bitwise the same, whatever the threads do") {
  Scene scene = make_scene(kTwoByTwo, 4, 8);
  scene.is_weighted = true;
  std::vector<std::vector<uint8_t>> first;
  for (const int num_threads : {1, 3}) {
    scene.config.num_threads = num_threads;
    EngineGroup group(scene.config);
    const auto payloads = payloads_of(scene);
    const Ops ops = dispatch(group, scene, payloads);
    for (int repeat = 0; repeat < 5; ++repeat) {
      const auto outs = combine(group, scene, ops);
      if (first.empty()) first = outs;
      CHECK(outs == first);
    }
  }
}

TEST_CASE("no tokens anywhere") {
  for (const auto& nodes : {kOneNode, kTwoByTwo})
    for (const Layout layout : {Layout::kGrouped, Layout::kRows}) {
      Scene scene = make_scene(nodes, 2, 2);
      scene.layout = layout;
      scene.alignment = 8;
      for (Tokens& tokens : scene.tokens) tokens = Tokens{};
      run_all(scene);
      EngineGroup group(scene.config);
      for (const auto& op : dispatch(group, scene, payloads_of(scene))) {
        CHECK(op->landing.num_rows == 0);
        CHECK(op->handle->num_records() == 0);
      }
    }
}

TEST_CASE("ring and chunk sizes may be any numbers") {
  Scene scene = make_scene({0, 1, 2}, 2, 4);
  for (const size_t extra : {1, 8, 24, 1001}) {
    scene.config.chunk_bytes = 1000 + extra;
    scene.config.ring_bytes = 3000 + extra * 5;
    run_scene(scene);
  }
}

TEST_CASE("random groups, sizes and routings") {
  for (unsigned seed = 0; seed < 40; ++seed) {
    CAPTURE(seed);
    std::mt19937 random(seed);
    const auto pick = [&](int low, int high) {
      return std::uniform_int_distribution<int>(low, high)(random);
    };
    Scene scene;
    const std::vector<int> nodes = random_nodes(random, 7);
    const int ranks = int(nodes.size());
    const int experts = ranks * pick(1, 4);
    scene.config = small_config(nodes, experts, pick(1, std::min(experts, 9)), size_t(pick(1, 70)));
    scene.config.num_threads = pick(1, 3);
    scene.config.chunk_tokens = pick(1, 9);
    scene.config.chunk_bytes = size_t(pick(1, 3000));
    scene.config.arena_bytes = size_t(pick(0, 20000));
    const size_t slot =
        make_slot(scene.config.hidden * 4, 0, record_bytes(scene.config.num_topk)).slot_bytes;
    scene.config.ring_bytes = 2 * std::max(scene.config.chunk_bytes, slot) + size_t(pick(0, 3000));
    scene.layout = pick(0, 2) == 0 ? Layout::kRows : Layout::kGrouped;
    scene.alignment = size_t(pick(1, 16));
    scene.dtype = pick(0, 1) == 0 ? Dtype::kF32 : Dtype::kBf16;
    scene.is_weighted = pick(0, 1) == 0;
    const double mask_share = pick(0, 4) == 0 ? 0.9 : 0.1 * pick(0, 3);
    for (int rank = 0; rank < ranks; ++rank)
      scene.tokens.push_back(
          random_tokens(rank, pick(0, 3) == 0 ? 0 : pick(1, 50), scene.config, mask_share, seed));
    run_scene(scene);
  }
}

#if !defined(__SANITIZE_THREAD__)  // 128 threads
TEST_CASE("a node of 64 ranks") {
  Scene scene = make_scene(std::vector<int>(64, 0), 1, 3, 0, 8);
  for (Tokens& tokens : scene.tokens) {
    tokens.num_tokens = 2;
    for (int64_t t = 0; t < 2; ++t) tokens.topk_idx[size_t(t * 3)] = 63;
    for (size_t i = 0; i < 6; ++i)
      if (i % 3 != 0) tokens.topk_idx[i] %= 63;
    tokens.x.resize(2 * 8);
    tokens.topk_idx.resize(6);
    tokens.weights.resize(6);
    if (tokens.topk_idx[1] == tokens.topk_idx[2]) tokens.topk_idx[2] = -1;
    if (tokens.topk_idx[4] == tokens.topk_idx[5]) tokens.topk_idx[5] = -1;
  }
  run_scene(scene);
}
#endif
