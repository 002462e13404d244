# The CUDA kernels' steps of .ci/run: run on the CPU, compiled for every architecture. No GPU is needed.

emulate() { # the kernels' own source on the CPU, plain and under sanitizers, which Python has to load first
  enter cuda
  local sanitizers build runtime
  runtime="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so)"
  for sanitizers in "" address,undefined; do
    build=$work/emulator
    cmake -G Ninja -S . -B "$build" "-DPython_EXECUTABLE=$(command -v python)" -DALEXNET_EXT_EMULATOR=ON \
      "-DALEXNET_EXT_SANITIZE=$sanitizers" > "$work/log"
    cmake --build "$build" --target emulator > "$work/log" || { cat "$work/log"; return 1; }
    [ -e "$build/libalexnet_ext_emulator.so" ]
    LD_PRELOAD=${sanitizers:+$runtime} ASAN_OPTIONS=detect_leaks=0 \
      python -m pytest tests/test_emulator.py --emulator "$build" -rs
    # The ops' own tests, by the emulated kernels.
    LD_PRELOAD=${sanitizers:+$runtime} ASAN_OPTIONS=detect_leaks=0 \
      python -m pytest "--emulated=random" --emulator "$build" \
      tests/test_{local_response_norm,relu_max_pool2d,conv2d_bias_relu,blocks,relu_lrn_max_pool2d,relu_max_pool2d_lrn}.py \
      -k 'not (values_and_gradients or ties) or (bfloat16 and (channels_last or sliced))'
    rm -rf "$build"
  done
}

budget() { # registers, spills, stack, shared memory and 16-byte accesses of every kernel on every architecture
  enter cuda
  python tests/cuda_budget.py
}
