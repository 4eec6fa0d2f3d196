#include "cpu/executor.hpp"

#include <cstdio>
#include <cstring>

#include "common/backoff.hpp"
#include "cpu/agreement.hpp"

namespace commlib {
namespace {

Outcome outcome_of(OutcomeKind kind) {
  Outcome outcome;
  outcome.kind = kind;
  return outcome;
}

void set_text(ExchangeHeader* header, const std::string& text) {
  std::snprintf(header->text, sizeof header->text, "%s", text.c_str());
}

constexpr int kMaxWaitSleepUs = 100;

}  // namespace

Executor::Executor(Mesh& mesh, Proxy& proxy, FaultBoard& board, const ExecutorConfig& config)
    : mesh_(mesh), proxy_(proxy), board_(board), config_(config), totals_(mesh.group()) {
  for (int i = 0; i < config.num_threads; ++i) writers_.push_back(proxy.writer(i));
}

Executor::~Executor() { stop(outcome_of(OutcomeKind::kRejected)); }

void Executor::start() {
  threads_.emplace_back([this] { coordinate(); });
  for (int i = 1; i < config_.num_threads; ++i) threads_.emplace_back([this, i] { help(i); });
}

void Executor::stop(const Outcome& outcome) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
    stop_outcome_ = outcome;
    wake_.notify_all();
    room_.notify_all();
  }
  for (std::thread& thread : threads_) thread.join();
  threads_.clear();
}

// A full queue is waited for, not refused: ranks fill up at different moments, and a call that is
// refused on some ranks only would pair the later calls of all ranks wrongly.
void Executor::submit(std::shared_ptr<Op> op) {
  std::unique_lock<std::mutex> lock(mutex_);
  room_.wait(lock, [this] {
    return stop_ || queue_.size() + (is_running_ ? 1 : 0) < size_t(config_.max_in_flight);
  });
  if (stop_) throw ConfigException("the Runtime is closed");
  queue_.push_back(std::move(op));
  wake_.notify_all();
}

void Executor::submit_last(std::shared_ptr<Op> op) {
  std::lock_guard<std::mutex> lock(mutex_);
  queue_.push_back(std::move(op));
  wake_.notify_all();
}

void Executor::coordinate() {
  for (;;) {
    std::shared_ptr<Op> op;
    {
      std::unique_lock<std::mutex> lock(mutex_);
      if (queue_.empty()) proxy_.set_busy(false);
      wake_.wait(lock, [this] { return stop_ || !queue_.empty(); });
      if (queue_.empty()) return;
      op = queue_.front();
      queue_.pop_front();
      if (stop_) {
        lock.unlock();
        op->finish(stop_outcome_);
        continue;
      }
      is_running_ = true;
    }
    proxy_.set_busy(true);
    Outcome outcome;
    const double begin = now_s();
    try {
      outcome = run(*op);
    } catch (const std::exception& error) {  // out of memory: nothing else throws here
      raise_failure(op_name(op->kind), error.what());
      outcome = fault_outcome(op_name(op->kind), "", {});
    }
    {
      std::lock_guard<std::mutex> lock(mutex_);
      is_running_ = false;
      wake_.notify_all();  // helpers that stop() has told to end wait for this
      room_.notify_all();
    }
    op->spans.push_back({op_name(op->kind), begin, now_s()});
    op->finish(std::move(outcome));
  }
}

Outcome Executor::run(Op& op) {
  if (board_.raised()) return fault_outcome(op_name(op.kind), "start", {});
  OwnCounts own;
  ExchangeTable table;
  uint64_t epoch = 0;
  Outcome verdict = negotiate(op, &own, &table, &epoch);
  if (verdict.kind == OutcomeKind::kDone) {
    if (op.kind == OpKind::kDispatch || op.kind == OpKind::kCachedDispatch)
      verdict = run_dispatch(op, std::move(own), table, epoch);
    else if (op.kind == OpKind::kCombine)
      verdict = run_combine(op, table, epoch);
  }
  // After a fault late writes may still come: the grant stays out of the heap for good.
  if (verdict.kind != OutcomeKind::kFault) grant_.reset();
  return verdict;
}

