// First-fit heap over a range of offsets: slabs of the arena. Only the owning process allocates.
#pragma once

#include <map>
#include <mutex>

#include "common/types.hpp"

namespace commlib {

struct Extent {
  size_t offset = 0;
  size_t bytes = 0;
};

class Heap {
 public:
  static constexpr size_t kAlignment = 64;

  Heap(size_t begin, size_t end);

  // The largest free extent, taken whole. bytes == 0 if nothing is free.
  Extent take_largest();
  // Gives back [offset, offset + bytes), which must have been taken.
  void give(Extent extent);
  // The heap's end moves up to `end` (more memory was committed).
  void grow(size_t end);

  size_t end() const;
  size_t largest_free() const;
  // Free bytes that touch the end: what growth would add to.
  size_t free_at_end() const;
  size_t used_bytes() const;

 private:
  void insert(Extent extent);
  std::map<size_t, size_t>::const_iterator largest() const;

  mutable std::mutex mutex_;
  size_t end_;
  size_t used_ = 0;
  std::map<size_t, size_t> free_;  // offset -> bytes, never adjacent
};

}  // namespace commlib
