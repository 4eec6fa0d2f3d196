// The 128-bit command an executor (CPU thread or SM) hands to the proxy.
#pragma once

#include "common/types.hpp"

namespace commlib {

enum class CommandKind : uint32_t {
  kNone = 0,
  kPut = 1,     // bytes from src to dst, then add `count` to the channel's counter at the peer
  kSignal = 2,  // the counter only
};

// lo: phase 63 | kind 62..60 | channel 59..44 | count 43..32 | bytes 31..0
// hi: src_offset / 16 63..32 | dst_offset / 16 31..0   (offsets into the registered regions)
struct alignas(16) Command {
  uint64_t lo;
  uint64_t hi;
};
static_assert(sizeof(Command) == 16);

constexpr uint32_t kMaxChannels = 1u << 16;
constexpr uint32_t kMaxCommandCount = (1u << 12) - 1;
constexpr size_t kCommandUnit = 16;
constexpr uint64_t kPhaseBit = 1ull << 63;

struct CommandFields {
  CommandKind kind;
  uint32_t channel;
  uint32_t count;
  uint32_t bytes;
  size_t src_offset;
  size_t dst_offset;
};

COMMLIB_HD Command encode(const CommandFields& fields) {
  Command command;
  command.lo = static_cast<uint64_t>(fields.kind) << 60 |
               static_cast<uint64_t>(fields.channel) << 44 |
               static_cast<uint64_t>(fields.count) << 32 | fields.bytes;
  command.hi = static_cast<uint64_t>(fields.src_offset / kCommandUnit) << 32 |
               static_cast<uint64_t>(fields.dst_offset / kCommandUnit);
  return command;
}

COMMLIB_HD uint32_t channel_of(const Command& command) {
  return static_cast<uint32_t>((command.lo >> 44) & 0xffff);
}

COMMLIB_HD CommandFields decode(const Command& command) {
  CommandFields fields;
  fields.kind = static_cast<CommandKind>((command.lo >> 60) & 0x7);
  fields.channel = channel_of(command);
  fields.count = static_cast<uint32_t>((command.lo >> 32) & 0xfff);
  fields.bytes = static_cast<uint32_t>(command.lo);
  fields.src_offset = (command.hi >> 32) * kCommandUnit;
  fields.dst_offset = (command.hi & 0xffffffffu) * kCommandUnit;
  return fields;
}

}  // namespace commlib