// Exchanges until every rank has room, or all know why not. At most three rounds: ask, grow,
// report that growing failed.
Outcome Executor::negotiate(Op& op, OwnCounts* own, ExchangeTable* table, uint64_t* epoch) {
  const size_t me = size_t(mesh_.group().rank());
  ExchangeHeader header;
  set_text(&header, describe_call(op));
  header.config_hash = hash_text(header.text);
  const bool is_fresh = op.kind == OpKind::kDispatch;
  std::string reject = op.reject;
  if (reject.empty() && is_fresh)
    reject = count_tokens(mesh_.group(), op.dispatch, config_.num_topk, own);
  if (!reject.empty()) {
    header.status = RowStatus::kRejected;
    set_text(&header, reject);
  }
  const bool has_counts = is_fresh && header.status == RowStatus::kOk;
  for (;;) {
    grant_.reset();  // the old grant first, or there is nothing to take
    grant_ = std::make_shared<Slab>(mesh_.arena(), mesh_.arena()->heap().take_largest());
    header.grant_offset = grant_->offset();
    if (header.status != RowStatus::kCapacity) header.grant_bytes = grant_->bytes();
    Outcome outcome = run_exchange(op, header, has_counts ? own : nullptr, table);
    *epoch = epoch_;
    if (outcome.kind == OutcomeKind::kFault) return outcome;
    outcome = judge(*table);
    if (outcome.kind != OutcomeKind::kDone) return outcome;
    const std::vector<size_t> needed =
        needed_bytes(mesh_.group(), op, *table, config_.hidden, config_.num_topk);
    bool is_short = false;
    for (size_t rank = 0; rank < needed.size(); ++rank)
      is_short |= needed[rank] > table->headers[rank].grant_bytes;
    if (!is_short) return outcome;
    if (needed[me] <= grant_->bytes()) continue;
    grant_.reset();
    try {
      mesh_.arena()->grow_for(needed[me]);
    } catch (const CapacityException& error) {
      header.status = RowStatus::kCapacity;
      header.needed = error.needed();
      header.grant_bytes = error.available();
      set_text(&header, error.what());
    }
  }
}

Outcome Executor::run_exchange(Op& op, ExchangeHeader header, const OwnCounts* counts,
                               ExchangeTable* table) {
  Exchange exchange(mesh_, proxy_, writers_[0], ++epoch_, header, counts);
  Backoff backoff(kMaxWaitSleepUs);
  const double begin = now_s();
  double last_progress = begin;
  while (!exchange.is_done()) {
    if (may_step("exchange") && exchange.step()) {
      backoff.reset();
      last_progress = now_s();
      continue;
    }
    const double waited = now_s() - last_progress;
    if (waited > config_.timeout_s)
      raise_timeout(op_name(op.kind), "exchange", exchange.waits_for(), epoch_, waited);
    if (board_.raised()) return fault_outcome(op_name(op.kind), "exchange", exchange.waits_for());
    backoff.wait();
  }
  op.spans.push_back({"exchange", begin, now_s()});
  *table = exchange.table();
  return outcome_of(OutcomeKind::kDone);
}

