"""Triton kernels for GPUs. Nothing here imports Triton until a call needs it."""
