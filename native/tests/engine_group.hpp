// Ranks as threads of one process over the loopback provider, and a plain oracle for them.
#pragma once

#include <atomic>
#include <barrier>
#include <cmath>
#include <functional>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "cpu/engine.hpp"

namespace commlib::testing {

struct Tokens {  // one rank's input
  int64_t num_tokens = 0;
  std::vector<float> x;            // [num_tokens, hidden]
  std::vector<int64_t> topk_idx;   // [num_tokens, num_topk]
  std::vector<float> weights;      // [num_tokens, num_topk]
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

class EngineGroup {
 public:
  explicit EngineGroup(EngineConfig config) {
    const int ranks = int(config.node_of_rank.size());
    config.transport = "loopback";
    for (int rank = 0; rank < ranks; ++rank) {
      config.rank = rank;
      engines_.push_back(std::make_unique<Engine>(config));
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
  void close() {
    run([this](int rank) { engine(rank).close(); });
  }

 private:
  std::vector<std::unique_ptr<Engine>> engines_;
};

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

}  // namespace commlib::testing