Outcome Executor::run_dispatch(Op& op, OwnCounts own, const ExchangeTable& table, uint64_t epoch) {
  const Group& group = mesh_.group();
  const bool is_fresh = op.kind == OpKind::kDispatch;
  if (is_fresh) {
    auto handle = std::make_shared<HandleData>();
    handle->epoch = epoch;
    handle->layout = op.dispatch.layout;
    handle->alignment = op.dispatch.alignment;
    handle->num_topk = config_.num_topk;
    handle->num_tokens = op.dispatch.num_tokens;
    handle->counts = table.counts;
    handle->own_records = std::move(own.records);
    build_plan(group, handle.get());
    op.handle = std::move(handle);
  }
  DispatchContext context{&mesh_,
                          &proxy_,
                          &totals_,
                          op.handle.get(),
                          op.dispatch,
                          epoch,
                          is_fresh,
                          config_.chunk_tokens,
                          config_.ring_bytes,
                          config_.chunk_bytes,
                          config_.hidden,
                          config_.hidden * dtype_bytes(op.dispatch.dtype),
                          landing_shape(op, config_.hidden, config_.num_topk),
                          {},
                          {}};
  for (const ExchangeHeader& header : table.headers) context.grants.push_back(header.grant_offset);
  context.landing.resize(size_t(group.num_ranks()));
  for (int rank : group.peers())
    context.landing[size_t(rank)] = dispatch_landing(group, op.handle->counts, context.shape, rank);
  op.landing = context.landing[size_t(group.rank())];

  Outcome outcome = run_roles(op, make_dispatch_roles(context, writers_), epoch);
  if (outcome.kind != OutcomeKind::kDone) return outcome;
  op.output = grant_->split_front(op.landing.output_bytes);
  if (is_fresh)
    op.handle->records = grant_->split_front(op.landing.total_bytes - op.landing.records_offset);
  return outcome;
}

Outcome Executor::run_combine(Op& op, const ExchangeTable& table, uint64_t epoch) {
  const Group& group = mesh_.group();
  CombineContext context{&mesh_,
                         &proxy_,
                         &totals_,
                         op.handle.get(),
                         op.combine,
                         epoch,
                         config_.chunk_tokens,
                         config_.ring_bytes,
                         config_.chunk_bytes,
                         config_.hidden,
                         combine_slot(op, config_.hidden, config_.num_topk),
                         {},
                         {}};
  for (const ExchangeHeader& header : table.headers) context.grants.push_back(header.grant_offset);
  context.landing.resize(size_t(group.num_ranks()));
  for (int rank : group.peers())
    context.landing[size_t(rank)] =
        std::make_unique<CombineLanding>(group, op.handle->counts, context.slot.slot_bytes, rank);
  return run_roles(op, make_combine_roles(context, writers_), epoch);
}

Outcome Executor::run_roles(Op& op, std::vector<std::unique_ptr<Role>> roles, uint64_t epoch) {
  const char* name = op_name(op.kind);
  Phase phase;
  phase.roles = std::move(roles);
  phase.op_name = name;
  phase.num_running = config_.num_threads - 1;
  if (config_.num_threads > 1) {
    std::lock_guard<std::mutex> lock(mutex_);
    phase_ = &phase;
    phase_epoch_ = epoch;
    ++phase_number_;
    wake_.notify_all();
  }
  run_share(phase, 0, epoch);
  Backoff backoff(kMaxWaitSleepUs);
  // Partner: the release in help(). The helpers' deadlines end this wait.
  while (phase.num_running.load(std::memory_order_acquire) > 0) backoff.wait();
  count(phase, op);
  if (!phase.is_aborted.load(std::memory_order_acquire)) return outcome_of(OutcomeKind::kDone);
  for (const auto& role : phase.roles)
    if (!role->is_done() && role->waits_for().peer >= 0)
      return fault_outcome(name, role->name(), role->waits_for());
  return fault_outcome(name, "roles", {});
}

void Executor::help(int thread) {
  uint64_t seen = 0;
  for (;;) {
    Phase* phase;
    uint64_t epoch;
    {
      std::unique_lock<std::mutex> lock(mutex_);
      wake_.wait(lock, [&] { return phase_number_ != seen || (stop_ && !is_running_); });
      if (phase_number_ == seen) return;
      seen = phase_number_;
      phase = phase_;
      epoch = phase_epoch_;
    }
    run_share(*phase, thread, epoch);
    phase->num_running.fetch_sub(1, std::memory_order_release);  // partner: run_roles
  }
}

// The share of one thread. Other threads use the phase until all are back, so nothing is thrown.
void Executor::run_share(Phase& phase, int thread, uint64_t epoch) {
  try {
    if (step_roles(phase, thread, epoch)) return;
  } catch (const std::exception& error) {  // out of memory
    raise_failure(phase.op_name, error.what());
  }
  phase.is_aborted.store(true, std::memory_order_release);
}

