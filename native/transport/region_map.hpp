// What lies at the offsets of a rank: the host region from 0 on, the device region, if there is
// one, behind it. The one place where a provider turns an offset into an address and a key.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace commlib {

// Key: what the provider needs besides the address.
template <typename Key>
class RegionMap {
 public:
  struct Part {
    uint64_t base;
    size_t bytes;
    Key key;
  };
  struct Place {
    uint64_t address;
    Key key;
  };

  // First the host region, then the device region.
  void add(uint64_t base, size_t bytes, Key key) { parts_.push_back({base, bytes, key}); }
  void clear() { parts_.clear(); }

  const std::vector<Part>& parts() const { return parts_; }
  bool is_empty() const { return parts_.empty(); }
  bool has_device() const { return parts_.size() > 1; }
  size_t host_bytes() const { return parts_.empty() ? 0 : parts_[0].bytes; }

  // Where [offset, offset + bytes) lies; nothing if no region holds all of it.
  std::optional<Place> find(size_t offset, size_t bytes) const {
    for (const Part& part : parts_) {
      if (offset <= part.bytes && bytes <= part.bytes - offset)
        return Place{part.base + offset, part.key};
      if (offset < part.bytes) break;  // it goes on into the next one, which lies elsewhere
      offset -= part.bytes;
    }
    return std::nullopt;
  }
  // The same for the word of a signal: aligned, in host memory, where processors poll as well.
  std::optional<Place> find_word(size_t offset) const {
    if (offset % sizeof(uint64_t) != 0 || offset >= host_bytes()) return std::nullopt;
    return find(offset, sizeof(uint64_t));
  }

  // Why find() has found nothing.
  std::string refusal(size_t offset, size_t bytes) const {
    size_t total = 0;
    for (const Part& part : parts_) total += part.bytes;
    const std::string range =
        "offset=" + std::to_string(offset) + " bytes=" + std::to_string(bytes);
    if (offset <= total && bytes <= total - offset)
      return range + " crosses from host into device memory at " + std::to_string(host_bytes());
    return range + " is outside the region of " + std::to_string(total) + " bytes";
  }
  std::string word_refusal(size_t offset) const {
    if (offset % sizeof(uint64_t) == 0 && find(offset, sizeof(uint64_t)))
      return "word at offset=" + std::to_string(offset) + " in device memory, which begins at " +
             std::to_string(host_bytes());
    return "word misaligned, or " + refusal(offset, sizeof(uint64_t));
  }

 private:
  std::vector<Part> parts_;
};

}  // namespace commlib
