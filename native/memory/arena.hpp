// One rank's scale-up memory: POSIX shared memory, mode 0600, unlinked before anybody knows of it.
// Peers of the node open it through /proc/<pid>/fd, so nothing is left behind however a job ends.
#pragma once

#include <atomic>
#include <memory>
#include <string>

#include "memory/heap.hpp"

namespace commlib {

// What a peer needs to map an arena; travels in the address blob.
struct ArenaAddress {
  int64_t pid = 0;
  int64_t fd = -1;
  uint64_t nonce = 0;  // random: ranks that are threads share the mapping (see ArenaView)
  uint64_t max_bytes = 0;
  // What the descriptor must lead to: pid and number alone could name another process's file.
  uint64_t device = 0;
  uint64_t inode = 0;
};

// Address space of an arena. Ranks that are threads of one process share it (see ArenaView), and
// the last of them unmaps it: a rank that closes first must not pull the memory from under the
// others.
struct Mapping {
  Mapping(uint8_t* at, size_t size) : base(at), bytes(size) {}
  ~Mapping();
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;

  uint8_t* base;
  size_t bytes;
};

class Arena {
 public:
  // Commits head_bytes + heap_bytes, maps max_bytes of address space. Throws CapacityException.
  Arena(size_t head_bytes, size_t heap_bytes, size_t max_bytes);
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  uint8_t* base() const { return mapping_->base; }
  Heap& heap() { return heap_; }
  size_t committed_bytes() const { return committed_; }
  ArenaAddress address() const;

  // Makes a free extent of at least `bytes` at the heap's end. Throws CapacityException.
  void grow_for(size_t bytes);

 private:
  void commit(size_t bytes);

  int fd_ = -1;
  std::shared_ptr<Mapping> mapping_;
  std::atomic<size_t> committed_{0};  // grows on the executor, reports read it anywhere
  size_t head_bytes_;
  size_t max_bytes_;  // of head and heap
  uint64_t nonce_;
  Heap heap_;
};

// A peer's arena in this address space. A rank of the same process gives its own mapping: two
// mappings of one page would hide races from thread sanitizer.
class ArenaView {
 public:
  explicit ArenaView(const ArenaAddress& address);

  uint8_t* base() const { return mapping_->base; }

 private:
  std::shared_ptr<Mapping> mapping_;
};

// A taken extent that returns to its heap when the last owner drops it; keeps the arena mapped.
class Slab {
 public:
  Slab(std::shared_ptr<Arena> arena, Extent extent) : arena_(std::move(arena)), extent_(extent) {}
  ~Slab() { arena_->heap().give(extent_); }
  Slab(const Slab&) = delete;
  Slab& operator=(const Slab&) = delete;

  uint8_t* data() const { return arena_->base() + extent_.offset; }
  size_t bytes() const { return extent_.bytes; }
  size_t offset() const { return extent_.offset; }

  // The first `bytes` (rounded up to the heap's alignment) become a slab of their own.
  std::shared_ptr<Slab> split_front(size_t bytes);
  // The memory beyond `bytes` goes back to the heap.
  void trim(size_t bytes);

 private:
  std::shared_ptr<Arena> arena_;
  Extent extent_;
};

}  // namespace commlib
