# The CUDA kernels' steps of .ci/run: run on the CPU, compiled for every architecture. No GPU is needed.

# emulator FOLDER SANITIZERS: builds it there.
emulator() {
  cmake -G Ninja -S . -B "$1" "-DPython_EXECUTABLE=$(command -v python)" -DALEXNET_EXT_EMULATOR=ON \
    "-DALEXNET_EXT_SANITIZE=$2" > "$work/log"
  cmake --build "$1" --target emulator > "$work/log" || { cat "$work/log"; return 1; }
  [ -e "$1/libalexnet_ext_emulator.so" ]
}

emulate() {
  enter cuda
  # The ops' own tests, by the emulated kernels. The suite at the end uses this emulator too.
  emulator build/emulator ""
  python -m pytest --emulated=random \
    $(op_tests _cuda_ops.cpp) tests/ops/test_{products,blocks}.py \
    -k 'not (values_and_gradients or ties) or (bfloat16 and (channels_last or sliced))'
  # Under sanitizers, which Python has to load first.
  emulator "$work/emulator" address,undefined
  ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so)" \
    python -m pytest tests/gpu_on_cpu/test_emulator.py --emulator "$work/emulator"
  rm -rf "$work/emulator"
}

# Registers, spills, stack, shared memory, 16-byte accesses and tensor cores of every kernel on every architecture. And
# the results of CUTLASS's kernels: the suite at the end lacks its headers.
budget() {
  enter cuda
  PYTHONPATH=$work/cutlass python -m tests.tools.cuda_budget --cutlass
  PYTHONPATH=$work/cutlass python -m pytest --part $part tests/gpu_on_cpu/test_ptx.py tests/gpu_on_cpu/test_ptx_hopper.py
  # What the kernels of a training step do, and a third of the others, counted and compared with the committed counts.
  PYTHONPATH=$work/cutlass python -m pytest -m slow -n0 --part $part tests/benchmarks/test_predict_gates.py
  python -m benchmarks.predict > "$work/log"
  grep 'images/s predicted' "$work/log"
}

plain_library() { # the kernels for C++: built, installed, and used by a program, with neither PyTorch nor Python
  local build=$work/plain program=$work/program tools=$work/tools name
  mkdir "$tools"
  for name in cmake ninja; do ln -s "$work/cuda/bin/$name" "$tools"; done
  for name in python python3; do printf '#!/bin/sh\necho "Python was asked for" >&2; exit 1\n' > "$tools/$name"; done
  chmod +x "$tools"/python*
  PATH=$tools:$system_path
  cmake -G Ninja -S . -B "$build" -DALEXNET_EXT_TORCH=OFF -DCMAKE_CUDA_ARCHITECTURES=90 > "$work/log"
  cmake --build "$build" > "$work/log" || { cat "$work/log"; return 1; }
  cmake --install "$build" --prefix "$work/prefix" | sed "s,$work/,,"
  cp -r examples/cpp "$program"
  cmake -G Ninja -S "$program" -B "$program/build" "-DCMAKE_PREFIX_PATH=$work/prefix" > "$work/log"
  cmake --build "$program/build" > "$work/log" || { cat "$work/log"; return 1; }
  ldd "$program/build/layers" > "$work/log"
  ! grep -iE 'torch|python|cuda' "$work/log" || return 1
  # The CUDA launchers are in it, GPU or not.
  nm -C "$program/build/layers" > "$work/log"
  grep -q ' alexnet_ext::local_response_norm_cuda(' "$work/log"
  grep -q ' alexnet_ext::relu_lrn_max_pool2d_cuda(' "$work/log"
  "$program/build/layers"
  rm -rf "$build" "$program" "$work/prefix" "$tools"
  enter cuda
}
