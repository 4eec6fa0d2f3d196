// Through which one executor thread gives commands: a FIFO to each proxy thread. Which one a
// command takes follows from its channel.
#pragma once

#include <utility>
#include <vector>

#include "channel/fifo.hpp"

namespace commlib {

class CommandWriter {
 public:
  // thread_of_channel [channel] outlives this; filled before the first command.
  CommandWriter(std::vector<FifoProducer> fifos, const std::vector<uint8_t>& thread_of_channel)
      : fifos_(std::move(fifos)), thread_of_channel_(thread_of_channel) {}

  // False while the FIFO is full.
  bool push(const Command& command) {
    return fifos_[thread_of_channel_[channel_of(command)]].push(command);
  }

 private:
  std::vector<FifoProducer> fifos_;
  const std::vector<uint8_t>& thread_of_channel_;
};

}  // namespace commlib
