// Heap, arena and slabs.
#include <dirent.h>
#include <doctest/doctest.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <random>
#include <vector>

#include "common/error.hpp"
#include "memory/arena.hpp"

using namespace commlib;

namespace {

constexpr size_t kPage = 4096;

// The heap as one flag per 64 bytes.
class HeapModel {
 public:
  explicit HeapModel(size_t units) : is_free_(units, true) {}
  void set(Extent extent, bool is_free) {
    for (size_t i = extent.offset / 64; i < (extent.offset + extent.bytes) / 64; ++i)
      is_free_[i] = is_free;
  }
  bool is_all_free(Extent extent) const {
    for (size_t i = extent.offset / 64; i < (extent.offset + extent.bytes) / 64; ++i)
      if (!is_free_[i]) return false;
    return true;
  }
  void grow(size_t units) { is_free_.resize(units, true); }
  size_t largest_free() const {
    size_t best = 0, run = 0;
    for (bool unit : is_free_) best = std::max(best, run = unit ? run + 1 : 0);
    return best * 64;
  }
  size_t free_at_end() const {
    size_t run = 0;
    while (run < is_free_.size() && is_free_[is_free_.size() - 1 - run]) ++run;
    return run * 64;
  }
  size_t used() const { return size_t(std::count(is_free_.begin(), is_free_.end(), false)) * 64; }
  size_t bytes() const { return is_free_.size() * 64; }

 private:
  std::vector<bool> is_free_;
};

// Runs body in a child process; the write end goes to the child, its exit status comes back.
class Child {
 public:
  explicit Child(const std::function<int(int read_fd, int write_fd)>& body) {
    int down[2], up[2];
    REQUIRE(pipe(down) == 0);
    REQUIRE(pipe(up) == 0);
    pid_ = fork();
    REQUIRE(pid_ >= 0);
    if (pid_ == 0) {
      close(down[1]);
      close(up[0]);
      _exit(body(down[0], up[1]));
    }
    close(down[0]);
    close(up[1]);
    to_child_ = down[1];
    from_child_ = up[0];
  }
  ~Child() {
    close(to_child_);
    close(from_child_);
    if (pid_ > 0) kill_and_wait();
  }
  int to_child() const { return to_child_; }
  int from_child() const { return from_child_; }
  pid_t pid() const { return pid_; }
  int wait() {
    int status = -1;
    waitpid(pid_, &status, 0);
    pid_ = -1;
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
  }
  void kill_and_wait() {
    kill(pid_, SIGKILL);
    waitpid(pid_, nullptr, 0);
    pid_ = -1;
  }

 private:
  pid_t pid_ = -1;
  int to_child_ = -1;
  int from_child_ = -1;
};

template <typename T>
bool send(int fd, const T& value) {
  return write(fd, &value, sizeof value) == sizeof value;
}
template <typename T>
bool receive(int fd, T* value) {
  return read(fd, value, sizeof *value) == sizeof *value;
}

// Entries of /dev/shm that belong to this process or the given one.
std::vector<std::string> left_in_shm(pid_t pid = getpid()) {
  const std::string prefix = "commlib-" + std::to_string(pid) + "-";
  std::vector<std::string> names;
  DIR* directory = opendir("/dev/shm");
  REQUIRE(directory != nullptr);
  while (const dirent* entry = readdir(directory))
    if (std::string(entry->d_name).compare(0, prefix.size(), prefix) == 0)
      names.emplace_back(entry->d_name);
  closedir(directory);
  return names;
}

}  // namespace

TEST_CASE("heap: random use against a model") {
  for (unsigned seed = 0; seed < 20; ++seed) {
    std::mt19937 random(seed);
    Heap heap(0, 64 * 64);
    HeapModel model(64);
    std::vector<Extent> taken;
    for (int step = 0; step < 400; ++step) {
      const unsigned action = random() % 10;
      if (action < 5) {
        const size_t largest = model.largest_free();
        const Extent whole = heap.take_largest();
        REQUIRE(whole.bytes == largest);
        REQUIRE(model.is_all_free(whole));
        model.set(whole, false);
        // As a grant does: keep a part, give the rest back, or keep it in two pieces.
        const size_t keep = whole.bytes == 0 ? 0 : random() % (whole.bytes / 64 + 1) * 64;
        const Extent rest{whole.offset + keep, whole.bytes - keep};
        if (keep > 0) taken.push_back({whole.offset, keep});
        if (random() % 4 == 0 && rest.bytes > 0) {
          taken.push_back(rest);
        } else {
          heap.give(rest);
          model.set(rest, true);
        }
      } else if (action < 9 && !taken.empty()) {
        const size_t at = random() % taken.size();
        heap.give(taken[at]);
        model.set(taken[at], true);
        taken.erase(taken.begin() + long(at));
      } else if (action == 9 && model.bytes() < 64 * 1000) {
        const size_t end = model.bytes() + random() % 20 * 64;
        heap.grow(end);
        model.grow(end / 64);
      }
      REQUIRE(heap.largest_free() == model.largest_free());  // fails unless neighbours merge
      REQUIRE(heap.free_at_end() == model.free_at_end());
      REQUIRE(heap.used_bytes() == model.used());
      REQUIRE(heap.end() == model.bytes());
    }
    for (const Extent& extent : taken) heap.give(extent);
    CHECK(heap.largest_free() == model.bytes());
    CHECK(heap.used_bytes() == 0);
  }
}

