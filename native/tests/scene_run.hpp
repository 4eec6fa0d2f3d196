// Runs a scene on a group of engines and holds every byte against the oracle.
#pragma once

#include <doctest/doctest.h>

#include <cstring>

#include "tests/oracle.hpp"

namespace commlib::testing {

inline Scene make_scene(std::vector<int> node_of_rank, int experts_per_rank, int num_topk,
                        double mask_share = 0.1, size_t hidden = 40) {
  Scene scene;
  const int ranks = int(node_of_rank.size());
  scene.config = small_config(std::move(node_of_rank), ranks * experts_per_rank, num_topk, hidden);
  for (int rank = 0; rank < ranks; ++rank)
    scene.tokens.push_back(
        random_tokens(rank, 10 + (rank * 7) % 13, scene.config, mask_share, unsigned(ranks)));
  return scene;
}

// Rows as they travel: FP32 or BF16.
inline std::vector<uint8_t> as_payload(const std::vector<float>& values, Dtype dtype) {
  std::vector<uint8_t> bytes(values.size() * dtype_bytes(dtype));
  for (size_t i = 0; i < values.size(); ++i) {
    if (dtype == Dtype::kF32) {
      std::memcpy(bytes.data() + 4 * i, &values[i], 4);
    } else {
      const uint16_t half = values[i] == values[i] ? to_bf16(values[i]) : uint16_t(0x7fc0);
      std::memcpy(bytes.data() + 2 * i, &half, 2);
    }
  }
  return bytes;
}

inline Ops dispatch(EngineGroup& group, const Scene& scene,
                    const std::vector<std::vector<uint8_t>>& payloads) {
  Ops ops;
  for (int rank = 0; rank < group.size(); ++rank) {
    ops.push_back(dispatch_op(scene.tokens[size_t(rank)], scene.layout, scene.alignment));
    ops.back()->dispatch.x = payloads[size_t(rank)].data();
    ops.back()->dispatch.dtype = scene.dtype;
  }
  REQUIRE(all_are(group.run_ops(ops), OutcomeKind::kDone));
  return ops;
}

inline std::vector<std::vector<uint8_t>> payloads_of(const Scene& scene) {
  std::vector<std::vector<uint8_t>> payloads;
  for (const Tokens& tokens : scene.tokens) payloads.push_back(as_payload(tokens.x, scene.dtype));
  return payloads;
}

// Bytes of every rank's combine of the experts' outputs.
inline std::vector<std::vector<uint8_t>> combine(EngineGroup& group, const Scene& scene,
                                                 const Ops& ops) {
  std::vector<std::vector<uint8_t>> ys(ops.size()), outs(ops.size());
  std::vector<std::vector<float>> weights(ops.size());
  Ops combines;
  for (size_t rank = 0; rank < ops.size(); ++rank) {
    std::vector<float> y;
    fill_outputs(scene, int(rank), &y, &weights[rank]);
    REQUIRE(y.size() == ops[rank]->landing.num_rows * scene.config.hidden);
    ys[rank] = as_payload(y, scene.dtype);
    outs[rank].assign(scene.tokens[rank].x.size() * dtype_bytes(scene.dtype), 0xee);
    combines.push_back(
        combine_op(ops[rank]->handle, ys[rank].data(), outs[rank].data(), scene.dtype));
    if (scene.is_weighted) combines.back()->combine.row_weights = weights[rank].data();
  }
  REQUIRE(all_are(group.run_ops(combines), OutcomeKind::kDone));
  return outs;
}

inline void check_dispatched(const Scene& scene, const Ops& ops,
                             const std::vector<std::vector<uint8_t>>& payloads) {
  const size_t row_bytes = scene.config.hidden * dtype_bytes(scene.dtype);
  for (int rank = 0; rank < scene.num_ranks(); ++rank) {
    const Op& op = *ops[size_t(rank)];
    const std::vector<SceneRow> rows = scene_rows(scene, rank);
    REQUIRE(op.landing.num_rows == rows.size());
    for (size_t i = 0; i < rows.size(); ++i) {
      if (rows[i].source < 0) continue;
      const uint8_t* expected =
          payloads[size_t(rows[i].source)].data() + size_t(rows[i].token) * row_bytes;
      CHECK(std::memcmp(rows_of<uint8_t>(op) + i * row_bytes, expected, row_bytes) == 0);
    }
  }
}

inline void check_combined(const Scene& scene, const std::vector<std::vector<uint8_t>>& outs) {
  for (int rank = 0; rank < scene.num_ranks(); ++rank) {
    const Tokens& own = scene.tokens[size_t(rank)];
    std::vector<float> expected;
    for (int64_t t = 0; t < own.num_tokens; ++t)
      for (size_t c = 0; c < scene.config.hidden; ++c)
        expected.push_back(combined(scene, rank, t, c));
    CHECK_MESSAGE(outs[size_t(rank)] == as_payload(expected, scene.dtype), "rank " << rank);
  }
}

inline void run_scene(const Scene& scene) {
  EngineGroup group(scene.config);
  const auto payloads = payloads_of(scene);
  const Ops ops = dispatch(group, scene, payloads);
  check_dispatched(scene, ops, payloads);
  check_combined(scene, combine(group, scene, ops));
  group.close();
}

}  // namespace commlib::testing
