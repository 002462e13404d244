"""Runs compiled CUDA kernels on the CPU, instruction by instruction, tensor cores included; needs no GPU."""
