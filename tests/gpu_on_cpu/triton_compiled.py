"""Runs an op's Triton kernels as compiled, on the CPU, and prints what came of each case as a line of JSON.

    python -m tests.gpu_on_cpu.triton_compiled OP sample | quick | full 80 | 90

In a process of its own, with TRITON_INTERPRET=0: the interpreter has no compiler.
"""

from __future__ import annotations

import importlib
import json
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tests.gpu_on_cpu.triton_adapter import compiled_kernels
from tests.support import cases, oracle
from tests.support.cases import Case, augment, block, conv, lrn, pool

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64

# 48 channels a group; two parts of the weight gradient, the last a pixel shorter; a stride, whose gradient is
# spread; dilation; a first layer, which is rewritten; no bias and no ReLU.
LAYERS = (
    conv((1, 96, 7, 9), 32, (5, 5), padding=2, groups=2),
    conv((1, 16, 37, 31), 24, (3, 3), padding=1),
    conv((1, 17, 11, 8), 19, (3, 3), stride=(3, 2), padding=1),
    conv((2, 3, 10, 9), 4, (2, 3), dilation=(3, 2), padding=(2, 1)),
    conv((2, 3, 35, 39), 24, (11, 11), stride=4),
    conv((2, 8, 7, 5), 16, (3, 3), padding=1, groups=2, bias=False, relu=False),
)
WIDE = conv((1, 24, 9, 11), 136, (3, 3), padding=1)
SHAPES = ((2, 96, 9, 7), (1, 17, 5, 5))
LAYOUTS = ("channels_last", "contiguous")
MANY = ((1, 256, 5, 3), (1, 272, 3, 5))  # channels: all in one tile, and in tiles that overlap


ORDERS = ("forward", "backward")
ORDERED_BY = (
    *("cp.async.wait_group", "cp.async.wait_group bar.sync", "wgmma.wait_group bar.sync", "fence.proxy.async"),
    *("wgmma.fence", "wgmma.commit_group", "wgmma.wait_group"),
)


@dataclass(frozen=True)
class Run:
    """A case, and how it is run.

    ``wide``: with offsets of 64 bits; ``askew``: x at no multiple of 16 bytes; ``nan``: some of x is; ``order``: of a
    block's warps, by which a missing barrier shows; ``persistent``: the forward, by few programs;
    ``missing``: instructions that are left out.
    """

    case: Case
    dtype: torch.dtype
    layout: str = "channels_last"
    dy_layout: str = "contiguous"
    tf32: bool = False
    wide: bool = False
    askew: bool = False
    nan: bool = False
    persistent: bool = False
    order: str = "together"
    missing: str = ""

    @property
    def id(self) -> str:
        what = [cases.dtype_id(self.dtype), self.layout, self.dy_layout, self.order, self.missing]
        what += [name for name in ("tf32", "wide", "askew", "nan", "persistent") if getattr(self, name)]
        return " ".join((self.case.id, *map(str, what)))


def convolutions(full: bool) -> Iterator[Run]:
    grouped, parted, strided, _, first, _ = LAYERS
    yield from (Run(case, BF16) for case in LAYERS)
    yield from (Run(case, FP32, tf32=True) for case in (grouped, strided))
    yield from (Run(grouped, dtype) for dtype in (FP16, FP32))
    yield Run(strided, FP64)
    yield Run(grouped, BF16, dy_layout="channels_last", askew=True)
    yield Run(strided, BF16, "sliced", "expanded_batch", wide=True)
    yield Run(replace(grouped, shapes=grouped.shapes | {"x": (1, 96, 5, 5)}), BF16, nan=True)
    if full:
        yield from (Run(case, dtype) for case in LAYERS for dtype in (FP16, FP32, FP64))
        yield from (Run(case, FP32, tf32=True) for case in (parted, first))
        yield Run(grouped, BF16, "contiguous", "sliced")
        yield from (Run(grouped, dtype, order=order) for dtype in (BF16, FP32) for order in ORDERS)


def persistent_convolutions(grid: str) -> Iterator[Run]:
    """Of the second layer the programs have two or three blocks each; the wide one fills all columns of a block."""
    if grid != "quick":
        yield Run(LAYERS[1], BF16, persistent=True)
        yield Run(LAYERS[0], FP32, tf32=True, persistent=True)
    if grid != "sample":
        yield Run(WIDE, FP16, persistent=True)
        yield Run(WIDE, FP32, tf32=True)


def unordered_convolutions() -> Iterator[Run]:
    """Forward alone, without what keeps warps, copies and products in order: each fails."""
    yield from (Run(LAYERS[1], BF16, persistent=True, order="forward", missing=name) for name in ORDERED_BY)


def memory_bound(full: bool, *made: Callable[[tuple[int, ...]], Case]) -> Iterator[Run]:
    """Each op's first way to make a case in many dtypes and layouts, the others in one."""
    first, *others = made
    yield Run(first(SHAPES[0]), BF16)
    yield Run(first(SHAPES[0]), BF16, "contiguous")
    yield Run(first(SHAPES[1]), FP32, order="backward")
    yield Run(first(SHAPES[1]), FP32, "contiguous")
    yield from (Run(first(shape), BF16) for shape in MANY)
    yield Run(first(SHAPES[0]), BF16, dy_layout="expanded_batch", wide=True)
    yield Run(first(SHAPES[0]), BF16, askew=True)
    yield Run(first(SHAPES[1]), BF16, nan=True)
    yield from (Run(other(SHAPES[1]), FP32, ("contiguous", "channels_last")[i % 2]) for i, other in enumerate(others))
    if full:
        yield from (Run(first(shape), FP32, layout) for shape in (SHAPES[0], *MANY) for layout in LAYOUTS)
        yield from (Run(first(shape), BF16, layout) for shape in (SHAPES[1], *MANY) for layout in LAYOUTS)
        yield from (Run(first(shape), dtype) for shape in SHAPES for dtype in (FP16, FP64))
        yield Run(first(SHAPES[1]), FP16, "sliced", "channels_last")
        yield from (Run(first(SHAPES[0]), BF16, order=order) for order in ORDERS)


