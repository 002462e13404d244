"""``python tests/mutation.py``: do the tests notice a fault? Plants faults in the kernels.

Each fault is an exact replacement of text in a temporary copy of the tree, alone there. What depends on it is rebuilt
(for the portable instruction set alone, which holds the same code), and the op's plain C++ test must fail, or, where
the fault lies in front of the kernels or in CUDA's, the named tests of pytest. Exit code 1 when a fault survives, or
can no longer be planted.

    python tests/mutation.py [NAME ...]     # only the faults whose name holds one of the words
"""

from __future__ import annotations

import os
import queue
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LRN = "csrc/local_response_norm/local_response_norm_rows.h"
POOL = "csrc/relu_max_pool2d/relu_max_pool2d_rows.h"
VECTOR = "csrc/common/cpu_vector.h"
LINEAR = "csrc/linear_bias_relu/linear_bias_relu_cpu.cpp"
AUGMENT = "csrc/augment/augment_cpu.cpp"
CUDA_AUGMENT = "csrc/augment/augment_kernels.cuh"
BIAS = "csrc/common/cpu_bias.h"
CUDA_LRN = "csrc/local_response_norm/local_response_norm_window.cuh"
CUDA_SUMS = "csrc/common/channel_sums.cuh"
CUTLASS = "csrc/conv2d_bias_relu/conv2d_cutlass.cuh"
CUTLASS_APPLIES = "alexnet_ext/ops/conv2d_bias_relu/cutlass.py"
SM90 = "csrc/conv2d_bias_relu/conv2d_sm90.cuh"
SM90_WEIGHT = "csrc/conv2d_bias_relu/weight_gradient_sm90.cuh"
SURVEY, CALLS = "alexnet_ext/accelerate/survey.py", "alexnet_ext/accelerate/calls.py"
WATCH, TRACING = "alexnet_ext/accelerate/watch.py", "alexnet_ext/accelerate/tracing.py"
DRAWN = "tests/test_accelerate_generated.py -k 'before and {}'"
BY_MODULES, BY_FX = DRAWN.format("modules"), DRAWN.format("fx")
# These need nvcc and CUTLASS's headers.
PTX, SM90_PTX = "tests/test_ptx.py::test_", "tests/test_ptx_hopper.py::test_"
WINOGRAD = "csrc/conv2d_bias_relu/winograd_cpu.cpp"
EMULATOR = "tests/test_emulator.py"
SECONDS = 240  # a fault may make a loop endless
MOST_TREES = 4  # copies of the tree, in each of which one fault stands at a time


@dataclass(frozen=True)
class Fault:
    """One planted fault, and the test that must notice it: a C++ test's op, or pytest's arguments."""

    name: str
    file: str
    old: str
    new: str
    test: str
    times: int = 1


