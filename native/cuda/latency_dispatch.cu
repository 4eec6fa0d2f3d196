// Dispatch in the latency regime: send (own rows, counts) and take_in (rows that came, to their
// places). Send waits for nobody's rows, only for room: until the peers have begun what follows the
// operation before the last.
#include "cuda/latency_send.cuh"
#include "cuda/latency_take_in.cuh"

namespace commlib::cuda {

extern "C" __global__ void __launch_bounds__(384, 1)
    latency_dispatch(const __grid_constant__ Mesh mesh,
                     const __grid_constant__ LatencyRegions regions,
                     const __grid_constant__ LatencyDispatchCall call) {
  extern __shared__ __align__(128) uint8_t memory[];
  uint32_t* shared = reinterpret_cast<uint32_t*>(memory + call.shared_offset);
  const uint64_t* epochs = start_latency(mesh, regions);
  const uint64_t sent = epochs[kDispatchSent] + 1, received = epochs[kTakenIn] + 1;
  WarpMemory own = carve_rows(call.piece_bytes, call.cast, memory);
  if (threadIdx.x == 0 && is_faulty(mesh)) adopt_fault(mesh);
  if (call.phases & kSend) {
    // Loads go ahead; nothing is stored before there is room for it.
    const PartTasks tasks(call.num_tokens,
                          (call.in_row_bytes + call.piece_bytes - 1) / call.piece_bytes);
    SendTask first{};
    if (tasks.has_one()) {
      first = make_task(mesh, regions, call, tasks, sent);
      load_part(regions, call, own, first);
    }
    if (!wait_room(mesh, regions.dispatch_done, sent)) return own.pipe.abandon();
    const Caster caster(call, own);
    if (tasks.has_one()) send_part(mesh, regions, own, caster, first, sent);
    const Choices choices = gather_choices(mesh, regions, call, shared);
    send_messages(mesh, regions, call, choices, sent);
    if (*choices.error == ~0ull) {
      send_rows(mesh, regions, call, choices, own, caster, tasks, first, sent);
    } else {
      own.pipe.drain(caster);  // nobody will look at what has gone
    }
    __syncthreads();  // the choices are of no more use
  }
  if (call.phases & kReceive) {
    Places places;
    if (!read_messages(mesh, regions, call, shared, received, &places)) return;
    Intake intake(mesh, regions, call, own, received);
    if (!places.is_void) intake.begin(places);  // its loads pass the time
    settle_places(mesh, call, &places);
    if (places.is_void) {
      own.pipe.abandon();
    } else {
      intake.finish(places);
      clear_rest(mesh, call, places);
    }
  }
  finish_latency(mesh, regions, call.phases, kDispatchSent, kTakenIn, regions.dispatch_done);
}

}  // namespace commlib::cuda
