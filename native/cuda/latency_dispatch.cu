// Dispatch in the latency regime: send (own choices, own rows) and take_in (rows that came, to
// their places). Send waits for nobody's rows, only for room: until the peers have begun what
// follows the operation before the last.
#include "cuda/latency_send.cuh"
#include "cuda/latency_take_in.cuh"

namespace commlib::cuda {

extern "C" __global__ void __launch_bounds__(512, 1)
    latency_dispatch(const __grid_constant__ Mesh mesh,
                     const __grid_constant__ LatencyRegions regions,
                     const __grid_constant__ LatencyDispatchCall call) {
  uint8_t* memory = dynamic_shared();
  RowWarp own = carve_rows(call.piece_bytes, memory, call.shared_offset);
  const PartTasks tasks(call.phases & kSend ? call.num_tokens : 0, parts_of(call));
  // Loads go ahead; nothing is stored before there is room for it.
  SendTask first{};
  if (tasks.has_one()) {
    load_part(call, own, tasks);
    first = load_choices(mesh, call, tasks);
  }
  const uint64_t* epochs = start_latency(mesh, regions);
  const uint64_t sent = epochs[kDispatchSent] + 1, received = epochs[kTakenIn] + 1;
  const Choices choices(mesh, regions, memory + call.shared_offset);
  if (threadIdx.x == 0 && is_faulty(mesh)) adopt_fault(mesh);
  clear_choices(mesh, choices);
  if (call.phases & kSend) {
    const bool has_room = send_choices(
        mesh, regions, call, sent, [&] { return wait_room(mesh, regions.dispatch_done, sent); });
    if (!has_room) return own.pipe.abandon();
    send_rows(mesh, regions, call, own, tasks, first, sent);
  }
  if (call.phases & kReceive) {
    __syncthreads();  // the choices are clear
    if (!read_choices(mesh, regions, call, choices, received)) return;
    Places places(mesh, choices);
    if (places.end(mesh) > memory + dynamic_shared_bytes()) __trap();
    Intake intake(mesh, regions, call, choices, own, received);
    if (!places.is_bad) intake.find();  // its loads pass the time
    settle_places(mesh, regions, call, choices, received, &places);
    if (!places.is_void()) {
      intake.finish(places);
      clear_rest(mesh, call, places);
    }
  }
  finish_latency(mesh, regions, call.phases, kDispatchSent, kTakenIn, regions.dispatch_done);
}

}  // namespace commlib::cuda
