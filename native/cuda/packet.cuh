// Packets: 16 bytes that are written and read as one, 12 of payload and the epoch in which they
// were sent. A reader knows of each by itself that it has come: no flag, no fence, no way back. A
// third more bytes than the payload, so only for little of it.
#pragma once

#include "cuda/wait.cuh"

namespace commlib::cuda {

constexpr uint32_t kPacketPayload = 12;

struct Packet {
  uint32_t words[3];
  uint32_t epoch;
};
static_assert(sizeof(Packet) == 16);

__host__ __device__ constexpr uint32_t packets_of(uint32_t bytes) {
  return (bytes + kPacketPayload - 1) / kPacketPayload;
}

// One access of 128 bits: a vector of words might come apart (PTX, memory consistency model).
__device__ inline void store_packet(Packet* to, const Packet& packet) {
  asm volatile(
      "{.reg .b64 low, high; .reg .b128 all; mov.b64 low, {%1, %2}; mov.b64 high, {%3, %4}; "
      "mov.b128 all, {low, high}; st.relaxed.sys.global.b128 [%0], all;}" ::"l"(to),
      "r"(packet.words[0]), "r"(packet.words[1]), "r"(packet.words[2]), "r"(packet.epoch)
      : "memory");
}

__device__ inline Packet load_packet(const Packet* from) {
  Packet packet;
  asm volatile(
      "{.reg .b64 low, high; .reg .b128 all; ld.relaxed.sys.global.b128 all, [%4]; "
      "mov.b128 {low, high}, all; mov.b64 {%0, %1}, low; mov.b64 {%2, %3}, high;}"
      : "=r"(packet.words[0]), "=r"(packet.words[1]), "=r"(packet.words[2]), "=r"(packet.epoch)
      : "l"(from)
      : "memory");
  return packet;
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
