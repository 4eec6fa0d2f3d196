// Waits with a deadline, and the fault that a missed one becomes.
#pragma once

#include "common/atomics.hpp"
#include "cuda/params.cuh"
#include "cuda/ptx.cuh"

namespace commlib::cuda {

using commlib::load_acquire;

__device__ inline int lane_id() { return int(threadIdx.x % 32); }
__device__ inline int warp_id() { return int(threadIdx.x / 32); }

struct WaitFor {
  Phase phase;
  int peer;
  uint64_t epoch;
  uint64_t expected;
};

__device__ inline bool is_faulty(const Mesh& mesh) {
  return commlib::load_relaxed(at<uint64_t>(mesh, mesh.rank, mesh.fault_word)) != 0;
}

__device__ inline void copy_note(FaultNote* to, const FaultNote& note) {
  to->phase = note.phase;
  to->rank = note.rank;
  to->peer = note.peer;
  to->epoch = note.epoch;
  to->expected = note.expected;
  to->seen = note.seen;
  fence_system();
  *reinterpret_cast<volatile uint32_t*>(&to->kind) = note.kind;  // last: the host polls it
}

// Tells the host and all peers; the first of this rank's threads does, the others only stop.
__device__ inline void raise_timeout(const Mesh& mesh, const WaitFor& what, uint64_t seen) {
  if (atomicExch(&mesh.workspace->is_faulty, 1u) != 0) return;
  const FaultNote note{1, what.phase, mesh.rank, what.peer, what.epoch, what.expected, seen};
  copy_note(mesh.board, note);
  for (int rank = 0; rank < mesh.num_ranks; ++rank) {
    if (mesh.base[rank] == nullptr) continue;  // the hosts tell other nodes
    copy_note(at<FaultNote>(mesh, rank, mesh.fault_note) + mesh.rank, note);
    // Partner: the load in is_faulty at that rank.
    commlib::store_release(at<uint64_t>(mesh, rank, mesh.fault_word), uint64_t(mesh.rank) + 1);
  }
}

// A peer's note becomes ours: our host must raise it too.
__device__ inline void adopt_fault(const Mesh& mesh) {
  if (atomicExch(&mesh.workspace->is_faulty, 1u) != 0) return;
  const uint64_t who = commlib::load_acquire(at<uint64_t>(mesh, mesh.rank, mesh.fault_word));
  copy_note(mesh.board, at<FaultNote>(mesh, mesh.rank, mesh.fault_note)[who - 1]);
}

// The host knows of a fault. It may not be able to say so by a copy: a driver's call may wait for
// this kernel and keep others out.
__device__ inline bool is_stopped(const Mesh& mesh) {
  // Partner: the stores in FaultBoard::stop_kernels() and Buffers.end_kernels().
  return commlib::load_relaxed(mesh.stop) != 0;
}

// Some thread of this rank has found a fault, in this kernel or before.
__device__ inline bool is_ending(const Mesh& mesh) {
  return *reinterpret_cast<const volatile uint32_t*>(&mesh.workspace->is_faulty) != 0;
}

// Work that warps of the whole grid take in turn. The next number comes while its forerunner is
// worked on.
struct Tickets {
  uint32_t* counter;  // zeroed by the exchange
  uint32_t step;
  uint32_t next = 0;

  __device__ explicit Tickets(uint32_t* word, uint32_t count = 1) : counter(word), step(count) {
    fetch();
  }
  __device__ void fetch() {
    if (lane_id() == 0) next = atomicAdd(counter, step);
  }
  __device__ uint32_t take() {
    const uint32_t ticket = __shfl_sync(0xffffffffu, next, 0);
    fetch();
    return ticket;
  }
};

// Spins until `poll()` has nothing left to wait for. `poll` returns true when done and leaves what
// it saw in its argument. False: the Runtime is faulty, leave the kernel.
template <typename Poll>
__device__ inline bool wait_until(const Mesh& mesh, const WaitFor& what, Poll poll,
                                  uint64_t timeout_ns) {
  constexpr uint32_t kLook = 64;          // polls between two looks at memory of the device,
  constexpr uint32_t kLookAtHost = 1024;  // and at the host's, which is far
  uint64_t seen = 0;
  if (poll(&seen)) return true;
  const uint64_t start = now_ns();
  for (uint32_t i = 1;; ++i) {
    if (poll(&seen)) return true;
    if (i % kLook != 0) continue;
    if (is_faulty(mesh)) {
      adopt_fault(mesh);
      return false;
    }
    if (i % kLookAtHost == 0 && is_stopped(mesh)) atomicExch(&mesh.workspace->is_faulty, 1u);
    if (is_ending(mesh)) return false;
    if (now_ns() - start > timeout_ns) {
      raise_timeout(mesh, what, seen);
      return false;
    }
  }
}

template <typename Poll>
__device__ inline bool wait_until(const Mesh& mesh, const WaitFor& what, Poll poll) {
  return wait_until(mesh, what, poll, mesh.timeout_ns);
}

// "This record came in this epoch": one writer, never reset. Partner: the fence and store in
// Announcer::tell_until at the writer.
__device__ inline bool wait_arrived(const Mesh& mesh, const uint32_t* flag, uint32_t epoch,
                                    Phase phase, int peer) {
  return wait_until(mesh, {phase, peer, epoch, epoch}, [=](uint64_t* seen) {
    const uint32_t value = load_acquire(flag);
    *seen = value;
    return value == epoch;
  });
}

}  // namespace commlib::cuda
