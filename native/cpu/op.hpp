// One operation of the Runtime's queue: the call (one plain struct each way), its grant, its
// outcome.
#pragma once

#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "common/fault.hpp"
#include "cpu/handle.hpp"
#include "cpu/rows.hpp"

namespace commlib {

enum class OpKind : uint32_t { kDispatch = 1, kCachedDispatch = 2, kCombine = 3, kBarrier = 4 };

// topk_idx == nullptr: by handle. scales: of rows that come as E4M3 already. Pointers stay valid
// until the operation is complete.
struct DispatchCall {
  const void* x = nullptr;              // [num_tokens, hidden] of dtype
  const float* scales = nullptr;        // [num_tokens, hidden / 128]
  const int64_t* topk_idx = nullptr;    // [num_tokens, num_topk], -1 masked
  const float* topk_weights = nullptr;  // [num_tokens, num_topk] or nullptr: ones
  int64_t num_tokens = 0;
  Dtype dtype = Dtype::kF32;
  Cast cast = Cast::kNone;
  Layout layout = Layout::kGrouped;
  size_t alignment = 1;
};

struct CombineCall {
  const void* y = nullptr;              // [num_rows, hidden] of dtype, F32 or BF16
  const float* row_weights = nullptr;   // [num_rows] or nullptr
  bool has_weight_grads = false;        // on all ranks alike; pointers of empty arrays may be null
  const float* weight_grads = nullptr;  // grouped [num_rows], rows [num_rows, num_topk]
  void* out = nullptr;                  // [num_tokens, hidden] of dtype
  float* out_weight_grads = nullptr;    // [num_tokens, num_topk]
  Dtype dtype = Dtype::kF32;
};

enum class OutcomeKind { kPending, kDone, kRejected, kCapacity, kFault };

struct Outcome {
  OutcomeKind kind = OutcomeKind::kPending;
  std::string message;  // kRejected, kCapacity: the same on every rank
  size_t needed = 0;
  size_t available = 0;
  FaultRecord fault;         // kFault
  std::string waited_phase;  // kFault: where this rank stood
  int waited_peer = -1;
  int waited_channel = -1;
};

// Where the parts of a dispatch's output lie inside its grant.
struct DispatchLanding {
  uint64_t num_rows = 0;
  uint64_t num_records = 0;
  size_t rows_offset = 0;
  size_t scales_offset = 0;
  size_t weights_offset = 0;   // grouped [num_rows], rows [num_records, num_topk]
  size_t topk_idx_offset = 0;  // rows only: int64 [num_records, num_topk]
  size_t output_bytes = 0;     // end of what the caller gets
  size_t records_offset = 0;   // goes to the handle
  size_t total_bytes = 0;
};

// When a part of an operation began and ended, on the clock of now_s().
struct OpSpan {
  const char* name = "";
  double begin_s = 0;
  double end_s = 0;
};

struct Op {
  OpKind kind = OpKind::kBarrier;
  DispatchCall dispatch;
  CombineCall combine;
  std::shared_ptr<HandleData> handle;  // in: cached dispatch, combine; out: fresh dispatch
  std::string reject;                  // the caller's own check failed: publish that, move nothing

  // Results of a dispatch.
  DispatchLanding landing;
  std::shared_ptr<Slab> output;

  // The whole last; before it each exchange and each role, from its first to its last movement.
  // For whoever has waited.
  std::vector<OpSpan> spans;

  void finish(Outcome result) {
    std::lock_guard<std::mutex> lock(mutex_);
    outcome_ = std::move(result);
    done_.notify_all();
  }
  bool is_finished() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return outcome_.kind != OutcomeKind::kPending;
  }
  Outcome wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return outcome_.kind != OutcomeKind::kPending; });
    return outcome_;
  }
  // kPending if it is not finished after `seconds`.
  Outcome wait_for(double seconds) {
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait_for(lock, std::chrono::duration<double>(seconds),
                   [this] { return outcome_.kind != OutcomeKind::kPending; });
    return outcome_;
  }

 private:
  mutable std::mutex mutex_;
  std::condition_variable done_;
  Outcome outcome_;
};

}  // namespace commlib
