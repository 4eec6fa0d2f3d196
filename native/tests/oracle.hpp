// What dispatch and combine must give, written down naively in the order of docs/design.md.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "tests/bf16.hpp"
#include "tests/engine_group.hpp"

namespace commlib::testing {

inline Tokens random_tokens(int rank, int64_t num_tokens, const EngineConfig& config,
                            double mask_share, unsigned seed) {
  Tokens tokens = make_tokens(rank, num_tokens, config.hidden, config.num_topk, config.num_experts,
                              mask_share, seed);
  std::mt19937 random(seed * 77 + unsigned(rank));
  std::normal_distribution<float> normal(0, 1);
  for (float& value : tokens.x) value = normal(random);
  for (float& value : tokens.weights) value = normal(random);
  return tokens;
}

// What an expert makes of a token (rows layout: what a rank makes of it, expert = -1 - rank). Full
// mantissas, so that every order of summation gives other bits.
inline float expert_output(int expert, int source, int64_t token, size_t column) {
  uint64_t hash = uint64_t(expert + 1000) * 0x9e3779b97f4a7c15ull + uint64_t(source) * 1000003 +
                  uint64_t(token) * 7919 + column;
  hash ^= hash >> 29;
  hash *= 0xbf58476d1ce4e5b9ull;
  hash ^= hash >> 32;
  return float(int32_t(hash)) / 2147483648.0f;
}

struct Scene {
  EngineConfig config;
  std::vector<Tokens> tokens;  // [rank]
  Layout layout = Layout::kGrouped;
  size_t alignment = 1;
  Dtype dtype = Dtype::kF32;
  bool is_weighted = false;

  int num_ranks() const { return int(config.node_of_rank.size()); }
  int per_rank() const { return config.num_experts / num_ranks(); }
  int64_t expert(int source, int64_t token, int k) const {
    return tokens[size_t(source)].topk_idx[size_t(token * config.num_topk + k)];
  }
  float weight(int source, int64_t token, int k) const {
    return tokens[size_t(source)].weights[size_t(token * config.num_topk + k)];
  }
  float round(float value) const {
    return dtype == Dtype::kBf16 ? from_bf16(to_bf16(value)) : value;
  }
  float output(int expert, int source, int64_t token, size_t column) const {
    return round(expert_output(expert, source, token, column));
  }
};

struct SceneRow {  // source -1: padding
  int source = -1;
  int64_t token = 0;
  int k = 0;
  int expert = 0;
};

// Rows of `rank`: grouped by expert, or one per (source, token).
inline std::vector<SceneRow> scene_rows(const Scene& scene, int rank) {
  const bool is_rows = scene.layout == Layout::kRows;
  const int first = rank * scene.per_rank();
  std::vector<SceneRow> rows;
  for (int e = first; e < first + (is_rows ? 1 : scene.per_rank()); ++e) {
    for (int s = 0; s < scene.num_ranks(); ++s)
      for (int64_t t = 0; t < scene.tokens[size_t(s)].num_tokens; ++t)
        for (int k = 0; k < scene.config.num_topk; ++k) {
          const int64_t expert = scene.expert(s, t, k);
          const bool is_here =
              is_rows ? expert >= first && expert < first + scene.per_rank() : expert == e;
          if (!is_here) continue;
          rows.push_back({s, t, k, is_rows ? -1 - rank : e});
          break;
        }
    while (!is_rows && rows.size() % scene.alignment != 0) rows.push_back({});
  }
  return rows;
}

// Every expert's output for the rows of `rank`, and the rows' weights.
inline void fill_outputs(const Scene& scene, int rank, std::vector<float>* y,
                         std::vector<float>* row_weights) {
  const size_t hidden = scene.config.hidden;
  const std::vector<SceneRow> rows = scene_rows(scene, rank);
  y->assign(rows.size() * hidden, NAN);  // padding must not be read
  row_weights->assign(rows.size(), NAN);
  for (size_t row = 0; row < rows.size(); ++row) {
    const SceneRow& r = rows[row];
    if (r.source < 0) continue;
    (*row_weights)[row] = scene.weight(r.source, r.token, r.k);
    for (size_t c = 0; c < hidden; ++c)
      (*y)[row * hidden + c] = scene.output(r.expert, r.source, r.token, c);
  }
}

// Step 1 of the order of summation; false if the rank has no expert of the token.
inline bool rank_partial(const Scene& scene, int rank, int source, int64_t token, size_t column,
                         float* partial) {
  float acc = 0;
  bool is_first = true;
  const int first = rank * scene.per_rank();
  const bool is_rows = scene.layout == Layout::kRows;  // the caller has summed the experts
  for (int e = first; e < first + (is_rows ? 1 : scene.per_rank()); ++e)
    for (int k = 0; k < scene.config.num_topk; ++k) {
      const int64_t expert = scene.expert(source, token, k);
      const bool is_here =
          is_rows ? is_first && expert >= first && expert < first + scene.per_rank() : expert == e;
      if (!is_here) continue;
      const float y = scene.output(is_rows ? -1 - rank : e, source, token, column);
      const float w = scene.weight(source, token, k);
      if (!scene.is_weighted)
        acc = is_first ? y : acc + y;
      else
        acc = is_first ? w * y : std::fma(w, y, acc);
      is_first = false;
    }
  *partial = scene.round(acc);
  return !is_first;
}

inline float combined(const Scene& scene, int source, int64_t token, size_t column) {
  const Group group(source, scene.config.node_of_rank, scene.config.num_experts);
  float total = 0;
  bool is_empty = true;
  for (int node = 0; node < group.num_nodes(); ++node) {
    float sum = 0;
    bool is_node_empty = true;
    for (int rank : group.ranks_of_node(node)) {
      float partial = 0;
      if (!rank_partial(scene, rank, source, token, column, &partial)) continue;
      sum = is_node_empty ? partial : sum + partial;
      is_node_empty = false;
    }
    if (is_node_empty) continue;
    if (node != group.node()) sum = scene.round(sum);
    total = is_empty ? sum : total + sum;
    is_empty = false;
  }
  return scene.round(total);
}

}  // namespace commlib::testing
