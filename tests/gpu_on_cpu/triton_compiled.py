"""Runs an op's Triton kernels as compiled, on the CPU, and prints what came of each case as a line of JSON.

    python -m tests.gpu_on_cpu.triton_compiled OP sample | quick | full 80 | 90

In a process of its own, with TRITON_INTERPRET=0: the interpreter has no compiler.
"""

from __future__ import annotations

import importlib
import json
import sys
import traceback
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tests.gpu_on_cpu.triton_adapter import compiled_kernels
from tests.support import cases, oracle
from tests.support.spec import Run

BF16, FP32 = torch.bfloat16, torch.float32


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
        if "beta" in case.constants or run.dtype == FP32:
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
    for run in cases.SPECS[op].runs(grid, int(capability)):
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
        row["kernels"] = [launch.name for launch in launched]
        row["instructions"] = sorted({".".join(i.op) for launch in launched for i in launch.program.code})
        print(json.dumps(row | {"error": error}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
