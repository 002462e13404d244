"""The same bits, forward and backward, in every one of many runs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial

import torch

from alexnet_ext.ops import _backend
from benchmarks import harness
from tests import cases
from tests.cases import Case

from ..common import SIZES, attempt, backends, gradients
from ..report import Finding


def run(device: str) -> Iterator[Finding]:
    sizes = SIZES[device]
    for op in _backend.OPS:
        case = harness.alexnet_cases(op, min(sizes.batch, 32))[-1]
        for backend, dtype in itertools.product(backends(op, device), sizes.dtypes):
            name = f"{op} {backend} {cases.dtype_id(dtype)}, {sizes.runs} runs"
            yield attempt(name, partial(same_bits, case, backend, dtype, device, sizes.runs))


def same_bits(case: Case, backend: str, dtype: torch.dtype, device: str, runs: int) -> None:
    case = cases.in_dtype(case, dtype)
    layout = "channels_last" if len(case.shapes.get("x", ())) == 4 else "contiguous"
    tensors = cases.make(case, dtype, layout, device=device)
    with torch.no_grad():
        dy = torch.randn_like(cases.fused(case, tensors, backend))
    expected = gradients(case, tensors, backend, dy)
    for i in range(1, runs):
        found = gradients(case, tensors, backend, dy)
        for which, (ours, first) in enumerate(zip(found, expected, strict=True)):
            assert torch.equal(ours, first), f"run {i} differs in {'output' if which == 0 else f'gradient {which}'}"
