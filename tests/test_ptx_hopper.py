"""What the convolutions for compute capability 9.0 compute: launchers as they are, kernels' PTX by tests/ptx."""

from __future__ import annotations

import copy
import fcntl
import functools
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from . import cuda_budget
from .ptx.program import Instruction, PtxError
from .ptx.runtime import Program
from .test_ptx import CSRC, PROBLEMS, Problem, assert_near, forward, gradients, launch, made, unwritten

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}
# Blocks of 128 pixels x 128 filters or 96 channels, two of them a cluster; steps of 64 channels, 6 or 3 in flight.
SMALL = Problem((2, 96, 9, 7), 96, (3, 3), padding=(1, 1), groups=2)
SM90_PROBLEMS = (
    SMALL,
    PROBLEMS[0],  # 25 steps a block
    Problem((3, 104, 11, 13), 136, (3, 2), padding=(0, 1)),  # two clusters of pixels, two blocks of filters or channels
    PROBLEMS[3],  # dilated
    Problem((1, 48, 6, 7), 72, (3, 3), padding=(2, 1), dilation=(1, 2), groups=3),  # two launches
    Problem((2, 8, 12, 11), 8, (1, 1)),
)


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Program]:
    """By direction and dtype. A direction is compiled once, whichever worker comes first, for both dtypes."""
    include, folder = cuda_budget.cutlass_include(), tmp_path_factory.getbasetemp()
    if shutil.which("nvcc") is None or not include:
        pytest.skip("nvcc or CUTLASS's headers (nvidia-cutlass) are missing")
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "ptx_sm90"
    folder.mkdir(exist_ok=True)

    @functools.cache
    def compiled(direction: str) -> Program:
        source = folder / f"{direction}.cu"
        with (folder / f"{direction}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            source.write_text("".join(f'#include "{CSRC}/{direction}_{dtype}_sm90.cu"\n' for dtype in DTYPES))
            return Program(source, Path(include), folder, "90a")

    def of_dtype(direction: str, name: str) -> Program:
        program = copy.copy(compiled(direction))
        launcher = rf"_ZN11alexnet_ext\d+conv2d_{direction}_sm90INS_\d{name}E"
        program.symbols = [symbol for symbol in program.symbols if re.match(launcher, symbol)]
        return program

    return of_dtype


@pytest.mark.parametrize("name", DTYPES)
def test_forward(name: str, programs: Callable[[str, str], Program]) -> None:
    program, dtype = programs("forward", name), DTYPES[name]
    for i, problem in enumerate(SM90_PROBLEMS):
        forward(program, problem, dtype, bias=i % 2 == 0, relu=i % 3 == 0)
    for bias, relu in ((True, False), (False, True), (False, False)):
        forward(program, SMALL, dtype, bias, relu)
    forward(program, SMALL, dtype, bias=True, relu=True, spoilt=True)


@pytest.mark.parametrize("name", DTYPES)
def test_input_gradient(name: str, programs: Callable[[str, str], Program]) -> None:
    for problem in SM90_PROBLEMS:
        gradients(programs("input_gradient", name), problem, DTYPES[name], "x")


def test_nan_of_a_gradient(programs: Callable[[str, str], Program]) -> None:
    dtype = torch.bfloat16
    dz, weight, dx = made(2, 96, 9, 7, dtype=dtype), made(*SMALL.weight, dtype=dtype), unwritten(*SMALL.x, dtype=dtype)
    dz[1, 50, 0, 3], dz[0, 1, 8, 6] = torch.nan, torch.inf
    launch(programs("input_gradient", "bf16"), "input_gradient", SMALL, dz, weight, dx)
    x = torch.zeros(SMALL.x, dtype=torch.float64, requires_grad=True)
    (exact,) = torch.autograd.grad(SMALL.convolve(x, weight.double()), x, dz.double())
    assert_near(dx, exact)


# What keeps threads, copies and products in order.
ORDERED_BY = (
    *("bar.sync", "barrier.cluster.wait", "mbarrier.init", "mbarrier.try_wait", "mbarrier.arrive.expect_tx"),
    *("mbarrier.arrive.shared::cluster", "fence.proxy.async", "wgmma.fence", "wgmma.wait_group"),
    "cp.async.bulk.wait_group",
)


def passes(i: Instruction) -> Instruction:
    """A wait that is over at once."""
    return replace(i, op=["setp", "eq", "u32"], operands=[i.operands[0], "0", "0"])


def test_the_machine_notices(programs: Callable[[str, str], Program]) -> None:
    """The same bits whichever warp goes first; and none without one of what keeps threads and copies in order."""
    program, dtype = programs("forward", "f16"), torch.float16
    problem = SMALL
    x, weight = (made(*shape, dtype=dtype) for shape in (problem.x, problem.weight))
    expected = problem.convolve(x.double(), weight.double())

    def run(order: str) -> Tensor:
        y = unwritten(*expected.shape, dtype=dtype)
        launch(program, "forward", problem, x, weight, None, False, y, order=order)
        return y

    y = run("together")
    assert_near(y, expected)
    assert all(torch.equal(run(order), y) for order in ("forward", "backward"))
    (kernel,) = (kernel for name, kernel in program.kernels.items() if "3f16" in name)
    code = list(kernel.code)

    def noticed(op: str) -> bool:
        words = op.split(".")
        nothing = passes if words[1] == "try_wait" else lambda i: replace(i, op=["pragma"])
        kernel.code[:] = [nothing(i) if i.op[: len(words)] == words else i for i in code]
        assert kernel.code != code
        try:
            return not all(torch.equal(run(order), y) for order in ("forward", "backward"))
        except PtxError:
            return True

    assert [op for op in ORDERED_BY if not noticed(op)] == []
    kernel.code[:] = [replace(i, op=["unheard_of"]) if i.op[0] == "wgmma" else i for i in code]
    with pytest.raises(PtxError, match=r"not known: wgmma\."):
        run("together")
