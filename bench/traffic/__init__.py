"""Counted memory traffic of the Triton kernels, without a GPU."""
