"""The results of the CUTLASS convolutions: their own launchers, and their kernels' PTX run by ptx.

Values are compared with float64 of the same inputs; fp32 is rounded to TF32, as the tensor cores' operands are.
"""

from __future__ import annotations

import copy
import ctypes
import functools
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.gpu_on_cpu.ptx.program import PtxError
from tests.gpu_on_cpu.ptx.runtime import Program, shared_folder
from tests.support import ROOT
from tests.tools import cuda_budget

pytestmark = pytest.mark.drawn
CSRC = ROOT / "csrc" / "conv2d_bias_relu"
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "tf32": torch.float32}
INVALID_VALUE = 1  # cudaErrorInvalidValue
INTEGERS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


@dataclass(frozen=True)
class Problem:
    """A convolution: x (N, C, H, W), the filters and their sides, and its constants."""

    x: tuple[int, int, int, int]
    filters: int
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def weight(self) -> tuple[int, int, int, int]:
        return (self.filters, self.x[1] // self.groups, *self.kernel)

    @property
    def y(self) -> tuple[int, ...]:
        return tuple(self.convolve(*(torch.empty(shape, device="meta") for shape in (self.x, self.weight))).shape)

    @property
    def pixels(self) -> int:
        return self.y[0] * self.y[2] * self.y[3]

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)


PROBLEMS = (
    Problem((1, 96, 9, 7), 128, (5, 5), padding=(2, 2), groups=2),  # AlexNet's second: 48 channels a group, K = 1,200
    Problem((2, 32, 5, 9), 40, (3, 3), padding=(1, 0)),
    Problem((2, 16, 9, 11), 48, (3, 2), stride=(2, 1), padding=(0, 1), groups=2),
    Problem((1, 16, 12, 9), 32, (3, 3), padding=(2, 3), dilation=(2, 3), groups=2),
    Problem((3, 8, 13, 11), 72, (1, 1)),  # two blocks a side
    Problem((2, 16, 25, 23), 32, (3, 3), padding=(1, 1), groups=2),  # the weight gradient's pixels in two parts
)

# At batch 128; the first one after space-to-depth.
ALEXNET = (
    Problem((128, 48, 57, 57), 96, (3, 3)),
    Problem((128, 96, 27, 27), 256, (5, 5), padding=(2, 2), groups=2),
    Problem((128, 256, 13, 13), 384, (3, 3), padding=(1, 1)),
    Problem((128, 384, 13, 13), 384, (3, 3), padding=(1, 1), groups=2),
    Problem((128, 384, 13, 13), 256, (3, 3), padding=(1, 1), groups=2),
)
PLAIN = Problem((1, 32, 9, 9), 32, (3, 3))
DIRECTIONS = ("forward", "input_gradient", "weight_gradient")


def made(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """Normal numbers, channels-last."""
    x = (torch.randn(shape) * scale).to(dtype)
    return x.to(memory_format=torch.channels_last) if x.dim() == 4 else x


def in_tf32(x: Tensor) -> Tensor:
    """The nearest TF32; a tie goes away from zero."""
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32) if x.dtype == torch.float32 else x


def memory(x: Tensor) -> np.ndarray[Any, Any]:
    """A view of a channels-last tensor's memory as integers."""
    flat = x.permute(0, 2, 3, 1) if x.dim() == 4 else x
    assert flat.is_contiguous()
    return flat.view(INTEGERS[x.dtype]).numpy()


def unwritten(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, torch.nan, dtype=dtype).to(memory_format=torch.channels_last)


def described(problem: Problem) -> ctypes.Array[ctypes.c_int64]:
    """Conv2d of conv2d.h."""
    sizes = [*problem.x, problem.filters, *problem.kernel, *problem.y[2:], *problem.stride, *problem.padding]
    return (ctypes.c_int64 * 16)(*sizes, *problem.dilation, problem.groups)


def launch(
    program: Program, launcher: str, problem: Problem, *arguments: Tensor | bool | None, order: str = "together"
) -> None:
    """Call the launcher with the problem and these arguments; its kernels may touch no memory except the tensors'."""
    given: list[Any] = [described(problem)]
    for value in arguments:
        pointer = value.data_ptr() if isinstance(value, Tensor) else None
        given.append(ctypes.c_bool(value) if isinstance(value, bool) else ctypes.c_void_p(pointer))
    buffers = [memory(value) for value in arguments if isinstance(value, Tensor)]
    assert program.launch(launcher, [*given, None], buffers, order) == 0