TEST_CASE("heap: empty heaps and empty extents") {
  Heap heap(128, 128);
  CHECK(heap.take_largest().bytes == 0);
  CHECK(heap.largest_free() == 0);
  CHECK(heap.free_at_end() == 0);
  heap.give({0, 0});
  CHECK(heap.used_bytes() == 0);
  heap.grow(256);
  CHECK(heap.largest_free() == 128);
  CHECK(heap.take_largest().offset == 128);
  CHECK(heap.free_at_end() == 0);
}

TEST_CASE("slabs: split, trim, and back to the heap") {
  auto arena = std::make_shared<Arena>(kPage, 4 * kPage, 16 * kPage);
  auto grant = std::make_shared<Slab>(arena, arena->heap().take_largest());
  CHECK(grant->bytes() == 4 * kPage);
  CHECK(grant->offset() == kPage);
  auto front = grant->split_front(100);
  CHECK(front->bytes() == 128);  // the heap's alignment
  CHECK(front->data() == arena->base() + kPage);
  CHECK(grant->offset() == kPage + 128);
  grant->trim(64);
  CHECK(grant->bytes() == 64);
  CHECK(arena->heap().used_bytes() == 192);
  CHECK(arena->heap().largest_free() == 4 * kPage - 192);
  grant->trim(1000);  // never grows
  CHECK(grant->bytes() == 64);
  auto empty = grant->split_front(0);
  CHECK(empty->bytes() == 0);
  front.reset();
  CHECK(arena->heap().largest_free() == 4 * kPage - 192);
  grant.reset();
  empty.reset();
  CHECK(arena->heap().largest_free() == 4 * kPage);
}

TEST_CASE("slabs keep their arena") {
  std::weak_ptr<Arena> watched;
  std::shared_ptr<Slab> slab;
  {
    auto arena = std::make_shared<Arena>(kPage, kPage, kPage * 4);
    watched = arena;
    slab = std::make_shared<Slab>(arena, arena->heap().take_largest());
  }
  REQUIRE(!watched.expired());
  std::memset(slab->data(), 0x5a, slab->bytes());
  CHECK(slab->data()[slab->bytes() - 1] == 0x5a);
  slab.reset();
  CHECK(watched.expired());
}

TEST_CASE("arena: private, nameless, zeroed") {
  Arena arena(kPage, 3 * kPage, 64 * kPage);
  CHECK(left_in_shm().empty());
  struct stat status{};
  REQUIRE(fstat(int(arena.address().fd), &status) == 0);
  CHECK((status.st_mode & 0777) == 0600);
  CHECK(status.st_nlink == 0);
  CHECK(status.st_size == 4 * long(kPage));  // committed, not the virtual size
  CHECK(arena.committed_bytes() == 4 * kPage);
  CHECK(arena.address().pid == getpid());
  CHECK(std::all_of(arena.base(), arena.base() + 4 * kPage, [](uint8_t b) { return b == 0; }));
}

TEST_CASE("arena: growth is seen through a mapping made before, in another process") {
  Arena arena(kPage, kPage, 64 * kPage);
  const ArenaAddress address = arena.address();
  Child child([&](int in, int out) {
    ArenaView view(address);
    if (!send(out, 'm')) return 10;
    size_t offset = 0;
    if (!receive(in, &offset)) return 11;
    for (size_t i = 0; i < 8 * kPage; ++i)
      if (view.base()[offset + i] != uint8_t(i * 7)) return 12;
    view.base()[offset] = 99;  // and back
    return 0;
  });
  char mapped = 0;
  REQUIRE(receive(child.from_child(), &mapped));
  arena.grow_for(8 * kPage);
  CHECK(arena.committed_bytes() >= 9 * kPage);
  const Extent extent = arena.heap().take_largest();
  REQUIRE(extent.bytes >= 8 * kPage);
  for (size_t i = 0; i < 8 * kPage; ++i) arena.base()[extent.offset + i] = uint8_t(i * 7);
  REQUIRE(send(child.to_child(), extent.offset));
  CHECK(child.wait() == 0);
  CHECK(arena.base()[extent.offset] == 99);
  CHECK(left_in_shm().empty());
}

