// The sending end of one reliable connection: commands that wait, the window of those in flight,
// chains of work requests with one doorbell each.
#pragma once

#include <deque>
#include <vector>

#include "transport/region_map.hpp"
#include "transport/verbs_device.hpp"

namespace commlib {

// Signals by immediate: the value goes to a mailbox slot, the immediate says which word it is for,
// and the receiver's processor stores it there. A receive is posted again only after its slot has
// been read, and at most one message can arrive while none is posted, so twice as many slots as
// receives are more than enough.
constexpr uint32_t kMailboxReceives = 256;
constexpr uint32_t kMailboxSlots = 2 * kMailboxReceives;
constexpr size_t kWordBytes = sizeof(uint64_t);

// The receiving end's memory.
struct VerbsTarget {
  RegionMap<uint32_t> memory;  // with the keys of puts
  uint32_t signal_key = 0;
  uint64_t mailbox_address = 0;  // 0: signals are written to their words
  uint32_t mailbox_key = 0;
};

struct VerbsCommand {  // its ranges lie in one region each
  bool is_signal = false;
  size_t local_offset = 0;
  size_t remote_offset = 0;
  size_t bytes = 0;
  uint64_t value = 0;  // token of a put, value of a signal
};

class VerbsSender {
 public:
  // Work requests are numbered below `first_id`, a multiple of 2^32. `source` is the local memory.
  VerbsSender(VerbsDevice& device, const TransportOptions& options,
              const RegionMap<uint32_t>& source, uint64_t first_id);
  ~VerbsSender() { close(); }
  VerbsSender(const VerbsSender&) = delete;
  VerbsSender& operator=(const VerbsSender&) = delete;

  // The other end's receiver exists: what is held may go. Throws TransportException.
  void open(const VerbsEnd& receiver, const VerbsTarget& target);
  bool is_open() const { return is_open_; }
  const VerbsEnd& end() const { return end_; }
  const ibv_qp* qp() const { return qp_; }
  VerbsDevice& device() const { return device_; }

  void submit(const VerbsCommand& command) { held_.push_back(command); }
  // Posts what the window allows. 0 or the error of ibv_post_send.
  int post();
  // Everything up to this request has completed; appends the tokens of its puts.
  void complete(uint64_t id, std::vector<uint64_t>* tokens);
  // Ends the connection; the card touches no memory for it any more. Appends all tokens.
  void abandon(std::vector<uint64_t>* tokens);

  bool has_held() const { return !held_.empty(); }
  bool is_idle() const { return held_.empty() && posted_.empty(); }

 private:
  static constexpr int kMaxChain = 16;
  // Within a chain, completions at least this often: a slot is not reused before.
  static constexpr size_t kCompletionBytes = 64 << 10;

  struct Posted {
    size_t bytes;
    bool has_token;
    uint64_t token;
  };

  int fill_chain();
  void fill(int index, const VerbsCommand& command, size_t bytes);
  void close();

  VerbsDevice& device_;
  const TransportOptions& options_;
  const RegionMap<uint32_t>& source_;
  ibv_qp* qp_ = nullptr;
  VerbsEnd end_;
  VerbsTarget target_;
  bool is_open_ = false;

  std::deque<VerbsCommand> held_;
  size_t part_done_ = 0;  // bytes of the first held command that are posted already
  std::deque<Posted> posted_;
  uint64_t first_id_;
  uint32_t next_number_ = 0;
  uint32_t oldest_number_ = 0;  // of posted_.front()
  size_t bytes_in_flight_ = 0;
  uint64_t num_signals_ = 0;

  ibv_send_wr requests_[kMaxChain];
  ibv_sge pieces_[kMaxChain];
  uint64_t values_[kMaxChain];  // copied by the post: signals are sent inline
};

}  // namespace commlib
