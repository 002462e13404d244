# Steps about the Triton kernels. The plain suite runs them in Triton's interpreter and compiles a sample; these steps do the rest.

# Every kernel and configuration compiled for compute capability 8.0, 9.0 or 10.0, as the commit picks, with no GPU:
# tensor cores, no spills, shared memory, 16-byte accesses, and torch.compile seeing the kernels. The results of those for
# 8.0 and 9.0, on the CPU.
triton_ahead() {
  enter cuda
  pytest tests/gpu_on_cpu/test_triton_ahead.py tests/gpu_on_cpu/test_ptx_triton.py -m slow -n0 --part $part
}

# Both leave a core idle most of the time, so they share the two.
faults_and_triton_ahead() {
  triton_ahead > "$work/ahead" 2>&1 &
  local beside=$!
  planted_faults
  wait $beside || { cat "$work/ahead"; return 1; }
  cat "$work/ahead"
}
