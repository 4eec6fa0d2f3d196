// Packets: 16 bytes that are written and read as one, 12 of payload and the epoch in which they
// were sent. A reader knows of each by itself that it has come: no flag, no fence, no way back. A
// third more bytes than the payload, so only for little of it.
#pragma once

#include "cuda/wait.cuh"

namespace commlib::cuda {

constexpr uint32_t kPacketPayload = 12;

__host__ __device__ constexpr uint32_t packets_of(uint32_t bytes) {
  return (bytes + kPacketPayload - 1) / kPacketPayload;
}

// Partner: store_packet at the writer. False: the Runtime is faulty.
__device__ inline bool wait_packet(const Mesh& mesh, const Packet* from, int writer, uint64_t epoch,
                                   Packet* packet) {
  return wait_until(mesh, {kTakeIn, writer, epoch, epoch}, [=](uint64_t* seen) {
    *packet = load_packet(from);
    *seen = packet->epoch;
    return packet->epoch == uint32_t(epoch);
  });
}

}  // namespace commlib::cuda
