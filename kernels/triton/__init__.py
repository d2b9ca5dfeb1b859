"""Kernels for GPUs in Triton. They see tensors only as pointers, extents and strides."""
