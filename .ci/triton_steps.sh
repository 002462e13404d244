# Steps about the Triton kernels. The plain suite runs them in Triton's interpreter and compiles a sample; here is the rest.

# Every kernel and configuration compiled for compute capability 8.0, 9.0 and 10.0, with no GPU: tensor cores, no spills,
# shared memory, 16-byte accesses, and torch.compile seeing the kernels.
triton_ahead() {
  enter cuda
  pytest tests/test_triton_ahead.py -m ahead
}