FAULTS = (
    Fault("LRN: window of even n mirrored", LRN, "return data - before_ * step;", "return data - after_ * step;",
          "local_response_norm"),
    Fault("LRN: window shifted by one", LRN, "window(windows + f, step)", "window(windows + f + step, step)",
          "local_response_norm", 2),
    Fault("LRN: last channel of the window left out", LRN, "j <= before_ + after_", "j < before_ + after_",
          "local_response_norm"),
    Fault("LRN: backward's mirror dropped", LRN, "terms + f - after_ * step", "terms + f - before_ * step",
          "local_response_norm"),
    Fault("LRN: alpha not divided by n", LRN, "static_cast<A>(lrn_.alpha / static_cast<double>(lrn_.size))",
          "static_cast<A>(lrn_.alpha)", "local_response_norm", 2),
    Fault("LRN: backward's factor not divided by n", LRN,
          "2 * lrn_.alpha * lrn_.beta / static_cast<double>(lrn_.size)", "2 * lrn_.alpha * lrn_.beta",
          "local_response_norm"),
    Fault("LRN: 0 * inf flows through beta = 0", LRN, "if (lrn_.beta == 0)", "if (false)", "local_response_norm"),
    Fault("LRN: last tile not cut short", "csrc/local_response_norm/local_response_norm_cpu.cpp",
          "left < kLrnTile ? left : kLrnTile", "kLrnTile", "local_response_norm"),
    Fault("pool: >= for >, the last of equal values wins", POOL, "(v > value) | (v != v)", "(v >= value) | (v != v)",
          "relu_max_pool2d"),
    Fault("pool: NaN skipped", POOL, "(v > value) | (v != v)", "(v > value)", "relu_max_pool2d"),
    # 0 instead of -inf would be right here: the maximum starts at ReLU's 0.
    Fault("pool: padding holds a value that can win", POOL, "to[i] = -INFINITY", "to[i] = 1", "relu_max_pool2d"),
    Fault("pool: window without a winner gives tap 0", POOL, "broadcast<Int<A>>(kNoWinner)", "broadcast<Int<A>>(0)",
          "relu_max_pool2d"),
    Fault("pool: zero loses its sign", POOL, "value = floor ? (v == 0 ? v : Vec<A>{}) : v;",
          "value = floor ? Vec<A>{} : v;", "relu_max_pool2d"),
    Fault("pool: row stride taken for the column's", POOL, "oh * pool_.stride[0] - pool_.padding[0]",
          "oh * pool_.stride[1] - pool_.padding[0]", "relu_max_pool2d"),
    Fault("pool: dilation of columns ignored", POOL, "first + s * dilation", "first + s", "relu_max_pool2d"),
    Fault("pool: padding of rows ignored backward", POOL, "ih + pool_.padding[0] - r", "ih - r", "relu_max_pool2d"),
    Fault("pool: rows of the unit before are kept", POOL, "cache_.clear();\n    for (int64_t oh",
          "for (int64_t oh", "relu_max_pool2d"),
    Fault("pool: even and odd columns of the gradient traded", POOL, "*even = sums + columns_.residue[0] * apart",
          "*even = sums + columns_.residue[1] * apart", "relu_max_pool2d"),
    Fault("pool: rows used where they stand though a vector is cut", "csrc/relu_max_pool2d/relu_max_pool2d_cpu.cpp",
          "s.channels_last && s.channels % kLanes<A> == 0", "s.channels_last", "relu_max_pool2d"),
    Fault("pool: last group of planes not cut short", "csrc/relu_max_pool2d/relu_max_pool2d_cpu.cpp",
          "left < kPlanes ? left : kPlanes", "kPlanes", "relu_max_pool2d"),
    Fault("pool: bands overlap", "csrc/relu_max_pool2d/relu_max_pool2d.h",
          "first + rows < s.height ? first + rows : s.height", "s.height", "relu_lrn_max_pool2d"),
    Fault("ReLU: NaN turned to 0", "csrc/conv2d_bias_relu/conv2d_bias_relu_cpu.cpp", "widen(values[i]) <= 0 ?",
          "!(widen(values[i]) > 0) ?", "conv2d_bias_relu"),
    Fault("ReLU: gradient 1 at 0", "csrc/conv2d_bias_relu/conv2d_bias_relu_cpu.cpp", "widen(result[i]) <= 0 ?",
          "widen(result[i]) < 0 ?", "conv2d_bias_relu"),
    Fault("Winograd: infinity passes for finite", WINOGRAD, "void look(const V& v) { zeros_ += v * 0.0f; }",
          "void look(const V&) {}", "winograd"),
    Fault("Winograd: tiles of the gradient overwrite one another", WINOGRAD, "load(to) + tile[q]", "tile[q]",
          "winograd"),
    Fault("Winograd: padding of the rows taken for the columns'", WINOGRAD, "w = j * 2 - p.padding[1]",
          "w = j * 2 - p.padding[0]", "winograd"),
    Fault("Winograd: a reference to the products is never given back", "csrc/conv2d_bias_relu/winograd_plan.h",
          "torch::stable::detail::to<Tensor>(stack[0]);", "", "tests/test_runtime.py -k 'given_back and 96'"),
    Fault("Winograd: weight's gradient of the first images alone", WINOGRAD, "part < parts", "part < 1",
          "tests/test_conv2d_bias_relu.py -k 'many_tiles and padding1'"),
    Fault("linear: a row left over from the tiles not computed", LINEAR, "for (; i < rows; ++i) tile<1, V>",
          "for (; i < rows - 1; ++i) tile<1, V>", "linear_bias_relu"),
    Fault("linear: blocks of the sum overwrite one another", LINEAR, "add ? load(place) + sum[r][v] : sum[r][v]",
          "sum[r][v]", "linear_bias_relu"),
    Fault("linear: NaN turned to 0", LINEAR, "row[i] = z <= 0 ?", "row[i] = !(z > 0) ?", "linear_bias_relu"),
    Fault("linear: every chunk of vectors reads the first", LINEAR, "b + column, b_step", "b, b_step",
          "linear_bias_relu"),
    Fault("boundary: rows of any strides taken for dense", "csrc/linear_bias_relu/linear_bias_relu_ops.cpp",
          "return torch::stable::contiguous(t);", "return t;",
          "tests/test_linear_bias_relu.py -k 'values_and_gradients and transposed and float32'"),
    Fault("block: ReLU's mask dropped", "csrc/relu_lrn_max_pool2d/relu_lrn_max_pool2d_cpu.cpp",
          "mask<A>(gradient, activation, row_size);", "", "relu_lrn_max_pool2d"),
    Fault("block: bias left out of the recomputed activation",
          "csrc/relu_lrn_max_pool2d/relu_lrn_max_pool2d_cpu.cpp",
          "add_bias(row, static_cast<const T*>(bias), p.in);", "", "relu_lrn_max_pool2d"),
    Fault("bias: one channel's added to all (channels-last)", BIAS, "+= widen(bias[i]);\n    return",
          "+= widen(bias[0]);\n    return", "relu_max_pool2d_lrn"),
    Fault("bias gradient: tail of a row not summed", BIAS, "for (; j < s.width; ++j) sum += values[j];", "",
          "relu_lrn_max_pool2d"),
    Fault("augment: a flipped crop begins at its left", AUGMENT, "+ (in.flips[image] ? p.size - 1 : 0)", "", "augment"),
    Fault("augment: the shift of the image before", AUGMENT, "if (unit / p.out.height != image)", "if (image < 0)",
          "augment"),
    Fault("augment: padding holds what was there", AUGMENT, "r < rows ? p.size : 0", "padded", "augment"),
    Fault("augment: colours and taps traded", AUGMENT, "c * (B * B) + r * B", "c + r * B * kColours", "augment"),
    Fault("boundary: an offset below zero is let through", "csrc/augment/augment_ops.cpp", "top >= 0 && ", "",
          "tests/test_augment.py -k out_of_range"),
    Fault("bf16: truncated, not rounded", VECTOR, "(bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16", "bits >> 16",
          "relu_max_pool2d_lrn"),
    Fault("fp16: ties rounded up, not to even", VECTOR, "0xfffu + ((magnitude >> 13) & 1u)", "0x1000u",
          "relu_max_pool2d_lrn"),
    Fault("fp16: subnormals read as 0", VECTOR, "uint32_t scaled = to_bits(from_bits(magnitude) * 0x1p112f);",
          "uint32_t scaled = magnitude < 0x800000u ? 0 : to_bits(from_bits(magnitude) * 0x1p112f);",
          "local_response_norm"),
    Fault("boundary: ceil_mode ignored", "csrc/relu_max_pool2d/relu_max_pool2d.h",
          "if (ceil_mode) reach += pool.stride[i] - 1;", "",
          "tests/test_relu_max_pool2d.py -k sizes"),
    Fault("boundary: a last window in the right padding is kept", "csrc/relu_max_pool2d/relu_max_pool2d.h",
          "ceil_mode && (length - 1) * pool.stride[i] >= side + pool.padding[i] ? length - 1 : length", "length",
          "tests/test_relu_max_pool2d.py -k sizes"),
    Fault("boundary: LRN takes any gradient for dense", "csrc/local_response_norm/local_response_norm_plan.h",
          "launch(p, with_strides_of(dx, dy), in, dx);", "launch(p, dy, in, dx);",
          "tests/test_citizen.py -k 'gradients_of_any_layout and local_response_norm and float32'"),
    Fault("boundary: images of any strides taken for dense", "csrc/common/tensor.h",
          "if (x.size(i) <= 1 || x.stride(i) == strides[i]) continue;", "continue;",
          "tests/test_relu_max_pool2d.py -k 'values_and_gradients and sliced and float32'"),
    Fault("boundary: the mask takes any gradient for dense", "csrc/conv2d_bias_relu/conv2d_bias_relu_ops.cpp",
          "gradient = with_strides_of(dz, dy)", "gradient = dy",
          "tests/test_citizen.py -k 'gradients_of_any_layout and conv2d_bias_relu and float32'"),
    Fault("conv: the mask of a ReLU that was left out", "csrc/conv2d_bias_relu/conv2d_bias_relu_ops.cpp",
          "relu ? masked(dy, y) : dy", "masked(dy, y)",
          "tests/test_conv2d_bias_relu.py -k 'values_and_gradients and reluFalse and float32'"),
    Fault("boundary: bias gradient of the first band alone", "csrc/relu_lrn_max_pool2d/block.h", "u < units_", "u < 1",
          "tests/test_relu_lrn_max_pool2d.py -k 'values_and_gradients and contiguous and float32'"),
    Fault("CUDA: no barrier between filling a tile and pooling it",
          "csrc/relu_lrn_max_pool2d/relu_lrn_max_pool2d_kernels.cuh", "__syncthreads();\n    const int height",
          "const int height", f"{EMULATOR} -k 'relu_lrn_max_pool2d and float32 and channels_last'"),
    Fault("CUDA: no barrier before a block's next tile",
          "csrc/relu_max_pool2d_lrn/relu_max_pool2d_lrn_kernels.cuh", "__syncthreads();\n  }\n  sum_owners",
          "}\n  sum_owners", f"{EMULATOR} -k 'relu_max_pool2d_lrn and (order or many)'"),
    Fault("CUDA: no barrier before neighbours' terms are added up",
          CUDA_LRN, "__syncthreads();\n    const auto add", "const auto add",
          f"{EMULATOR} -k 'order and local_response_norm'"),
    Fault("CUDA: no barrier before the next neighbours' terms", CUDA_LRN,
          "add(own.lane - before + total, total);\n    __syncthreads();", "add(own.lane - before + total, total);",
          f"{EMULATOR} -k 'order and 70x'"),
    Fault("CUDA: the last term of a window left out", CUDA_LRN, "own.lane + after + 1", "own.lane + after",
          f"{EMULATOR} -k 'values and relu_lrn_max_pool2d and float64 and channels_last'"),
    Fault("CUDA: terms in front of a block's channels left out", CUDA_LRN,
          "add(own.lane - before + total, total);", "",
          f"{EMULATOR} -k 'values and relu_max_pool2d_lrn and float64 and contiguous'"),
    Fault("CUDA: no barrier before rows are added up", CUDA_SUMS,
          "shared[threadIdx.x] = sum;\n  __syncthreads();\n  if (run", "shared[threadIdx.x] = sum;\n  if (run",
          f"{EMULATOR} -k 'order and conv2d_bias_relu'"),
    Fault("CUDA: outer lanes of a warp write too", CUDA_LRN,
          "lane > 0 && lane < kWarp - 1 && v < vectors", "v < vectors",
          f"{EMULATOR} -k 'order and local_response_norm'"),
    Fault("CUDA: the window reaches into the next pixel", CUDA_LRN, "last ? 0 : behind", "behind",
          f"{EMULATOR} -k 'values and local_response_norm and float32 and channels_last'"),
    Fault("CUDA: chunks of channels without their ends", CUDA_LRN, "c = first - kHalf;", "c = first;",
          f"{EMULATOR} -k 'values and local_response_norm and float32 and contiguous'"),
    Fault("CUDA: NaN skipped", "csrc/relu_max_pool2d/relu_max_pool2d_window.cuh", "|| v[i] != v[i]", "",
          f"{EMULATOR} -k 'to_the_bit and float32 and not augment'"),
    Fault("CUDA: one plane's bias added to the next", "csrc/conv2d_bias_relu/conv2d_bias_relu_kernels.cuh",
          "j < left ? own : next", "own", f"{EMULATOR} -k 'conv2d_bias_relu and float32'"),
    Fault("CUDA: what of 16 bytes lies in the next row is left out", CUDA_AUGMENT, "done += left;", "done += V;",
          f"{EMULATOR} -k 'augment and float32'"),
    Fault("CUDA: an offset out of range is followed", CUDA_AUGMENT, "offset > most ? most", "offset > most ? offset",
          f"{EMULATOR} -k 'augment and inside'"),
    Fault("CUDA: reciprocal rounded down", "csrc/common/images.cuh", "static_cast<uint64_t>(divisor) + 1",
          "static_cast<uint64_t>(divisor)", f"{EMULATOR} -k 'to_the_bit and float32 and not augment'"),
    Fault("CUTLASS: a group's strides for the whole tensor's", CUTLASS, "p.height, p.width, p.channels)",
          "p.height, p.width, p.group_channels())", f"{PTX}forward[bf16]"),
    Fault("CUTLASS: a ReLU that loses NaN", CUTLASS, "sums[i] < least ? least : sums[i]",
          "sums[i] > least ? sums[i] : least", f"{PTX}forward[bf16]"),
    Fault("CUTLASS: taps in reverse order", CUTLASS, "Mode::kCrossCorrelation", "Mode::kConvolution",
          f"{PTX}forward[bf16]"),
    Fault("CUTLASS: every pixel with a bias of its own", CUTLASS, "first.y, {0, 0, 0})", "first.y, layout_of_y(p))",
          f"{PTX}forward[bf16]"),
    Fault("CUTLASS: each group with the first one's bias", CUTLASS, "slice<E>(bias, first.y,", "slice<E>(bias, 0,",
          f"{PTX}forward[bf16]"),
    Fault("CUTLASS: pixels summed up once a split", CUTLASS, "problem_of_group(p, weight_gradient_splits(p))",
          "problem_of_group(p)", f"{PTX}weight_gradient[bf16]"),
    Fault("CUTLASS: gradients of weights in the first group's place", CUTLASS, "(dweight) + first.weight", "(dweight)",
          f"{PTX}weight_gradient[bf16]"),
    Fault("CUTLASS for 9.0: a group's strides for the whole tensor's", SM90,
          "strides(p.out_height, p.out_width, p.filters)", "strides(p.out_height, p.out_width, p.group_filters())",
          f"{SM90_PTX}input_gradient[f16]"),
    Fault("CUTLASS for 9.0: padding of rows for columns", SM90, "padding{n(p.padding[0]), n(p.padding[1])}",
          "padding{n(p.padding[1]), n(p.padding[0])}", f"{SM90_PTX}input_gradient[f16]"),
    Fault("9.0: boxes freed while they are multiplied", SM90_WEIGHT, "warpgroup_wait<1>", "warpgroup_wait<2>",
          f"{SM90_PTX}weight_gradient[bf16]"),
    Fault("9.0: the next group's channels stored", SM90_WEIGHT, "channel + n < work.channels", "true",
          f"{SM90_PTX}weight_gradient[bf16]"),
    Fault("CUTLASS for 9.0: elsewhere", CUTLASS_APPLIES, "capability(x) == HOPPER", "capability(x) >= HOPPER",
          "tests/test_cutlass.py -k own_devices"),
    Fault("CUTLASS: TF32 where the flags forbid it", CUTLASS_APPLIES, 'precision(x.dtype) != "tf32"',
          "x.dtype != torch.float32", "tests/test_cutlass.py -k dtypes"),
    Fault("CUTLASS: the gradient of x with a stride", CUTLASS_APPLIES,
          "direction != Direction.INPUT or stride == [1, 1]", "True", "tests/test_cutlass.py -k where_it_applies"),
    Fault("accelerate: a ReLU in place behind whatever layer", SURVEY,
          "if before is None or type(before) not in RETURN_NEW:", "if before is None:", BY_MODULES),
    Fault("accelerate: a ReLU in place behind a layer with hooks", SURVEY,
          "if has_hooks(before) or is_replaced(before):", "if is_replaced(before):", BY_MODULES),
    Fault("accelerate: layers that are run one by one", SURVEY,
          'if reason := known.opened.get(places[0].parent, ""):', "if reason := '':", BY_MODULES),
    Fault("accelerate: the same where no trace shows it", SURVEY, "readers.taken_apart(model, {",
          "readers.taken_apart(nn.Module(), {", BY_FX),
    Fault("accelerate: a layer that another method runs alone", SURVEY,
          "return _used_elsewhere(known, places) or _over", "return _over", BY_FX),
    Fault("accelerate: a layer by its second name", TRACING,
          "place.parent._modules[place.key] = module = twin", "pass", BY_FX),
    Fault("accelerate: what a forward does besides, done once", WATCH, "sys.setprofile(self)", "pass", BY_FX),
    Fault("accelerate: what a forward changes, changed once", WATCH, "in FORBIDDEN.items():", "in ():", BY_FX),
    Fault("accelerate: LRN's learned constants taken for numbers", CALLS, "fixed = not any(", "fixed = True or any(",
          BY_FX),
    Fault("accelerate: ReLU moved behind what writes into its input", CALLS, "graph.inserting_before(relu)",
          "graph.inserting_before(node)", BY_FX),
    Fault("accelerate: a ReLU in place whose input is read", CALLS, "or len(given.users) != 1:", "or False:", BY_FX),
    Fault("tune: unproven kernels measured", "alexnet_ext/selfcheck/tune.py",
          " and _is_right(op, backend, device)]", "]", "tests/test_tuning.py -k wrong_here"),
    Fault("auto: another device's choice", "alexnet_ext/ops/_choices.py", " | {device_name(device)} | ", " | ",
          "tests/test_tuning.py -k 'choices_are_of_one or auto_follows'"),
)  # fmt: skip


