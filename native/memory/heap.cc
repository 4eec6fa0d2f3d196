#include "memory/heap.hpp"

#include <algorithm>
#include <cassert>
#include <iterator>

namespace commlib {

Heap::Heap(size_t begin, size_t end) : end_(end) {
  if (end > begin) free_[begin] = end - begin;
}

std::map<size_t, size_t>::const_iterator Heap::largest() const {
  return std::max_element(free_.begin(), free_.end(),
                          [](const auto& a, const auto& b) { return a.second < b.second; });
}

Extent Heap::take_largest() {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto at = largest();
  if (at == free_.end()) return {};
  const Extent extent{at->first, at->second};
  free_.erase(at);
  used_ += extent.bytes;
  return extent;
}

void Heap::give(Extent extent) {
  if (extent.bytes == 0) return;
  std::lock_guard<std::mutex> lock(mutex_);
  assert(used_ >= extent.bytes);
  used_ -= extent.bytes;
  insert(extent);
}

void Heap::grow(size_t end) {
  std::lock_guard<std::mutex> lock(mutex_);
  assert(end >= end_);
  if (end > end_) insert({end_, end - end_});
  end_ = end;
}

void Heap::insert(Extent extent) {
  auto next = free_.lower_bound(extent.offset);
  assert(next == free_.end() || extent.offset + extent.bytes <= next->first);
  if (next != free_.begin()) {
    const auto before = std::prev(next);
    assert(before->first + before->second <= extent.offset);
    if (before->first + before->second == extent.offset) {
      extent = {before->first, before->second + extent.bytes};
      free_.erase(before);
    }
  }
  if (next != free_.end() && extent.offset + extent.bytes == next->first) {
    extent.bytes += next->second;
    free_.erase(next);
  }
  free_[extent.offset] = extent.bytes;
}

size_t Heap::end() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return end_;
}

size_t Heap::largest_free() const {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto at = largest();
  return at == free_.end() ? 0 : at->second;
}

size_t Heap::free_at_end() const {
  std::lock_guard<std::mutex> lock(mutex_);
  if (free_.empty()) return 0;
  const auto last = std::prev(free_.end());
  return last->first + last->second == end_ ? last->second : 0;
}

size_t Heap::used_bytes() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return used_;
}

}  // namespace commlib