def taken(program: Program, direction: str, problem: Problem, misplaced: int = 0) -> bool:
    """Whether the launcher takes a problem with tensors ``misplaced`` bytes after a multiple of 16; nothing runs."""
    program = copy.copy(program)
    program.machine = mock.Mock()
    somewhere = torch.empty(64)
    at, to = (ctypes.c_void_p(somewhere.data_ptr() + offset) for offset in (misplaced, 0))
    tensors = {
        "forward": (at, at, None, ctypes.c_bool(True), to),
        "input_gradient": (at, at, to),
        "weight_gradient": (at, at, to, to),
    }
    status = program.launch(direction, [described(problem), *tensors[direction], None], [])
    assert status in (0, INVALID_VALUE)
    assert program.machine.called == (status == 0)
    return status == 0


def assert_near(ours: Tensor, exact: Tensor) -> None:
    """Within the error of fp32's sum and one rounding to the dtype; NaN in the expected places only."""
    eps = torch.finfo(ours.dtype).eps if ours.dtype != torch.float32 else 2**-18
    assert torch.equal(ours.isnan(), exact.isnan())
    largest = exact.nan_to_num(0, 0, 0).abs().max().item()
    torch.testing.assert_close(ours.double(), exact, rtol=eps, atol=eps * largest / 8, equal_nan=True)


def forward(
    program: Program,
    problem: Problem,
    dtype: torch.dtype,
    bias: bool,
    relu: bool,
    spoilt: bool = False,
    rounded: bool = False,
) -> None:
    x, weight = made(*problem.x, dtype=dtype), made(*problem.weight, dtype=dtype, scale=0.1)
    if rounded:
        x, weight = in_tf32(x), in_tf32(weight)
    if spoilt:
        x[0, 0, 1, 2], x[0, 1, 3, 3] = torch.nan, torch.inf
    b = made(problem.filters, dtype=dtype) if bias else None
    exact = problem.convolve(*(in_tf32(t).double() for t in (x, weight)), None if b is None else b.double())
    y = unwritten(*exact.shape, dtype=dtype)
    launch(program, "forward", problem, x, weight, b, relu, y)
    assert_near(y, exact.relu() if relu else exact)