class Tree:
    """The copy of the tree that faults are planted in, and its build folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "tree"
        self.build = folder / "build"
        kept_out = (".*", "build", "dist", "runs", "predictions", "*.so", "__pycache__", "*.egg-info")
        shutil.copytree(ROOT, self.folder, ignore=shutil.ignore_patterns(*kept_out))
        # cmake and ninja of this Python before those of the distribution, which may be too old.
        self.path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self._run(
            [
                *("cmake", "-G", "Ninja", "-S", str(self.folder), "-B", str(self.build)),
                *(f"-DPython_EXECUTABLE={sys.executable}", f"-DALEXNET_EXT_OUTPUT={self.folder / 'alexnet_ext'}"),
                *("-DALEXNET_EXT_TESTS=ON", "-DALEXNET_EXT_EMULATOR=ON"),
                *("-DCMAKE_BUILD_TYPE=None", "-DCMAKE_CXX_FLAGS=-O1"),
                # Named as a target of its own, the machine is none that CMakeLists.txt knows instruction sets for.
                *("-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=portable"),
            ],
            "the tree does not configure",
        )

    def _run(self, command: list[str], failure: str) -> None:
        # No nvcc: the CUDA kernels run on the CPU here.
        environment = {**os.environ, "CUDACXX": "none", "PATH": self.path}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise SystemExit(f"{failure}:\n{done.stdout[-4000:]}{done.stderr[-4000:]}")

    def make(self, test: str) -> list[str]:
        """Builds what ``test`` needs, and no more; the command that runs it."""
        ninja = ["ninja", "-C", str(self.build)]
        if test.startswith("tests/"):
            targets = ["cpu", "emulator"] if test.startswith(EMULATOR) else ["cpu"]
            self._run([*ninja, *targets], f"{test}: the library does not compile")
            options = ("-x", "-n0", "-p", "no:cacheprovider", "--emulator", str(self.folder / "alexnet_ext"))
            return [sys.executable, "-m", "pytest", *options, *shlex.split(test)]
        # One kernel's file of all those that ctest's program links: the others may depend on the fault's file too.
        (kernel,) = self.folder.glob(f"csrc/*/{test}_cpu.cpp")
        objects = [
            f"CMakeFiles/test_{test}.dir/tests/cpp/test_{test}.cpp.o",
            f"CMakeFiles/cpu_kernels_portable.dir/{kernel.relative_to(self.folder)}.o",
            "CMakeFiles/cpu_kernels.dir/csrc/common/isa.cpp.o",
        ]
        program = str(self.build / f"one_{test}")
        self._run([*ninja, *objects], f"{test} does not compile")
        self._run(["c++", "-pthread", "-o", program, *(str(self.build / name) for name in objects)], "does not link")
        return [program]

    def notices(self, test: str) -> str:
        """Builds what ``test`` needs and runs it; how it noticed a fault, "" when it passed."""
        command = self.make(test)
        try:
            done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True, timeout=SECONDS)
        except subprocess.TimeoutExpired:
            return f"no end after {SECONDS} s"
        if done.returncode == 0:
            return ""
        if done.returncode < 0:
            return f"stopped by signal {-done.returncode}"
        lines = [line for line in done.stdout.splitlines() if line.startswith("FAILED ")]
        if done.returncode != 1 or not lines:
            raise SystemExit(f"{' '.join(command)} did not run:\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
        return lines[0].removeprefix("FAILED ")

    @contextmanager
    def planted(self, fault: Fault) -> Iterator[None]:
        path = self.folder / fault.file
        before = path.read_text()
        found = before.count(fault.old)
        if found != fault.times:
            raise SystemExit(
                f"{fault.name}: {fault.file} holds {fault.old!r} {found} times, expected {fault.times}: "
                "the code has changed, so tests/mutation.py must follow"
            )
        path.write_text(before.replace(fault.old, fault.new))
        try:
            yield
        finally:
            path.write_text(before)


@contextmanager
def taken(trees: queue.SimpleQueue[Tree]) -> Iterator[Tree]:
    """One that nobody else has."""
    tree = trees.get()
    try:
        yield tree
    finally:
        trees.put(tree)


def main(words: list[str]) -> int:
    faults = [fault for fault in FAULTS if not words or any(word in fault.name for word in words)]
    if not faults:
        raise SystemExit(f"no fault's name holds {' or '.join(words)}")
    started = time.monotonic()
    survivors, jobs = 0, min(len(faults), os.cpu_count() or 1, MOST_TREES)
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder, ThreadPoolExecutor(jobs) as pool:
        trees: queue.SimpleQueue[Tree] = queue.SimpleQueue()
        for number in range(jobs):
            trees.put(Tree(Path(folder) / str(number)))

        def passes(test: str) -> None:
            with taken(trees) as tree:
                if noticed := tree.notices(test):
                    raise SystemExit(f"{test} fails with no fault planted: {noticed}")

        def notices(fault: Fault) -> str:
            with taken(trees) as tree, tree.planted(fault):
                return tree.notices(fault.test)

        try:
            for _ in pool.map(passes, dict.fromkeys(fault.test for fault in faults)):
                pass
            print(f"no fault planted: all tests pass ({time.monotonic() - started:.0f} s)", flush=True)
            for number, (fault, noticed) in enumerate(zip(faults, pool.map(notices, faults), strict=True), 1):
                survivors += not noticed
                verdict = "killed  " if noticed else "SURVIVED"
                print(f"{number:2d}  {verdict}  {fault.name:56s}  {noticed[:120]}", flush=True)
        finally:
            pool.shutdown(cancel_futures=True)
    seconds = time.monotonic() - started
    print(f"{len(faults) - survivors} of {len(faults)} planted faults noticed in {seconds:.0f} s")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
