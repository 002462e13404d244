"""The results of the convolutions for compute capability 9.0: their own launchers, kernels' PTX by ptx."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.gpu_on_cpu.ptx.program import Instruction, PtxError
from tests.gpu_on_cpu.test_ptx import (
    ALEXNET,
    DIRECTIONS,
    PLAIN,
    PROBLEMS,
    Problem,
    Programs,
    compiled_by,
    forward,
    gradients,
    launch,
    made,
    taken,
    unwritten,
)

pytestmark = pytest.mark.drawn

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}
TF32 = {"tf32": torch.float32}  # forward alone
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
# The weight gradient's blocks of 128 filters x 4 (tap, 64 channels), steps of 64 pixels: 35 of them in two parts.
SPLIT = Problem((2, 8, 35, 33), 16, (3, 3), padding=(0, 1))
MANY = Problem((37, 8, 4, 5), 8, (3, 3))  # a step covers ten images and four pixels
ROWS = Problem((3, 8, 9, 64), 8, (1, 1))  # and here a row


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Programs:
    return compiled_by("sm90", "90a", tmp_path_factory.getbasetemp())


def workspace(problem: Problem) -> int:
    """sm90_weight_gradient_workspace of conv2d_sm90.h: a result for each split of the pixels."""
    filters, channels, taps = (
        problem.filters // problem.groups,
        problem.weight[1],
        problem.kernel[0] * problem.kernel[1],
    )
    blocks, steps = -(-(taps * -(-channels // 64)) // 4) * -(-filters // 128) * problem.groups, -(-problem.pixels // 64)
    steps_of_split = -(-steps // max(1, min(132 // blocks, steps // 16)))
    return -(-steps // steps_of_split) * problem.filters * taps * channels


@pytest.mark.parametrize("name", DTYPES | TF32)
def test_forward(name: str, programs: Programs) -> None:
    program, dtype = programs("forward", name), (DTYPES | TF32)[name]
    given = {"dtype": dtype, "rounded": True}  # how TMA rounds to TF32 is not known
    for i, problem in enumerate(SM90_PROBLEMS):
        forward(program, problem, bias=i % 2 == 0, relu=i % 3 == 0, **given)
    for bias, relu in ((True, False), (False, True), (False, False)):
        forward(program, SMALL, bias=bias, relu=relu, **given)
    forward(program, SMALL, bias=True, relu=True, spoilt=True, **given)


@pytest.mark.parametrize("name", DTYPES)
def test_input_gradient(name: str, programs: Programs) -> None:
    for problem in SM90_PROBLEMS:
        gradients(programs("input_gradient", name), problem, DTYPES[name], "x")


@pytest.mark.parametrize("name", DTYPES)
def test_weight_gradient(name: str, programs: Programs) -> None:
    for problem in (*SM90_PROBLEMS, SPLIT, MANY, ROWS):
        gradients(programs("weight_gradient", name), problem, DTYPES[name], "weight", workspace)


@pytest.mark.parametrize("wanted", ["x", "weight"])
def test_nan_of_a_gradient(wanted: str, programs: Programs) -> None:
    program = programs("input_gradient" if wanted == "x" else "weight_gradient", "bf16")
    gradients(program, SMALL, torch.bfloat16, wanted, workspace, spoilt=True)


@pytest.mark.parametrize(
    ("direction", "name"), [("forward", "tf32"), *((direction, name) for direction in DIRECTIONS for name in DTYPES)]
)
def test_what_is_taken(direction: str, name: str, programs: Programs) -> None:
    """As ``alexnet_ext/ops/conv2d_bias_relu/cutlass.py`` says, at the limit and beyond it."""
    program, odd = programs(direction, name), 8 // (DTYPES | TF32)[name].itemsize
    far, padded = Problem((1, 32, 256, 256), 32, (128, 128)), replace(PLAIN, padding=(127, 127))
    assert all(taken(program, direction, problem) for problem in (*ALEXNET, PLAIN, far, padded))
    assert not taken(program, direction, PLAIN, misplaced=8)
    for problem in (
        Problem((1, odd, 9, 9), 32, (3, 3)),
        Problem((1, 32, 9, 9), odd, (3, 3)),
        replace(PLAIN, stride=(2, 2)),
        replace(far, kernel=(130, 3)),
        replace(far, kernel=(3, 130)),
        replace(PLAIN, padding=(129, 1)),
        replace(PLAIN, padding=(1, 129)),
    ):
        assert not taken(program, direction, problem)


# The instructions that order threads, copies and products.
WAITS = (
    *("bar.sync", "mbarrier.init", "mbarrier.try_wait", "mbarrier.arrive.expect_tx", "mbarrier.arrive.shared::cluster"),
    *("wgmma.fence", "wgmma.wait_group"),
)
ORDERED_BY = {
    "forward": (
        *WAITS,
        *("barrier.cluster.wait", "fence.proxy.async", "cp.async.bulk.wait_group"),
    ),
    "weight_gradient": WAITS,
}


def passes(i: Instruction) -> Instruction:
    """A wait that is over at once."""
    return replace(i, op=["setp", "eq", "u32"], operands=[i.operands[0], "0", "0"])


@pytest.mark.parametrize("direction", ORDERED_BY)
def test_the_machine_notices(direction: str, programs: Programs) -> None:
    """The same bits whichever warp goes first; a failure without any one of the instructions that order them."""
    program, dtype = programs(direction, "f16"), torch.float16
    problem = SMALL if direction == "forward" else SPLIT
    x, weight, dz = (made(*shape, dtype=dtype) for shape in (problem.x, problem.weight, problem.y))

    def run(order: str) -> Tensor:
        result = unwritten(*(problem.y if direction == "forward" else problem.weight), dtype=dtype)
        if direction == "forward":
            launch(program, direction, problem, x, weight, None, False, result, order=order)
        else:
            launch(program, direction, problem, dz, x, torch.empty(workspace(problem)), result, order=order)
        return result

    expected = run("together")
    assert not expected.isnan().any()
    assert all(torch.equal(run(order), expected) for order in ("forward", "backward"))
    (kernel,) = (kernel for name, kernel in program.kernels.items() if "3f16" in name and "sum_rows" not in name)
    code = list(kernel.code)

    def noticed(op: str) -> bool:
        words = op.split(".")
        nothing = passes if words[1] == "try_wait" else lambda i: replace(i, op=["pragma"])
        kernel.code[:] = [nothing(i) if i.op[: len(words)] == words else i for i in code]
        assert kernel.code != code
        try:
            return not all(torch.equal(run(order), expected) for order in ("forward", "backward"))
        except PtxError:
            return True

    try:
        assert [op for op in ORDERED_BY[direction] if not noticed(op)] == []
        kernel.code[:] = [replace(i, op=["unheard_of"]) if i.op[0] == "wgmma" else i for i in code]
        with pytest.raises(PtxError, match=r"not known: wgmma\."):
            run("together")
    finally:
        kernel.code[:] = code
