"""Kernels held to a standard without a GPU: compiled ahead of time, their machine code read, their PTX run in numpy."""
