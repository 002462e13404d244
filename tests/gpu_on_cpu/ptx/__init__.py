"""Runs compiled CUDA kernels on the CPU, instruction by instruction: what tensor cores would compute, with no GPU."""