def workspace(problem: Problem) -> int:
    """The size by weight_gradient_workspace of conv2d_cutlass.h: a result for each part of the pixels."""
    taps, filters = problem.weight[1] * problem.kernel[0] * problem.kernel[1], problem.filters // problem.groups
    blocks, pixels = -(-filters // 128) * -(-taps // 128), problem.pixels
    return max(1, min(264 // blocks, -(-pixels // 1024))) * problem.filters * taps


def gradients(
    program: Program,
    problem: Problem,
    dtype: torch.dtype,
    wanted: str,
    floats: Callable[[Problem], int] = workspace,
    spoilt: bool = False,
) -> None:
    x, weight = made(*problem.x, dtype=dtype), made(*problem.weight, dtype=dtype)
    dz = made(*problem.y, dtype=dtype)
    if spoilt:
        dz[0, -2, 0, 3], dz[-1, 1, -1, -2] = torch.nan, torch.inf
        if wanted == "weight":
            x[0, 1, -1, 0], x[-1, -3, 0, -2] = torch.nan, -torch.inf
    leaves = [in_tf32(t).double().requires_grad_() for t in (x, weight)]
    y = problem.convolve(*leaves)
    exact = dict(zip(("x", "weight"), torch.autograd.grad(y, leaves, in_tf32(dz).double()), strict=True))
    found = unwritten(*exact[wanted].shape, dtype=dtype)
    if wanted == "x":
        launch(program, "input_gradient", problem, dz, weight, found)
    else:
        launch(program, "weight_gradient", problem, dz, x, torch.full((floats(problem),), torch.nan), found)
    assert_near(found, exact[wanted])


# How a launcher's type is written in its name.
TYPES = {"bf16": "NS_4bf16E", "f16": "NS_3f16E", "tf32": "f"}
Programs = Callable[[str, str], Program]


def compiled_by(kind: str, architecture: str, base: Path) -> Programs:
    """Programs by direction and dtype. The first worker compiles a direction, for all dtypes."""
    include = cuda_budget.cutlass_include()
    if shutil.which("nvcc") is None or not include:
        pytest.skip("nvcc or CUTLASS's headers (nvidia-cutlass) are missing")

    @functools.cache
    def compiled(direction: str) -> Program:
        with shared_folder(base, f"ptx_{kind}_{direction}") as folder:
            source = folder / f"{direction}.cu"
            files = sorted((CSRC / kind).glob(f"{direction}_*.cu"))
            source.write_text("".join(f'#include "{file}"\n' for file in files))
            return Program(source, Path(include), folder, architecture)

    def of_dtype(direction: str, name: str) -> Program:
        program = copy.copy(compiled(direction))
        launcher = rf"_ZN11alexnet_ext\d+conv2d_{direction}_{kind}I{TYPES[name]}E"
        program.symbols = [symbol for symbol in program.symbols if re.match(launcher, symbol)]
        return program

    return of_dtype


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Programs:
    return compiled_by("cutlass", "80", tmp_path_factory.getbasetemp())


@pytest.mark.parametrize("name", DTYPES)
def test_forward(name: str, programs: Programs) -> None:
    program, dtype = programs("forward", name), DTYPES[name]
    for i, problem in enumerate(PROBLEMS):
        forward(program, problem, dtype, bias=i % 2 == 0, relu=i % 3 == 0)
    forward(program, PROBLEMS[1], dtype, bias=True, relu=True, spoilt=True)


def test_the_machine_notices(programs: Programs) -> None:
    """The same bits whichever warp goes first; a failure without a barrier, or without waiting for copies."""
    program, problem = programs("forward", "f16"), PROBLEMS[4]
    x, weight = (made(*shape, dtype=torch.float16) for shape in (problem.x, problem.weight))
    expected = problem.convolve(x.double(), weight.double())

    def run(order: str) -> Tensor:
        y = unwritten(*expected.shape, dtype=torch.float16)
        launch(program, "forward", problem, x, weight, None, False, y, order=order)
        return y

    y = run("together")
    assert_near(y, expected)
    assert all(torch.equal(run(order), y) for order in ("forward", "backward"))
    (kernel,) = (kernel for name, kernel in program.kernels.items() if "half_t" in name)
    code = list(kernel.code)
    try:
        for op in (["bar", "sync"], ["cp", "async", "wait_group"]):
            kernel.code[:] = [replace(i, op=["pragma"]) if i.op[: len(op)] == op else i for i in code]
            assert not all(torch.equal(run(order), y) for order in ("forward", "backward")), op
        kernel.code[:] = [replace(i, op=["unheard_of"]) if i.op[0] == "mma" else i for i in code]
        with pytest.raises(PtxError, match=r"not known: mma\.sync"):
            run("together")
    finally:
        kernel.code[:] = code
    weight = weight[:-1]  # the launcher's arguments name one filter more
    with pytest.raises(PtxError, match=r"is in no buffer: cp\.async"):
        run("together")


@pytest.mark.parametrize("name", DTYPES)
def test_input_gradient(name: str, programs: Programs) -> None:
    for problem in PROBLEMS:
        if problem.stride == (1, 1):
            gradients(programs("input_gradient", name), problem, DTYPES[name], "x")


@pytest.mark.parametrize("name", DTYPES)
def test_weight_gradient(name: str, programs: Programs) -> None:
    for problem in PROBLEMS:
        gradients(programs("weight_gradient", name), problem, DTYPES[name], "weight")


def test_nan_of_the_weight_gradient(programs: Programs) -> None:
    gradients(programs("weight_gradient", "bf16"), PROBLEMS[0], torch.bfloat16, "weight", spoilt=True)


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_what_is_taken(direction: str, name: str, programs: Programs) -> None:
    """As ``alexnet_ext/ops/conv2d_bias_relu/cutlass.py`` says."""
    program, odd = programs(direction, name), 8 // DTYPES[name].itemsize
    assert all(taken(program, direction, problem) for problem in (*ALEXNET, PLAIN))
    assert not taken(program, direction, PLAIN, misplaced=8)
    for problem in (Problem((1, odd, 9, 9), 32, (3, 3)), Problem((1, 32, 9, 9), odd, (3, 3))):
        assert not taken(program, direction, problem)
    assert taken(program, direction, replace(PLAIN, stride=(2, 2))) == (direction != "input_gradient")
    assert taken(program, direction, Problem((1, 32, 70, 70), 32, (32, 32)))
    if direction != "weight_gradient":  # the weight gradient's kernel has no mask of taps
        assert not taken(program, direction, Problem((1, 32, 70, 70), 32, (33, 33)))