TEST_CASE("arena: growth adds to what is free at the end") {
  Arena arena(kPage, 4 * kPage, 64 * kPage);
  arena.grow_for(4 * kPage);  // there already
  CHECK(arena.committed_bytes() == 5 * kPage);
  arena.grow_for(6 * kPage);
  CHECK(arena.committed_bytes() == 7 * kPage);
  CHECK(arena.heap().largest_free() == 6 * kPage);
  const Extent all = arena.heap().take_largest();
  arena.heap().give({all.offset, 4 * kPage});  // free, but not at the end
  arena.grow_for(3 * kPage);
  CHECK(arena.committed_bytes() == 10 * kPage);
  CHECK(arena.heap().largest_free() == 4 * kPage);
  CHECK(arena.heap().free_at_end() == 3 * kPage);
}

TEST_CASE("arena: max_bytes is a capacity error, and nothing is lost by it") {
  CHECK_THROWS_AS(Arena(kPage, 8 * kPage, 8 * kPage), CapacityException);
  Arena arena(kPage, kPage, 8 * kPage);
  try {
    arena.grow_for(100 * kPage);
    FAIL("grown beyond its maximum");
  } catch (const CapacityException& error) {
    CHECK(error.needed() == 100 * kPage);
    CHECK(error.available() == 7 * kPage);
    CHECK(std::string(error.what()).find("max_arena_bytes") != std::string::npos);
  }
  CHECK(arena.committed_bytes() == 2 * kPage);
  arena.grow_for(7 * kPage);
  CHECK(arena.heap().largest_free() == 7 * kPage);
  arena.base()[8 * kPage - 1] = 1;
}

TEST_CASE("arena: no shared memory left is a capacity error, and nothing is lost by it") {
  // A limit on file sizes stands in for a full /dev/shm; in a child, because it is for good.
  Child child([](int, int) {
    signal(SIGXFSZ, SIG_IGN);
    Arena arena(kPage, kPage, 64 * kPage);
    const rlimit limit{4 * kPage, 4 * kPage};
    if (setrlimit(RLIMIT_FSIZE, &limit) != 0) return 10;
    try {
      arena.grow_for(20 * kPage);
      return 11;
    } catch (const CapacityException& error) {
      if (error.needed() != 21 * kPage) return 12;
      if (std::string(error.what()).find("/dev/shm") == std::string::npos) return 13;
    }
    if (arena.committed_bytes() != 2 * kPage) return 14;
    if (arena.heap().largest_free() != kPage) return 15;
    struct stat status{};
    if (fstat(int(arena.address().fd), &status) != 0 || status.st_size != 2 * long(kPage))
      return 16;
    arena.grow_for(3 * kPage);  // a smaller one still fits
    arena.base()[4 * kPage - 1] = 1;
    try {
      Arena another(kPage, 20 * kPage, 64 * kPage);
      return 17;
    } catch (const CapacityException&) {
    }
    return left_in_shm().empty() ? 0 : 18;
  });
  CHECK(child.wait() == 0);
}

TEST_CASE("arena: kill -9 leaves the peers their mapping and /dev/shm nothing") {
  Child child([](int, int out) {
    Arena arena(kPage, kPage, 64 * kPage);
    arena.base()[5] = 42;
    if (!send(out, arena.address())) return 10;
    pause();
    return 11;
  });
  ArenaAddress address;
  REQUIRE(receive(child.from_child(), &address));
  ArenaView view(address);
  CHECK(view.base()[5] == 42);
  const pid_t pid = child.pid();
  child.kill_and_wait();
  CHECK(left_in_shm(pid).empty());
  CHECK(view.base()[5] == 42);  // no SIGBUS: the memory lives as long as somebody maps it
  view.base()[6] = 1;
  CHECK_THROWS_AS(ArenaView{address}, ConfigException);  // the owner is gone
}

TEST_CASE("arena: an address that leads to something else is refused") {
  Arena arena(kPage, kPage, 4 * kPage);
  arena.base()[9] = 7;
  ArenaAddress address = arena.address();
  address.nonce ^= 1;  // as if from another process
  CHECK(ArenaView(address).base()[9] == 7);
  CHECK(ArenaView(address).base() != arena.base());
  for (uint64_t ArenaAddress::* field : {&ArenaAddress::inode, &ArenaAddress::device}) {
    ArenaAddress wrong = address;
    wrong.*field ^= 1;
    CHECK_THROWS_AS(ArenaView{wrong}, ConfigException);
  }
  address.fd = 100000;
  CHECK_THROWS_AS(ArenaView{address}, ConfigException);
}

TEST_CASE("arena: ranks that are threads share one mapping, also after the owner has closed") {
  auto arena = std::make_unique<Arena>(kPage, kPage, 4 * kPage);
  const ArenaAddress address = arena->address();
  ArenaView view(address);
  CHECK(view.base() == arena->base());
  arena->base()[7] = 3;
  arena.reset();
  CHECK(view.base()[7] == 3);
  view.base()[kPage] = 1;  // what a peer writes late lands in memory that nobody reads
}
