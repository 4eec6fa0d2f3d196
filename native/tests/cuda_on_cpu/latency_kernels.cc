// Dispatch in the latency regime on a CPU, all ranks at once; called by
// tests/unit/test_latency_kernels_on_cpu.py.
#include "cuda_on_cpu.hpp"
// Behind it, in this order: the kernel is written for what it defines.
#include "cuda/latency_dispatch.cu"

using commlib::cuda::LatencyDispatchCall;
using commlib::cuda::LatencyRegions;
using commlib::cuda::Mesh;

extern "C" void run_latency_dispatch(const Mesh* const* meshes, const LatencyRegions* regions,
                                     const LatencyDispatchCall* const* calls, int num_ranks,
                                     unsigned num_blocks, unsigned num_threads,
                                     size_t shared_bytes) {
  std::vector<std::function<void()>> kernels;
  for (int rank = 0; rank < num_ranks; ++rank)
    kernels.push_back([mesh = meshes[rank], regions, call = calls[rank]] {
      commlib::cuda::latency_dispatch(*mesh, *regions, *call);
    });
  cuda_on_cpu::launch_together(kernels, num_blocks, num_threads, shared_bytes);
}
