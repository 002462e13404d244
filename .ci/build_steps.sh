# The build's steps of .ci/run: what is installed where, and every way to build that must work.

cuda_environment() {
  python3 -m venv "$work/cuda"
  enter cuda
  pip install -qq --upgrade pip
  pip install -qq torch==2.14.1 torchvision==0.29.1
  pip install -qq 'setuptools>=77' 'cmake>=3.26' 'ninja>=1.11' numpy
}

environments() {
  python3 -m venv "$work/cpu"
  enter cpu
  pip install -qq --upgrade pip
  pip install -qq torch==2.13.0 ${TORCH_CPU_INDEX:+--index-url "$TORCH_CPU_INDEX"}
  pip install -qq 'setuptools>=77' 'cmake>=3.26' 'ninja>=1.11' numpy 'pytest>=8' 'hypothesis>=6.100' 'pytest-benchmark>=4' \
    'pytest-xdist>=3.6'
  python -c 'import torch; assert torch.version.cuda is None, f"{torch.__version__} is no CPU build"'
  cuda_environment
  # CUTLASS's headers, for the steps that need them; an isolated build installs its own.
  pip install -qq --no-deps --target "$work/cutlass" 'nvidia-cutlass>=4.2,<5'
  python -c 'import torch; assert torch.version.cuda, f"{torch.__version__} is no CUDA build"'
  command -v nvcc > /dev/null || { echo "nvcc is not on PATH: the CUDA kernels cannot be compiled"; return 1; }
}

