// Ranks as threads of one process over the loopback provider.
#pragma once

#include <algorithm>
#include <functional>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "cpu/engine.hpp"

namespace commlib::testing {

struct Tokens {  // one rank's input
  int64_t num_tokens = 0;
  std::vector<float> x;           // [num_tokens, hidden]
  std::vector<int64_t> topk_idx;  // [num_tokens, num_topk]
  std::vector<float> weights;     // [num_tokens, num_topk]
};

// Value that names its (rank, token, column) exactly in FP32.
inline float identity(int rank, int64_t token, size_t column) {
  return float(rank * 65536 + int(token) * 16 + int(column % 16));
}

inline Tokens make_tokens(int rank, int64_t num_tokens, size_t hidden, int num_topk,
                          int num_experts, double mask_share, unsigned seed) {
  Tokens tokens;
  tokens.num_tokens = num_tokens;
  std::mt19937 random(seed * 1000 + unsigned(rank));
  for (int64_t t = 0; t < num_tokens; ++t) {
    for (size_t c = 0; c < hidden; ++c) tokens.x.push_back(identity(rank, t, c));
    std::vector<int64_t> experts(static_cast<size_t>(num_experts));
    for (int e = 0; e < num_experts; ++e) experts[size_t(e)] = e;
    std::shuffle(experts.begin(), experts.end(), random);
    for (int k = 0; k < num_topk; ++k) {
      const bool is_masked = std::uniform_real_distribution<>(0, 1)(random) < mask_share;
      tokens.topk_idx.push_back(is_masked ? -1 : experts[size_t(k)]);
      tokens.weights.push_back(0.25f + 0.5f * float(k));
    }
  }
  return tokens;
}

// Small memory, so that the first calls must grow it; limits that only a hang reaches.
inline EngineConfig small_config(std::vector<int> node_of_rank, int num_experts, int num_topk,
                                 size_t hidden) {
  EngineConfig config;
  config.node_of_rank = std::move(node_of_rank);
  config.num_experts = num_experts;
  config.num_topk = num_topk;
  config.hidden = hidden;
  config.chunk_tokens = 4;
  config.ring_bytes = 64 << 10;
  config.chunk_bytes = 8 << 10;
  config.arena_bytes = 64 << 10;
  config.max_arena_bytes = 1 << 30;
  config.timeout_s = 60;
  config.heartbeat_timeout_s = 60;
  return config;
}

using Ops = std::vector<std::shared_ptr<Op>>;  // [rank]

class EngineGroup {
 public:
  // `adapt` changes what may differ between ranks.
  explicit EngineGroup(EngineConfig config, const std::function<void(EngineConfig&)>& adapt = {}) {
    const int ranks = int(config.node_of_rank.size());
    config.transport = "loopback";
    for (int rank = 0; rank < ranks; ++rank) {
      EngineConfig own = config;
      own.rank = rank;
      if (adapt) adapt(own);
      engines_.push_back(std::make_unique<Engine>(own));
    }
    std::vector<std::vector<uint8_t>> addresses;
    for (auto& engine : engines_) addresses.push_back(engine->address());
    for (auto& engine : engines_) engine->connect(addresses);
  }

  int size() const { return int(engines_.size()); }
  Engine& engine(int rank) { return *engines_[size_t(rank)]; }

  // body(rank) on a thread per rank.
  void run(const std::function<void(int)>& body) {
    std::vector<std::thread> threads;
    for (int rank = 0; rank < size(); ++rank) threads.emplace_back([&, rank] { body(rank); });
    for (auto& thread : threads) thread.join();
  }
  // One operation per rank, submitted from here; their outcomes (kPending: it hangs).
  std::vector<Outcome> run_ops(const Ops& ops) {
    submit(ops);
    return wait(ops);
  }
  void submit(const Ops& ops) {
    for (int rank = 0; rank < size(); ++rank) engine(rank).submit(ops[size_t(rank)]);
  }
  static std::vector<Outcome> wait(const Ops& ops, double seconds = 90) {
    std::vector<Outcome> outcomes;
    for (const auto& op : ops) outcomes.push_back(op->wait_for(seconds));
    return outcomes;
  }
  std::vector<Outcome> close() {
    std::vector<Outcome> outcomes(engines_.size());
    run([&](int rank) { outcomes[size_t(rank)] = engine(rank).close(); });
    return outcomes;
  }
  // The rank goes without a good-bye.
  void destroy(int rank) { engines_[size_t(rank)].reset(); }

 private:
  std::vector<std::unique_ptr<Engine>> engines_;
};

inline bool all_are(const std::vector<Outcome>& outcomes, OutcomeKind kind) {
  for (const Outcome& outcome : outcomes)
    if (outcome.kind != kind) return false;
  return true;
}

inline std::shared_ptr<Op> dispatch_op(const Tokens& tokens, Layout layout, size_t alignment) {
  auto op = std::make_shared<Op>();
  op->kind = OpKind::kDispatch;
  op->dispatch.x = tokens.x.data();
  op->dispatch.topk_idx = tokens.topk_idx.data();
  op->dispatch.topk_weights = tokens.weights.data();
  op->dispatch.num_tokens = tokens.num_tokens;
  op->dispatch.layout = layout;
  op->dispatch.alignment = alignment;
  return op;
}

inline std::shared_ptr<Op> cached_op(std::shared_ptr<HandleData> handle, const Tokens& tokens) {
  auto op = std::make_shared<Op>();
  op->kind = OpKind::kCachedDispatch;
  op->handle = std::move(handle);
  op->dispatch.x = tokens.x.data();
  op->dispatch.num_tokens = tokens.num_tokens;
  return op;
}

inline std::shared_ptr<Op> combine_op(std::shared_ptr<HandleData> handle, const void* y, void* out,
                                      Dtype dtype = Dtype::kF32) {
  auto op = std::make_shared<Op>();
  op->kind = OpKind::kCombine;
  op->handle = std::move(handle);
  op->combine.y = y;
  op->combine.out = out;
  op->combine.dtype = dtype;
  return op;
}

inline std::shared_ptr<Op> barrier_op() { return std::make_shared<Op>(); }

// Parts of a dispatch's output.
template <typename T = float>
const T* rows_of(const Op& op) {
  return reinterpret_cast<const T*>(op.output->data() + op.landing.rows_offset);
}
inline const float* scales_of(const Op& op) {
  return reinterpret_cast<const float*>(op.output->data() + op.landing.scales_offset);
}
inline const float* weights_of(const Op& op) {
  return reinterpret_cast<const float*>(op.output->data() + op.landing.weights_offset);
}
inline const int64_t* topk_idx_of(const Op& op) {
  return reinterpret_cast<const int64_t*>(op.output->data() + op.landing.topk_idx_offset);
}

}  // namespace commlib::testing
