"""The GPU executor for the ranks of one node: peer-mapped device memory, kernels compiled at first use."""
