// What a provider itself can do between two ranks: the yardstick of `commlib bench`.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "transport/transport.hpp"

namespace commlib {

// Streams of plain puts: no protocol above them but a window of outstanding messages.
class GoodputProbe : private PutListener {
 public:
  // `messages`: device memory for message_bytes * window; nullptr: host memory of the probe's own.
  GoodputProbe(const std::string& transport, int rank, int num_ranks, size_t message_bytes,
               int window, TransportOptions options, void* messages = nullptr);
  ~GoodputProbe() override;

  std::vector<uint8_t> address() const { return transport_->address(); }
  void connect(int peer, const std::vector<uint8_t>& address);

  // Puts bytes[i] to targets[i], all targets in turn, then a signal to each; acknowledges the
  // signals of `sources`; returns the seconds until all own signals were acknowledged. `round`
  // counts up from 1. Throws TransportException after timeout_s.
  double run(const std::vector<int>& targets, const std::vector<size_t>& bytes,
             const std::vector<int>& sources, uint64_t round, double timeout_s);

 private:
  void on_put_complete(uint64_t) override { --outstanding_; }
  void step(double deadline);
  void put_all(const std::vector<int>& targets, const std::vector<size_t>& bytes, double deadline);
  uint64_t* arrived_word(int peer) const;
  uint64_t* ack_word(int peer) const;

  int rank_;
  size_t words_bytes_;
  size_t message_bytes_;
  int window_;
  int outstanding_ = 0;
  std::vector<uint8_t> memory_;
  uint8_t* base_ = nullptr;
  std::unique_ptr<Transport> transport_;
};

}  // namespace commlib
