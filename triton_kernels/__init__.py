"""Triton kernels of selbp, installed as ``selbp.triton_kernels``; imported lazily, one file per operator."""
