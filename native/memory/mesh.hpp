// Where everything lies: this rank's arena and registered region, the mapped arenas of its node
// peers, and the offsets inside the registered regions of its scale-out peers.
#pragma once

#include <sys/mman.h>

#include <memory>
#include <optional>
#include <vector>

#include "memory/arena.hpp"
#include "memory/regions.hpp"

namespace commlib {

// Anonymous, zeroed, page-aligned memory for the registered region.
class RegisteredMemory {
 public:
  explicit RegisteredMemory(size_t bytes) : bytes_(bytes) {
    void* mapped = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED)
      throw CapacityException("cannot map " + std::to_string(bytes) +
                                  " bytes for the registered region; lower ring_bytes",
                              bytes, 0);
    base_ = static_cast<uint8_t*>(mapped);
  }
  ~RegisteredMemory() { munmap(base_, bytes_); }
  RegisteredMemory(const RegisteredMemory&) = delete;
  RegisteredMemory& operator=(const RegisteredMemory&) = delete;

  uint8_t* base() const { return base_; }
  size_t bytes() const { return bytes_; }

 private:
  uint8_t* base_ = nullptr;
  size_t bytes_;
};

class Mesh {
 public:
  // `rings`: where the registered region goes on behind its control_bytes, for instance on a
  // device; nullptr: in one piece.
  Mesh(Group group, const MemoryConfig& config, size_t heap_bytes, size_t max_arena_bytes,
       uint8_t* rings = nullptr)
      : group_(std::move(group)),
        control_(group_, config),
        registered_(group_, group_.rank(), config),
        arena_(std::make_shared<Arena>(control_.total_bytes, heap_bytes,
                                       max_arena_bytes + control_.total_bytes)),
        memory_(rings != nullptr ? registered_.control_bytes : registered_.total_bytes),
        rings_(rings != nullptr ? rings : memory_.base() + registered_.control_bytes),
        views_(static_cast<size_t>(group_.num_ranks())),
        remote_(static_cast<size_t>(group_.num_ranks())) {
    for (int peer : group_.scale_out_peers(group_.rank()))
      remote_[size_t(peer)].emplace(group_, peer, config);
  }

  void map_peer(int rank, const ArenaAddress& address) { views_[size_t(rank)].emplace(address); }

  const Group& group() const { return group_; }
  const ControlRegion& control() const { return control_; }
  const RegisteredRegion& registered() const { return registered_; }
  const RegisteredRegion& registered_of(int peer) const { return *remote_[size_t(peer)]; }
  const std::shared_ptr<Arena>& arena() const { return arena_; }
  // The part of the registered region that is host memory.
  const RegisteredMemory& memory() const { return memory_; }
  // Of a ring, by its offset in the registered region.
  uint8_t* ring(size_t offset) const { return rings_ + (offset - registered_.control_bytes); }
  // Unmaps the peers; nothing may touch them afterwards.
  void unmap_peers() {
    for (auto& view : views_) view.reset();
  }

  // Base of a node peer's arena (or our own).
  uint8_t* arena_base(int rank) const {
    return rank == group_.rank() ? arena_->base() : views_[size_t(rank)]->base();
  }
  uint64_t* arena_word(int rank, size_t offset) const {
    return reinterpret_cast<uint64_t*>(arena_base(rank) + offset);
  }
  uint64_t* registered_word(size_t offset) const {
    return reinterpret_cast<uint64_t*>(memory_.base() + offset);
  }

 private:
  Group group_;
  ControlRegion control_;
  RegisteredRegion registered_;
  std::shared_ptr<Arena> arena_;
  RegisteredMemory memory_;
  uint8_t* rings_;
  std::vector<std::optional<ArenaView>> views_;
  std::vector<std::optional<RegisteredRegion>> remote_;
};

}  // namespace commlib
