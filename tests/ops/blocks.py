"""What the specs of relu_lrn_max_pool2d and relu_max_pool2d_lrn share: they take the same arguments."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support.spec import MANY, X_BAD, Case, Changes, Draw, bad_bias, change, memory_bound_runs, of_images
from tests.support.spec import pair as pair_of

BLOCKS = ("relu_lrn_max_pool2d", "relu_max_pool2d_lrn")
POOL_BAD: Changes = {
    "kernel0": change(-2, [0, 3]),
    "kernel_negative": change(-2, [-1, 3]),
    "stride0": change(-1, [0, 1]),
}
LRN_BAD: Changes = {"size0": change(-6, 0), "size_negative": change(-6, -(2**40))}
BAD_CALLS: Changes = {
    **X_BAD,
    **POOL_BAD,
    **LRN_BAD,
    **bad_bias(1),
    "kernel_too_many_taps": change(-2, [16, 16]),
}


def block(op: str, shape: tuple[int, ...], bias: bool = True, **rest: Any) -> Case:
    constants = {"lrn_size": 5, "alpha": 1.5, "beta": 0.75, "k": 2.0, "kernel_size": 3, "stride": 2}
    return Case(op, {"x": shape, "bias": (shape[-3],) if bias else None}, constants | rest)


def activation(x: Tensor, bias: Tensor | None) -> Tensor:
    return F.relu(x if bias is None else x + bias[:, None, None])


def output_size(case: Case) -> int:
    """Elements of y."""
    *batch, channels, height, width = case.shapes["x"]
    (rows, columns), (down, right) = (pair_of(case.constants[name]) for name in ("kernel_size", "stride"))
    sides = ((height - rows) // down + 1) * ((width - columns) // right + 1)
    return torch.Size(batch).numel() * channels * sides


def draw_block(draw: Draw, op: str) -> Case:
    from tests.support.drawing import alphas, betas, booleans, draw_shape, pair_within, sampled, windows

    shape = draw_shape(draw)
    constants = {"lrn_size": draw(windows), "alpha": draw(alphas), "beta": draw(betas), "k": draw(sampled([1, 2]))}
    kernel, bias = pair_within(draw, 1, (min(shape[2], 4), min(shape[3], 4))), draw(booleans())
    return block(op, shape, bias, kernel_size=kernel, stride=pair_within(draw, 1, (4, 4)), **constants)


def summands(case: Case, name: str) -> int:
    if name == "bias":
        return of_images(case)
    taps = torch.Size(pair_of(case.constants["kernel_size"])).numel()
    return case.constants["lrn_size"] * (taps if name == "x" else 1)


def settled(case: Case, values: Tensor, eps: float) -> Tensor | bool:
    """Of windows over these values: no second one is within rounding of the first."""
    (height, width), (down, right) = (pair_of(case.constants[name]) for name in ("kernel_size", "stride"))
    windows = values.unfold(-2, height, down).unfold(-2, width, right).flatten(-2)
    if windows.shape[-1] == 1:
        return True
    first, second = windows.topk(2).values.unbind(-1)
    return ~((first - second <= eps * first.abs()) & (first != 0))


def winners_of_ties(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> tuple[Tensor, Tensor]:
    """relu_lrn_max_pool2d's winners and PyTorch's, as taps, of windows of 3 x 3 whose values are often equal or NaN.

    With alpha 0 and k 1 LRN changes no value, but it spreads NaN to the neighbouring channels.
    """
    from tests.support.spec import lay_out

    generator = torch.Generator().manual_seed(5)
    often = [-1.0, 0.0, 1.0, 2.0] * 16
    few = torch.tensor([*often, -0.0, math.nan, math.inf, -math.inf], dtype=torch.float64)
    x = few[torch.randint(0, len(few), shape, generator=generator)]
    bias = torch.randint(-1, 2, (shape[1],), generator=generator).double()
    lrn = {"lrn_size": 5, "alpha": 0.0, "beta": 0.75, "k": 1.0}
    arguments = (lay_out(x.to(dtype), layout), bias.to(dtype), *lrn.values(), [3, 3], [2, 2])
    _, winners = torch.ops.alexnet_ext.relu_lrn_max_pool2d(*arguments)
    values = F.local_response_norm(activation(x, bias), 5, 0.0, 0.75, 1.0)
    _, places = F.max_pool2d(values, 3, 2, return_indices=True)
    rows, columns = (torch.arange(0, 2 * side, 2) for side in places.shape[2:])
    row, column = places // shape[3] - rows[:, None], places % shape[3] - columns
    return winners, row * 3 + column


def emulated(of: Callable[..., Case]) -> dict[str, tuple[Case, ...]]:
    """The fields of a ``Spec`` whose cases run on a GPU in software."""
    return {
        "emulated": (
            of((2, 6, 7, 5)),
            of((2, 16, 7, 5), bias=False),
            of((1, 1, 1, 1), kernel_size=1, stride=1),
            of((0, 8, 4, 5)),
            *(of((2, channels, 5, 7)) for channels in (1, 7, 8, 9, 24, 40)),
            *(of((2, 8, 5, 7), lrn_size=size) for size in (1, 2, 3, 4, 7, 15)),
            *(of((2, 16, 5, 7), beta=beta) for beta in (0.0, 0.3, 0.5, 1.0)),
            # Where threads share their neighbours' parts: about 16 and 64 channels a block, windows beyond channels.
            *(of((1, channels, 5, 7), lrn_size=4) for channels in (15, 16, 17, 63, 64, 65)),
            *(of((1, 70, 4, 5), lrn_size=size, kernel_size=2) for size in (2, 7, 15, 100, 300)),
            of((2, 8, 6, 9), kernel_size=(2, 3), stride=(1, 2)),
            of((2, 8, 9, 8), kernel_size=2, stride=3),
            of((1, 24, 6, 5), kernel_size=3, stride=1),
            of((3, 24, 11, 13)),  # several blocks, and rows of bias sums
        ),
        "emulated_orders": (
            *(of((2, channels, 7, 9)) for channels in (9, 24)),
            of((2, 24, 7, 21)),  # a row of outputs in two warps
            *(of((3, 70, 7, 9), lrn_size=size) for size in (4, 15)),
        ),
        "emulated_many": (
            *(of(shape) for shape in ((67, 24, 9, 21), (100, 8, 13, 11), (41, 24, 10, 17))),
            of((70, 20, 13, 9), lrn_size=4),
            of((400, 2, 7, 9)),  # more runs of patches than rows of bias sums
        ),
        "ptx": (
            of((1, 1, 1, 1), kernel_size=1, stride=1),
            of((2, 8, 5, 7), lrn_size=1),
            *(of((2, channels, 5, 7)) for channels in (1, 8, 24)),
            *(of((2, 16, 5, 7), beta=beta, bias=False) for beta in (0.0, 0.3)),
            of((2, 8, 9, 8), kernel_size=2, stride=3),
            of((1, 65, 5, 7), lrn_size=4),
        ),
    }


def common(op: str) -> dict[str, Any]:
    """The fields of a ``Spec`` that both blocks fill alike, with their own cases."""
    of: Callable[..., Case] = partial(block, op)
    return {
        "name": op,
        "gradient": True,
        "on_gpu": True,
        "in_triton": True,
        "product": False,
        "in_place": None,
        "cases": (
            of((2, 6, 7, 5)),
            of((2, 6, 7, 5), bias=False),
            of((1, 1, 1, 1), kernel_size=1, stride=1),
            of((0, 3, 4, 5)),
            *(of((2, 3, 5, width)) for width in (3, 4, 15, 16, 17, 33, 34, 35)),
            *(of((2, channels, 5, 7)) for channels in (1, 7, 8, 9, 17, 33, 64)),
            *(of((2, 6, 5, 7), lrn_size=size) for size in (1, 2, 3, 4, 7, 15)),
            *(of((2, 7, 5, 7), beta=beta) for beta in (0.0, 0.5, 1.0, 0.3)),
            of((1, 70, 4, 5), lrn_size=7, kernel_size=2),
            of((2, 5, 6, 9), kernel_size=(2, 3), stride=(1, 2)),
            of((2, 5, 9, 8), kernel_size=2, stride=3),
            of((1, 8, 7, 9), alpha=5e-4, lrn_size=5),
            of((7, 6, 5), kernel_size=3, stride=1),
            of((3, 9, 8), bias=False, lrn_size=4),
        ),
        "examples": tuple(of((2, 6, 7, 9), lrn_size=4, bias=bias) for bias in (True, False)),
        "edges": (of((0, 3, 7, 5)), of((1, 1, 1, 1), kernel_size=1, stride=1)),
        "small": tuple(of((1, 3, 2, 3), bias, kernel_size=2, stride=1) for bias in (True, False)),
        "large": (of((4, 24, 33, 31)),),
        "many": tuple(of(shape, kernel_size=1, stride=1) for shape in MANY),
        "alexnet": tuple(of((1, *shape), alpha=5e-4) for shape in ((96, 55, 55), (256, 27, 27))),
        "bad_calls": BAD_CALLS,
        "fuzz": lambda draw: draw_block(draw, op),
        "summands": summands,
        "magnitude": lambda case: case.constants["k"] ** -case.constants["beta"],
        **emulated(of),
        "runs": memory_bound_runs(of, lambda shape: of(shape, False, beta=0.5)),
    }
