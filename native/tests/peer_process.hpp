// A second process for transport tests: the test program started again, joined to it by pipes. It
// can be stopped and killed.
#pragma once

#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <string>
#include <vector>

#include "tests/transport_stream.hpp"

namespace commlib::testing {

inline void write_all(int fd, const void* data, size_t bytes) {
  if (write(fd, data, bytes) != static_cast<ssize_t>(bytes)) throw std::runtime_error("write");
}

inline void read_all(int fd, void* data, size_t bytes) {
  for (size_t done = 0; done < bytes;) {
    const ssize_t n = read(fd, static_cast<char*>(data) + done, bytes - done);
    if (n <= 0) throw std::runtime_error("the other process is gone");
    done += static_cast<size_t>(n);
  }
}

inline void write_blob(int fd, const std::vector<uint8_t>& blob) {
  const size_t bytes = blob.size();
  write_all(fd, &bytes, sizeof(bytes));
  write_all(fd, blob.data(), bytes);
}

inline std::vector<uint8_t> read_blob(int fd) {
  size_t bytes = 0;
  read_all(fd, &bytes, sizeof(bytes));
  std::vector<uint8_t> blob(bytes);
  read_all(fd, blob.data(), bytes);
  return blob;
}

// The peer process: rank 1, consumer of a stream. Pipes on descriptors 3 (in) and 4 (out).
inline int run_peer(const StreamShape& shape, const NodeMaker& make) {
  Node node(1, shape, make);
  write_blob(4, node.transport->address());
  node.transport->connect(0, read_blob(3));
  Stream stream(node, 0, false, true);
  while (!stream.step()) {
    if (const auto fault = node.transport->take_fault()) {
      fprintf(stderr, "peer: %s\n", fault->message.c_str());
      return 3;
    }
    if (getppid() == 1) return 4;  // orphaned
  }
  const uint64_t bad_words = stream.bad_words();
  write_all(4, &bad_words, sizeof(bad_words));
  // The producer says when it has seen the last acknowledgement.
  uint8_t go = 0;
  read_all(3, &go, 1);
  node.transport->shutdown(2.0);
  return 0;
}

// Streams from `node` to rank 1 until all is acknowledged or `patience_s` have passed: the seconds
// it took, a negative number if it is not.
inline double stream_to_peer(Node& node, double patience_s) {
  Stream stream(node, 1, true, false);
  const auto start = Clock::now();
  bool is_complete = false;
  while (!is_complete && seconds_since(start) < patience_s) is_complete = stream.step();
  return is_complete ? seconds_since(start) : -1;
}

// Runs /proc/self/exe with these arguments.
class PeerProcess {
 public:
  explicit PeerProcess(std::vector<std::string> arguments) {
    int to_peer[2], from_peer[2];
    if (pipe(to_peer) != 0 || pipe(from_peer) != 0) throw std::runtime_error("pipe");
    pid_ = fork();
    if (pid_ == 0) {
      const int in = dup(to_peer[0]), out = dup(from_peer[1]);
      for (int fd : {to_peer[0], to_peer[1], from_peer[0], from_peer[1]}) close(fd);
      const int in_high = fcntl_dup(in, 10), out_high = fcntl_dup(out, 11);
      dup2(in_high, 3);
      dup2(out_high, 4);
      std::string name = "peer";
      std::vector<char*> words{name.data()};
      for (std::string& argument : arguments) words.push_back(argument.data());
      words.push_back(nullptr);
      execv("/proc/self/exe", words.data());
      _exit(127);
    }
    close(to_peer[0]);
    close(from_peer[1]);
    in_ = from_peer[0];
    out_ = to_peer[1];
  }
  PeerProcess(const PeerProcess&) = delete;
  PeerProcess& operator=(const PeerProcess&) = delete;
  ~PeerProcess() {
    if (pid_ > 0) {
      kill(pid_, SIGKILL);
      wait();
    }
    close(in_);
    close(out_);
  }
  void signal(int number) { kill(pid_, number); }
  int wait() {
    int status = 0;
    waitpid(pid_, &status, 0);
    pid_ = -1;
    return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
  }
  void connect(Node& node) {
    node.transport->connect(1, read_blob(in_));
    write_blob(out_, node.transport->address());
  }
  // After a stream: words that the peer found wrong.
  uint64_t bad_words() {
    uint64_t count = 1;
    read_all(in_, &count, sizeof(count));
    return count;
  }
  // Lets the peer end after a stream, with `node`; its exit status.
  int end(Node& node) {
    write_all(out_, "g", 1);
    node.transport->shutdown(2.0);
    return wait();
  }
  int in() const { return in_; }
  int out() const { return out_; }

 private:
  static int fcntl_dup(int fd, int at) {
    dup2(fd, at);
    close(fd);
    return at;
  }
  pid_t pid_ = -1;
  int in_ = -1;
  int out_ = -1;
};

}  // namespace commlib::testing
