// A 2 x 2 group in which one rank misbehaves on command.
#pragma once

#include <atomic>
#include <cstring>
#include <string>
#include <vector>

#include "common/backoff.hpp"
#include "tests/oracle.hpp"

namespace commlib::testing {

#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
constexpr double kSlow = 2.5;  // sanitizers: healthy ranks need longer to show that they are
#else
constexpr double kSlow = 1;
#endif
constexpr double kTimeout = 0.4 * kSlow;
constexpr double kHeartbeat = 0.8 * kSlow;
constexpr double kLong = 60;

struct FaultBedOptions {
  int num_threads = 1;
  int num_proxy_threads = 1;
  int impatient = -1;  // this rank has kTimeout, the others kLong; -1: all have kLong
  double timeout_s = kLong;
  double heartbeat_timeout_s = kLong;
  std::vector<int> node_of_rank = {0, 0, 1, 1};
  std::function<void(EngineConfig&)> adapt;  // further changes, rank by rank
};

class FaultBed {
 public:
  explicit FaultBed(const FaultBedOptions& options = {})
      : scene_(make_scene(options)), group_(scene_.config, [&options](EngineConfig& config) {
          if (config.rank == options.impatient) config.timeout_s = kTimeout;
          if (options.adapt) options.adapt(config);
        }) {
    // A first dispatch and combine that work: threads run, memory has grown, handles exist.
    handles_ = dispatches();
    is_warm_ = all_are(group_.run_ops(handles_), OutcomeKind::kDone);
    for (int rank = 0; is_warm_ && rank < group_.size(); ++rank) {
      ys_.emplace_back();
      outs_.emplace_back(scene_.tokens[size_t(rank)].x.size());
      std::vector<float> unused;
      fill_outputs(scene_, rank, &ys_.back(), &unused);
    }
    if (is_warm_) is_warm_ = all_are(group_.run_ops(combines()), OutcomeKind::kDone);
  }

  bool is_warm() const { return is_warm_; }
  EngineGroup& group() { return group_; }

  // From now on the rank makes no step of this role; nullptr: no step at all. Only while the rank
  // has nothing to do, for the filter is read without a lock.
  void stall(int rank, const char* role) {
    is_stalled_ = true;
    group_.engine(rank).executor().set_step_filter([this, role](const char* name) {
      if (!is_stalled_ || (role != nullptr && std::strcmp(role, name) != 0)) return true;
      is_reached_ = true;
      return false;
    });
  }
  // A stalled rank has come to the role.
  bool is_reached() const { return is_reached_; }
  void go_on() { is_stalled_ = false; }

  Ops make(OpKind kind) { return kind == OpKind::kCombine ? combines() : dispatches(); }
  Ops barriers() const {
    Ops ops;
    for (size_t rank = 0; rank < scene_.tokens.size(); ++rank) ops.push_back(barrier_op());
    return ops;
  }

 private:
  static Scene make_scene(const FaultBedOptions& options) {
    Scene scene;
    const int ranks = int(options.node_of_rank.size());
    // Every token to every rank, and more of them than fit a ring: nobody gets through alone.
    scene.config = small_config(options.node_of_rank, ranks, ranks, 32);
    scene.config.num_threads = options.num_threads;
    scene.config.num_proxy_threads = options.num_proxy_threads;
    scene.config.chunk_bytes = 1 << 10;
    scene.config.ring_bytes = 2 << 10;
    scene.config.timeout_s = options.timeout_s;
    scene.config.heartbeat_timeout_s = options.heartbeat_timeout_s;
    for (int rank = 0; rank < ranks; ++rank)
      scene.tokens.push_back(random_tokens(rank, 40, scene.config, 0, 1));
    return scene;
  }
  Ops dispatches() const {
    Ops ops;
    for (const Tokens& own : scene_.tokens) ops.push_back(dispatch_op(own, Layout::kGrouped, 1));
    return ops;
  }
  Ops combines() {
    Ops ops;
    for (size_t rank = 0; rank < scene_.tokens.size(); ++rank)
      ops.push_back(combine_op(handles_[rank]->handle, ys_[rank].data(), outs_[rank].data()));
    return ops;
  }

  Scene scene_;
  std::vector<std::vector<float>> ys_, outs_;
  std::atomic<bool> is_stalled_{false};
  std::atomic<bool> is_reached_{false};
  bool is_warm_ = false;
  Ops handles_;
  EngineGroup group_;
};

inline std::string describe(const FaultRecord& record) {
  return "kind " + std::to_string(int(record.kind)) + " rank " + std::to_string(record.rank) +
         " peer " + std::to_string(record.peer) + " channel " + std::to_string(record.channel) +
         " phase " + record.phase + " expected " + std::to_string(record.expected) + " seen " +
         std::to_string(record.seen) + " (" + record.detail + ")";
}

inline bool is_same_fault(const FaultRecord& a, const FaultRecord& b) {
  return std::memcmp(&a, &b, sizeof a) == 0;
}

}  // namespace commlib::testing