def augmentations(full: bool) -> Iterator[Run]:
    for blocks in (1, 4):
        yield Run(augment((5, 12, 14, 3), 9, blocks), FP32, "contiguous")
        yield Run(augment((3, 23, 26, 3), 21, blocks), BF16, "contiguous")
        for dtype in (BF16, FP16, FP32, FP64) if full else ():
            yield Run(augment((1, 70, 67, 3), 65, blocks), dtype, "contiguous")
    yield Run(augment((2, 12, 14, 3), 9), FP16, "sliced", wide=True)


RUNS: dict[str, Callable[[bool], Iterator[Run]]] = {
    "conv2d_bias_relu": convolutions,
    "local_response_norm": lambda full: memory_bound(
        full, lrn, *(lambda shape, beta=beta: lrn(shape, beta=beta) for beta in (0.3, 0.5, 1.0, 2.0, -1.0))
    ),
    "relu_max_pool2d": lambda full: memory_bound(
        full,
        pool,
        lambda shape: pool(shape, (2, 3), (2, 1), padding=(0, 1), dilation=(2, 1)),
        lambda shape: pool(shape, 2, 2, ceil_mode=True),
    ),
    **{
        op: lambda full, op=op: memory_bound(
            full, lambda shape: block(op, shape), lambda shape: block(op, shape, False, beta=0.5)
        )
        for op in cases.BLOCKS
    },
    "augment": augmentations,
}


def runs(op: str, grid: str, capability: int) -> Iterator[Run]:
    """A "sample" is what the plain suite runs for 9.0, and not "quick" again."""
    if op == "conv2d_bias_relu" and capability >= 90:
        yield from persistent_convolutions(grid)
    if grid == "sample":
        yield from unordered_convolutions()
    elif op == "conv2d_bias_relu" or capability < 90 or grid == "full":
        yield from RUNS[op](grid == "full")
    else:  # code that differs little from that for 8.0
        yield from islice(RUNS[op](False), 6)


class Rounded(torch.autograd.Function):
    """What its gradient is multiplied by stays exact in TF32: of bf16's values, it rounds the gradient to them."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy.to(BF16).to(dy.dtype)


def check(run: Run, capability: int) -> list[Any]:
    """Hold a run against float64; what was launched for it."""
    case = cases.in_dtype(run.case, run.dtype)
    tensors = cases.make(case, BF16 if run.tf32 else run.dtype, run.layout, requires_grad=not run.missing)
    if run.tf32:
        tensors = {n: None if t is None else t.detach().float().requires_grad_() for n, t in tensors.items()}
    if run.askew:
        x = tensors["x"].detach()
        around = x.new_full((x.numel() + 1,), torch.nan)
        tensors["x"] = around.as_strided(x.shape, x.stride(), 1).copy_(x).requires_grad_()
    if run.nan:
        with torch.no_grad():
            tensors["x"][0, ::5, 1, 2] = torch.nan
    accurate = oracle.assert_accurate

    def without_yardstick(name: str, ours: Tensor, exact: Tensor, stock: Any, *rest: Any) -> None:
        accurate(name, ours, exact, None, *rest)

    module = importlib.import_module(f"alexnet_ext.ops.{case.op}.triton_kernels")
    torch.backends.cudnn.conv.fp32_precision = "tf32" if run.tf32 else "ieee"
    with ExitStack() as stack:
        if run.persistent:
            stack.enter_context(mock.patch.object(module.forward, "__defaults__", (True, True)))
        if run.wide:
            stack.enter_context(mock.patch.object(module, "is_wide", return_value=True))
        if case.op == "local_response_norm" or case.op in cases.BLOCKS or run.dtype == FP32:
            # Stock's power errs by an ulp, approximate instructions by as much as they may, and fp32's products are
            # summed here one after another, by stock in many parts: the cap is what holds.
            stack.enter_context(mock.patch.object(oracle, "assert_accurate", without_yardstick))
        launched = stack.enter_context(compiled_kernels(capability, run.order, run.missing))
        then = Rounded.apply if run.tf32 else None
        oracle.assert_matches_float64(case, tensors, "triton", then, run.dy_layout)
    return launched


def main(op: str, grid: str, capability: str) -> None:
    # Fresh memory is NaN: what a kernel leaves out shows.
    torch.use_deterministic_algorithms(True)
    for run in runs(op, grid, int(capability)):
        launched, error = [], ""
        try:
            launched = check(run, int(capability))
        except AssertionError as found:
            error = str(found)
        except Exception:
            error = traceback.format_exc()[-2000:]
        row: dict[str, Any] = {"run": run.id, "dtype": str(run.dtype).removeprefix("torch."), "tf32": run.tf32}
        row["missing"] = run.missing
        row |= {"layout": "askew" if run.askew else run.layout, "channels": run.case.shapes.get("x", (0, 0))[1]}
        row["kernels"] = [name for name, _ in launched]
        row["instructions"] = sorted({".".join(i.op) for _, program in launched for i in program.code})
        print(json.dumps(row | {"error": error}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