# wheel ENVIRONMENT: builds one without isolation, in $work/wheels/ENVIRONMENT.
wheel() {
  enter "$1"
  PYTHONPATH=$work/cutlass pip wheel -qq . --no-build-isolation --no-deps --wheel-dir "$work/wheels/$1"
  local file
  file=$(basename "$work/wheels/$1"/*.whl)
  case $file in
    alexnet_ext-*-py3-none-linux_x86_64.whl) echo "$file" ;;
    *) echo "the wheel is named $file"; return 1 ;;
  esac
  python -m zipfile --list "$work/wheels/$1/$file" | grep -o 'alexnet_ext/lib[^ ]*' | sort > "$work/wheels/$1/libraries"
  cat "$work/wheels/$1/libraries"
}

wheels() {
  # In a folder without any part of a toolkit.
  mkdir "$work/wrapper"
  printf '#!/bin/sh\nexec "%s" "$@"\n' "$(command -v nvcc)" > "$work/wrapper/nvcc"
  chmod +x "$work/wrapper/nvcc"
  local before=$system_path
  system_path=$work/wrapper:$before
  wheel cuda
  system_path=$before
  diff "$work/wheels/cuda/libraries" <(printf 'alexnet_ext/libalexnet_ext_%s.so\n' cpu cuda)
  # Built second in the same tree: no file of the first build may be left in it.
  wheel cpu
  diff "$work/wheels/cpu/libraries" <(printf 'alexnet_ext/libalexnet_ext_%s.so\n' cpu)
}

# smoke ENVIRONMENT WHEEL LIBRARY...: the wheel in this environment; the libraries must load, every op equal stock.
smoke() {
  enter "$1"
  pip install -qq --force-reinstall --no-deps "$work/wheels/$2"/*.whl
  pip install -qq "$work/wheels/$2"/*.whl # what it depends on
  pip check
  (cd "$work" && python -I "$root/.ci/smoke.py" "${@:3}")
}

wheels_run() {
  smoke cpu cpu cpu
  smoke cuda cpu cpu
  smoke cuda cuda cpu cuda
  (cd "$work" && alexnet info) > "$work/info"
  grep 'cutlass *loaded' "$work/info"
  smoke cpu cuda cpu
}

ops_under_the_other_torch() {
  enter cpu
  # Away from the source tree, so that the installed wheel is tested.
  mkdir "$work/ops"
  cp -r tests pyproject.toml "$work/ops"
  (
    cd "$work/ops"
    python -c 'import alexnet_ext, sys; assert alexnet_ext.__file__.startswith(sys.prefix), alexnet_ext.__file__'
    # One dtype and three layouts of the large grid, and all other tests.
    pytest $(op_tests _ops.cpp) tests/ops/test_{products,blocks}.py \
      -k 'not (values_and_gradients or ties) or (float32 and (contiguous or channels_last or sliced))'
  )
  rm -rf "$work/ops"
}

# without_nvcc_on_path COMMAND...: runs it where no nvcc is found.
without_nvcc_on_path() {
  local path="" folder
  local -a folders
  IFS=: read -ra folders <<< "$PATH"
  for folder in "${folders[@]}"; do [ -x "$folder/nvcc" ] || path+=${path:+:}$folder; done
  PATH=$path "$@"
}

without_nvcc() {
  enter cuda
  pip uninstall -qq -y alexnet_ext
  without_nvcc_on_path pip install -qq -e . --no-build-isolation
  alexnet info | tee "$work/info"
  grep -q 'cuda  *not loaded: PyTorch .* is a CUDA build, but no working nvcc was found' "$work/info"
  grep -q 'to mend it: put the nvcc of a CUDA toolkit on PATH, then: pip install -e . --no-build-isolation' "$work/info"
  [ ! -e alexnet_ext/libalexnet_ext_cuda.so ]
  python -I .ci/smoke.py cpu
  echo "Now as the remedy says, and without CUTLASS's headers:"
  pip install -qq -e . --no-build-isolation --no-deps
  python -I .ci/smoke.py cpu cuda
  alexnet info > "$work/info"
  grep -A1 'cutlass *not loaded: .*nvidia-cutlass is not installed' "$work/info"
}

# editable [NAME=VALUE...]: an editable install; ninja's output, one line a step, goes to $work/log.
editable() { env "$@" NINJA_STATUS='[%f/%t, %r running] ' pip install -v -e . --no-build-isolation --no-deps > "$work/log" 2>&1; }

compiled() { grep -cE '^ *\[[0-9]+/[0-9]+, [0-9]+ running\] Building' "$work/log" || true; }
linked() { grep -cE '^ *\[[0-9]+/[0-9]+, [0-9]+ running\] Linking' "$work/log" || true; }
running_at_most() { grep -oE ', [0-9]+ running' "$work/log" | grep -oE '[0-9]+' | sort -n | tail -1; }

rebuild() {
  enter cuda
  editable
  editable
  echo "nothing touched: $(compiled) files compiled"
  [ "$(compiled)" = 0 ]

  local kernel=csrc/conv2d_bias_relu/conv2d_bias_relu_cpu.cpp jobs
  for jobs in 1 2; do
    touch $kernel
    editable MAX_JOBS=$jobs
    echo "$kernel touched, MAX_JOBS=$jobs: $(compiled) files compiled, $(linked) linked, $(running_at_most) at a time"
    grep 'Building CXX' "$work/log"
    # One source, once for each of three instruction sets.
    [ "$(compiled)" = 3 ]
    [ "$(grep -c 'Building CXX.*conv2d_bias_relu_cpu.cpp' "$work/log")" = 3 ]
    [ "$(linked)" = 1 ]
    [ "$(running_at_most)" = $jobs ]
  done

  local broken=csrc/conv2d_bias_relu/broken_cpu.cpp failed=0
  echo 'int broken = "no number";' > $broken
  editable || failed=1
  rm $broken
  [ $failed = 1 ] || { echo "a file that does not compile was no error"; return 1; }
  grep -m1 'broken_cpu.cpp:1:.*error: invalid conversion' "$work/log"
  grep -m1 'alexnet_ext did not compile: the message above says why' "$work/log"
  ! grep Traceback "$work/log" || return 1
}

planted_faults() {
  enter cuda
  PYTHONPATH=$work/cutlass python -m tests.tools.mutation $third
}