void Executor::raise_failure(const char* name, const char* what) {
  FaultRecord fault;
  fault.kind = FaultKind::kTransport;
  fault.rank = mesh_.group().rank();
  fault.peer = fault.rank;
  fault.set_phase(name);
  fault.set_detail(what);
  board_.raise(fault);
}

// Steps the urgent roles among `mine`; true if anything moved.
bool Executor::step_urgent(const std::vector<Role*>& mine) {
  bool has_moved = false;
  for (Role* role : mine)
    if (role->is_urgent() && !role->is_done() && may_step(role->name()))
      has_moved |= role->timed_step();
  return has_moved;
}

// Steps this thread's roles until they are done (true) or the Runtime has a fault (false). Urgent
// roles get a turn after each step of another: a round of all others takes longer than the network
// needs for what is in flight.
bool Executor::step_roles(Phase& phase, int thread, uint64_t epoch) {
  std::vector<Role*> mine;
  for (size_t i = size_t(thread); i < phase.roles.size(); i += size_t(config_.num_threads))
    mine.push_back(phase.roles[i].get());
  Backoff backoff(kMaxWaitSleepUs);
  double last_progress = now_s();
  for (;;) {
    bool has_moved = step_urgent(mine);
    bool is_done = true;
    const Role* blocked = nullptr;
    for (Role* role : mine) {
      if (!role->is_urgent() && !role->is_done() && may_step(role->name()) && role->timed_step()) {
        has_moved = true;
        step_urgent(mine);
      }
      if (role->is_done()) continue;
      is_done = false;
      if (blocked == nullptr || blocked->waits_for().peer < 0) blocked = role;
    }
    if (is_done) return true;
    if (board_.raised()) return false;
    if (has_moved) {
      backoff.reset();
      last_progress = now_s();
      continue;
    }
    const double waited = now_s() - last_progress;
    if (waited > config_.timeout_s)
      raise_timeout(phase.op_name, blocked->name(), blocked->waits_for(), epoch, waited);
    backoff.wait();
  }
}

void Executor::raise_timeout(const char* name, const char* role, const Wait& wait, uint64_t epoch,
                             double waited_s) {
  FaultRecord fault;
  fault.kind = FaultKind::kTimeout;
  fault.rank = mesh_.group().rank();
  // A role that waits for nobody stands still by itself.
  fault.peer = wait.peer >= 0 ? wait.peer : fault.rank;
  fault.channel = wait.channel;
  fault.tag = epoch;
  fault.expected = wait.expected;
  fault.seen = wait.seen;
  fault.set_phase((std::string(name) + "/" + role).c_str());
  char text[sizeof fault.detail];
  std::snprintf(text, sizeof text, "no progress for %.1f s (limit %.1f s)", waited_s,
                config_.timeout_s);
  fault.set_detail(text);
  board_.raise(fault);
}

Outcome Executor::fault_outcome(const char* name, const char* role, const Wait& wait) const {
  Outcome outcome = outcome_of(OutcomeKind::kFault);
  outcome.fault = board_.record();
  outcome.waited_phase = std::string(name) + "/" + role;
  outcome.waited_peer = wait.peer;
  outcome.waited_channel = wait.channel;
  return outcome;
}

void Executor::count(const Phase& phase, Op& op) {
  for (const auto& role : phase.roles)
    if (role->begin_s() > 0) op.spans.push_back({role->name(), role->begin_s(), role->end_s()});
  std::lock_guard<std::mutex> lock(counters_mutex_);
  for (const auto& role : phase.roles) {
    RoleCounters& sum = counters_[role->name()];
    sum.rows += role->counters().rows;
    sum.bytes_read += role->counters().bytes_read;
    sum.bytes_written += role->counters().bytes_written;
  }
}

std::map<std::string, RoleCounters> Executor::counters() const {
  std::lock_guard<std::mutex> lock(counters_mutex_);
  return counters_;
}

}  // namespace commlib
