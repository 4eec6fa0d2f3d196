// Combine, the source: one sum for every own token.
#pragma once

#include "cuda/sum.cuh"

namespace commlib::cuda {

__device__ inline Route load_route(const Mesh& mesh, const CombineCall& call, uint32_t token) {
  if (lane_id() >= mesh.num_topk || token >= call.num_tokens) return {-1, -1, -1, -1};
  return call.routes[uint64_t(token) * mesh.num_topk + lane_id()];
}

// Nothing came: nobody shall take what lies in `out` for a result.
template <typename T>
__device__ void fill_nan(const Mesh& mesh, const CombineCall& call) {
  const uint64_t first = blockIdx.x * blockDim.x + threadIdx.x, step = gridDim.x * blockDim.x;
  const uint32_t word = sizeof(T) == 2 ? 0x7fc07fc0u : 0x7fc00000u;
  const uint64_t words = uint64_t(call.num_tokens) * call.row_bytes / 4;
  for (uint64_t i = first; i < words; i += step) reinterpret_cast<uint32_t*>(call.out)[i] = word;
  if (call.out_weight_grads == nullptr) return;
  const uint64_t slots = uint64_t(call.num_tokens) * uint64_t(mesh.num_topk);
  for (uint64_t i = first; i < slots; i += step)
    call.out_weight_grads[i] = __uint_as_float(0x7fc00000u);
}

// Role: the own tokens, each as soon as its partial rows are here; ranks ascending.
template <typename T>
__device__ void final_reduce(const Mesh& mesh, const CombineCall& call, WarpMemory& own) {
  const int lane = lane_id();
  const Plan& plan = mesh.workspace->plan;
  Summer<T, false> sum(own.is_last, own.weights);
  Tickets tickets(&mesh.workspace->next_final);
  uint32_t token = tickets.take();
  Route route = load_route(mesh, call, token);
  while (token < call.num_tokens) {
    const uint32_t next_token = tickets.take();
    const Route next_route = load_route(mesh, call, next_token);
    const uint32_t same = __match_any_sync(0xffffffffu, route.rank >= 0 ? route.rank : -1 - lane);
    const bool is_first = route.rank >= 0 && __ffs(int(same)) - 1 == lane;
    const bool is_own = route.rank == mesh.rank, is_in_place = is_own && is_own_row_partial(call);
    bool has_come = true;
    if (is_first && !is_in_place)
      has_come = wait_arrived(mesh,
                              at<uint32_t>(mesh, mesh.rank, mesh.combine_arrived) +
                                  uint64_t(route.rank) * mesh.max_tokens + route.record,
                              plan.epoch, kFinalReduce, route.rank);
    if (!__all_sync(0xffffffffu, has_come)) break;
    fence_async_global();  // what the acquire made visible, before the bulk loads
    __syncwarp();
    uint8_t* out = call.out + uint64_t(token) * call.row_bytes;
    const uint8_t* partial = out;
    const float* grads = nullptr;
    if (is_in_place) {
      partial = call.y + uint64_t(route.row) * call.row_bytes;
      if (call.weight_grads != nullptr)
        grads = call.weight_grads + uint64_t(route.row) * uint64_t(mesh.num_topk);
    } else if (route.rank >= 0 && !is_own) {
      partial = plan.peer[route.rank].partial_in + uint64_t(route.record) * call.slot_bytes;
      grads = reinterpret_cast<const float*>(partial + call.row_bytes);
    }
    // Reduce has written those of the own rank where they belong.
    if (call.out_weight_grads != nullptr && lane < mesh.num_topk && (!is_own || is_in_place))
      call.out_weight_grads[uint64_t(token) * mesh.num_topk + lane] =
          grads == nullptr ? 0.0f : grads[lane];
    int from = 0;
    const int count = order_lanes(is_first ? route.rank : kNothing, &from);
    const uint64_t term = __shfl_sync(0xffffffffu, reinterpret_cast<uint64_t>(partial), from);
    for (uint32_t i = lane * 16; count == 0 && i < call.row_bytes; i += 512)
      *reinterpret_cast<uint4*>(out + i) = make_uint4(0, 0, 0, 0);
    sum_rows(0, call.row_bytes, own, sum, out, term, 1.0f, count);
    token = next_token;
    route = next_route;
  }
  own.pipe.drain(sum);
}

}  // namespace commlib::cuda
