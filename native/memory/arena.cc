#include "memory/arena.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <cassert>
#include <cerrno>
#include <cstring>
#include <map>
#include <mutex>
#include <random>

#include "common/error.hpp"

namespace commlib {
namespace {

std::mutex registry_mutex;
// By nonce, for ranks that are threads.
std::map<uint64_t, std::weak_ptr<Mapping>>& registry() {
  static auto* arenas = new std::map<uint64_t, std::weak_ptr<Mapping>>;
  return *arenas;
}

uint64_t random_nonce() {
  std::random_device random;
  return uint64_t(random()) << 32 | random();
}

// A new, already unlinked shared memory object.
int open_unlinked() {
  for (int attempt = 0; attempt < 100; ++attempt) {
    const std::string name = "/commlib-" + std::to_string(getpid()) + "-" +
                             std::to_string(random_nonce()) + "-" + std::to_string(attempt);
    const int fd = shm_open(name.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (fd >= 0) {
      shm_unlink(name.c_str());
      return fd;
    }
    if (errno != EEXIST)
      throw CapacityException("shm_open failed: " + std::string(std::strerror(errno)) +
                                  "; commlib needs a writable /dev/shm",
                              1, 0);
  }
  throw CapacityException("no free name in /dev/shm after 100 attempts", 1, 0);
}

std::string mib(size_t bytes) { return std::to_string((bytes + (1 << 20) - 1) >> 20) + " MiB"; }

}  // namespace

Mapping::~Mapping() { munmap(base, bytes); }

Arena::Arena(size_t head_bytes, size_t heap_bytes, size_t max_bytes)
    : head_bytes_(head_bytes),
      max_bytes_(align_up(max_bytes, 4096)),
      nonce_(random_nonce()),
      heap_(head_bytes, head_bytes) {
  const size_t first = align_up(head_bytes + heap_bytes, 4096);
  if (first > max_bytes_)
    throw CapacityException("the arena needs " + mib(first) + ", more than max_arena_bytes = " +
                                mib(max_bytes_) + "; raise max_arena_bytes or lower max_tokens",
                            first, max_bytes_);
  fd_ = open_unlinked();
  try {
    commit(first);
    void* mapped =
        mmap(nullptr, max_bytes_, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd_, 0);
    if (mapped == MAP_FAILED)
      throw CapacityException("mapping " + mib(max_bytes_) +
                                  " of address space failed: " + std::strerror(errno) +
                                  "; lower max_arena_bytes or raise ulimit -v",
                              max_bytes_, 0);
    mapping_ = std::make_shared<Mapping>(static_cast<uint8_t*>(mapped), max_bytes_);
  } catch (...) {
    close(fd_);
    throw;
  }
  heap_.grow(first);
  std::lock_guard<std::mutex> lock(registry_mutex);
  registry()[nonce_] = mapping_;
}

Arena::~Arena() {
  {
    std::lock_guard<std::mutex> lock(registry_mutex);
    registry().erase(nonce_);
  }
  close(fd_);
}

ArenaAddress Arena::address() const {
  struct stat status{};
  if (fstat(fd_, &status) != 0) assert(false);
  return {static_cast<int64_t>(getpid()),
          fd_,
          nonce_,
          max_bytes_,
          static_cast<uint64_t>(status.st_dev),
          static_cast<uint64_t>(status.st_ino)};
}

// posix_fallocate reserves the pages now: a full /dev/shm is an error here, not SIGBUS later.
void Arena::commit(size_t bytes) {
  int error;
  do {
    error = posix_fallocate(fd_, 0, static_cast<off_t>(bytes));
  } while (error == EINTR);
  if (error != 0) {
    struct statvfs fs{};
    const size_t available =
        fstatvfs(fd_, &fs) == 0 ? static_cast<size_t>(fs.f_bavail) * fs.f_frsize : 0;
    // What was allocated before the failure goes back, so that a smaller request can succeed.
    if (ftruncate(fd_, static_cast<off_t>(committed_bytes())) != 0) assert(false);
    throw CapacityException("shared memory of " + mib(bytes) + " does not fit: /dev/shm has " +
                                mib(available) + " left (" + std::strerror(error) +
                                "); enlarge it (docker run --shm-size=2g, or mount -o "
                                "remount,size=2g /dev/shm) or lower max_tokens / arena_bytes",
                            bytes, available);
  }
  committed_ = bytes;
}

void Arena::grow_for(size_t bytes) {
  const size_t missing = bytes - std::min(bytes, heap_.free_at_end());
  const size_t wanted = align_up(heap_.end() + missing, 4096);
  if (wanted > max_bytes_)
    throw CapacityException("the arena would need " + mib(wanted - head_bytes_) +
                                ", more than max_arena_bytes = " + mib(max_bytes_ - head_bytes_) +
                                "; drop handles and outputs earlier, or raise max_arena_bytes",
                            wanted - head_bytes_, max_bytes_ - head_bytes_);
  commit(wanted);
  heap_.grow(wanted);
}

ArenaView::ArenaView(const ArenaAddress& address) {
  if (address.pid == getpid()) {
    std::lock_guard<std::mutex> lock(registry_mutex);
    const auto found = registry().find(address.nonce);
    if (found != registry().end() && (mapping_ = found->second.lock())) return;
  }
  const std::string path =
      "/proc/" + std::to_string(address.pid) + "/fd/" + std::to_string(address.fd);
  const int fd = open(path.c_str(), O_RDWR | O_CLOEXEC);
  if (fd < 0)
    throw ConfigException("cannot open " + path +
                          " of a rank on the same node: " + std::strerror(errno) +
                          "; ranks of a node must run as one user and share a pid namespace");
  struct stat status{};
  if (fstat(fd, &status) != 0 || status.st_dev != address.device ||
      status.st_ino != address.inode) {
    close(fd);
    throw ConfigException(path +
                          " is not the shared memory of the rank that named it: the ranks are "
                          "not on one machine, or not in one pid namespace");
  }
  void* mapped =
      mmap(nullptr, address.max_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);
  const int error = errno;
  close(fd);
  if (mapped == MAP_FAILED)
    throw CapacityException("mapping a peer's arena failed: " + std::string(std::strerror(error)),
                            address.max_bytes, 0);
  mapping_ = std::make_shared<Mapping>(static_cast<uint8_t*>(mapped), address.max_bytes);
}

std::shared_ptr<Slab> Slab::split_front(size_t bytes) {
  const size_t front = align_up(bytes, Heap::kAlignment);
  assert(front <= extent_.bytes);
  auto slab = std::make_shared<Slab>(arena_, Extent{extent_.offset, front});
  extent_.offset += front;
  extent_.bytes -= front;
  return slab;
}

void Slab::trim(size_t bytes) {
  const size_t kept = std::min(align_up(bytes, Heap::kAlignment), extent_.bytes);
  arena_->heap().give({extent_.offset + kept, extent_.bytes - kept});
  extent_.bytes = kept;
}

}  // namespace commlib
