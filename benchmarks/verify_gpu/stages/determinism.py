"""The same bits, forward and backward, in every one of many runs."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from alexnet_ext.ops import _backend
from tests.support import cases
from tests.support.cases import Case

from ..common import SIZES, attempt, fused, gradients, ways
from ..report import Finding
from . import Task


def run(task: Task) -> Iterator[Finding]:
    sizes = SIZES[task.device]
    torch.backends.cudnn.deterministic = True  # cuDNN's own choice is not examined here
    for op in _backend.OPS:
        case = cases.alexnet_cases(op, min(sizes.batch, 32))[-1]
        for way in filter(task.wants, ways(op, task.device)):
            for dtype in sizes.dtypes:
                name = f"{op} {way} {cases.dtype_id(dtype)}, {sizes.runs} runs"
                yield attempt(name, partial(same_bits, case, way, dtype, task.device, sizes.runs), backend=way)


def same_bits(case: Case, way: str, dtype: torch.dtype, device: str, runs: int) -> None:
    case = cases.in_dtype(case, dtype)
    layout = "channels_last" if len(case.shapes.get("x", ())) == 4 else "contiguous"
    tensors = cases.make(case, dtype, layout, device=device)
    with torch.no_grad():
        dy = torch.randn_like(fused(case, tensors, way))
    expected = gradients(case, tensors, way, dy)
    for i in range(1, runs):
        found = gradients(case, tensors, way, dy)
        for which, (ours, first) in enumerate(zip(found, expected, strict=True)):
            assert torch.equal(ours, first), f"run {i} differs in {'output' if which == 0 else f'gradient {which}'}"
