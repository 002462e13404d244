"""linear_bias_relu, as tests, benchmarks and planted faults know it. On a GPU the products are PyTorch's."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support import spec
from tests.support.spec import DY_BAD, EMULATOR, Case, Draw, Fault, Spec, Tensors, bad_bias, change, flat, smaller

LINEAR = "csrc/linear_bias_relu/linear_bias_relu_cpu.cpp"
CUDA = "csrc/linear_bias_relu/linear_bias_relu_kernels.cuh"


def linear(shape: tuple[int, ...], outputs: int, bias: bool = True) -> Case:
    weight = (outputs, shape[-1])
    return Case("linear_bias_relu", {"x": shape, "weight": weight, "bias": (outputs,) if bias else None})


def stock(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.relu(F.linear(x, weight, bias))


def fuzz(draw: Draw) -> Case:
    from tests.support.drawing import booleans, integers

    rows, inputs, outputs = draw(integers(0, 40)), draw(integers(0, 150)), draw(integers(1, 40))
    return linear((rows, inputs), outputs, draw(booleans()))


def backward_arguments(dy: Tensor, tensors: Tensors, y: Tensor, saved: list[Tensor], constants: Any) -> tuple[Any, ...]:
    return dy, tensors["x"], tensors["weight"], y, [True, True, tensors["bias"] is not None]


def moved(case: Case, width: int) -> tuple[int, int]:
    """y tells where ReLU was open; gradients are as large as what they are of."""
    y = width * math.prod(case.shapes["x"][:-1]) * case.shapes["weight"][0]
    given = width * sum(math.prod(shape) for _, shape in case.items() if shape is not None)
    return given + y, 2 * y + 2 * given


def summands(case: Case, name: str) -> int:
    outputs, inputs = case.shapes["weight"]
    rows = max(1, math.prod(case.shapes["x"][:-1]))
    return {"y": max(1, inputs), "x": outputs, "weight": rows, "bias": rows}[name]


def settled(case: Case, exact: Tensors, eps: float) -> Tensor | bool:
    value = F.linear(*exact.values())
    scale = F.linear(*(None if t is None else t.abs() for t in exact.values()))
    return ~(value.abs() <= eps * scale) | (scale == 0)


MASKED = ((3, 8), (70, 40), (70, 33), (129, 32), (1025, 8))
"""Rows and outputs for ``masked_gradients``."""


def masked_gradients(rows: int, outputs: int, for_bias: bool, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    """Each gradient by the raw backward, and exact, where results are NaN, infinite, or zeros of both signs.

    Sums of integers are exact.
    """
    values = torch.tensor([math.nan, -1, 0, -0.0, 1, math.inf, -math.inf, 3], dtype=dtype)
    y = values[torch.randint(0, len(values), (rows, outputs))]
    dy, x, weight = (torch.randint(-1, 2, shape).to(dtype) for shape in ((rows, outputs), (rows, 5), (outputs, 5)))
    found = torch.ops.alexnet_ext.linear_bias_relu_backward(dy, x, weight, y, [True, True, for_bias])
    dz = torch.ops.aten.threshold_backward(dy.double(), y.double(), 0)
    exact = (dz @ weight.double(), dz.mT @ x.double(), dz.sum(0)[: outputs if for_bias else 0])
    yield from ((ours, theirs.to(dtype)) for ours, theirs in zip(found, exact, strict=True))


FAULTS = (
    Fault("linear: a row left over from the tiles not computed", LINEAR, "for (; i < rows; ++i) tile<1, V>",
          "for (; i < rows - 1; ++i) tile<1, V>", "linear_bias_relu"),
    Fault("linear: blocks of the sum overwrite one another", LINEAR, "add ? load(place) + sum[r][v] : sum[r][v]",
          "sum[r][v]", "linear_bias_relu"),
    Fault("linear: NaN turned to 0", LINEAR, "row[i] = z <= 0 ?", "row[i] = !(z > 0) ?", "linear_bias_relu"),
    Fault("linear: every chunk of vectors reads the first", LINEAR, "b + column, b_step", "b, b_step",
          "linear_bias_relu"),
    Fault("boundary: rows of any strides taken for dense", "csrc/linear_bias_relu/linear_bias_relu_plan.h",
          "return torch::stable::contiguous(t);", "return t;",
          "tests/ops/linear_bias_relu/test_linear_bias_relu.py -k 'values_and_gradients and transposed and float32'"),
    Fault("CUDA: linear's mask takes NaN for closed", CUDA, "result[i][j] <= 0", "!(result[i][j] > 0)",
          f"{EMULATOR} -k 'masks and float32'"),
    Fault("CUDA: linear's mask leaves out a thread's second row", CUDA, "row < rows ? row : first", "first",
          f"{EMULATOR} -k 'linear and values and float32'"),
    Fault("CUDA: linear's bias sums written past the outputs of a block", CUDA,
          "total[before * V + output] = ", "total[output] = ", f"{EMULATOR} -k 'linear and values and float32'"),
)  # fmt: skip


SPEC = Spec(
    name="linear_bias_relu",
    gradient=True,
    on_gpu=True,
    in_triton=False,
    product=True,
    in_place=None,
    stock=stock,
    draw=spec.normal,
    # Rows about the 8 where forward turns to tiles, and about what a tile and its vectors hold; inputs and outputs
    # about the blocks of 512, 128, 48 and 12.
    cases=(
        *(linear((rows, 33), 17) for rows in (0, 1, 2, 7, 8, 9, 16, 17, 31, 32, 33, 49, 70)),
        *(linear((9, inputs), 14) for inputs in (1, 2, 127, 129, 511, 512, 513, 1030)),
        *(linear((5, inputs), 13) for inputs in (0, 1, 511, 513)),
        *(linear((17, 19), outputs) for outputs in (1, 11, 12, 13, 47, 48, 49, 127, 129, 260)),
        linear((12, 20), 9, bias=False),
        linear((3, 0), 4),
        linear((2, 3, 10), 6),
        linear((2, 3, 4, 5), 7, bias=False),
        linear((21,), 6),
    ),
    examples=(linear((10, 7), 6), linear((10, 7), 6, bias=False)),
    edges=(linear((0, 7), 6), linear((1, 1), 1)),
    small=(linear((2, 3), 2), linear((2, 3), 2, bias=False)),
    large=(linear((70, 600), 130),),
    many=(),
    alexnet=(linear((1, 9216), 4096), linear((1, 4096), 4096)),
    backward_arguments=backward_arguments,
    needs={"x": {"weight", "y"}, "weight": {"x", "y"}, "bias": {"y"}},
    winners=False,
    saved=lambda x, y: x.nbytes + y.nbytes,
    moved=moved,
    target=None,
    copies=None,
    bad_calls={
        **bad_bias(2),
        "x_int": change(0, lambda x: x.int()),
        "x_rank": change(0, flat),
        "x_inputs": change(0, smaller),
        "weight_dtype": change(1, lambda w: w.double()),
        "weight_rank": change(1, flat),
        "weight_inputs": change(1, lambda w: w[:, :1]),
    },
    bad_backward_calls={
        **DY_BAD,
        "x_inputs": change(1, lambda x: x[:, :2]),
        "weight_rank": change(2, flat),
        "y_shape": change(3, smaller),
        "y_dtype": change(3, lambda y: y.half()),
    },
    fuzz=fuzz,
    summands=summands,
    settled=settled,
    magnitude=lambda case: 1.0,
    # Outputs about the 8, 16 and 32 of a block's vectors; rows about the 64 that divide them, and two launches.
    emulated=(
        *(linear((rows, 5), 40) for rows in (0, 1, 64, 65, 129)),
        *(linear((9, 5), outputs) for outputs in (8, 16, 32, 72, 6)),
        linear((130, 3), 40, bias=False),
        linear((1030, 3), 8),
        *(linear((rows, 5), outputs) for rows, outputs in ((1, 1), (0, 6), (3, 0))),
    ),
    emulated_orders=(linear((70, 9), 40), linear((10, 7), 6)),
    emulated_many=(linear((300, 4), 1100),),
    ptx=(linear((10, 7), 6, bias=False), linear((130, 5), 72)),
    runs=None,
    triton_kernels=frozenset(),
    faults=FAULTS,
)
