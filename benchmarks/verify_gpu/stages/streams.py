"""Kernels run on the current stream: behind a long wait there, on data that comes only after it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from tests import cases
from tests.cases import Case

from ..common import attempt, examples, gradients
from ..report import Finding

WAIT = 50_000_000
"""Clock cycles, some 30 ms: a kernel on another stream would be done long before."""


def run(device: str) -> Iterator[Finding]:
    if device != "cuda":
        return
    for case, backend in examples(device):
        yield attempt(f"{case.id} {backend}", partial(waits, case, backend))


def waits(case: Case, backend: str) -> None:
    tensors, late = cases.make(case, device="cuda"), cases.make(case, device="cuda", seed=3)
    expected = gradients(case, late, backend)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(WAIT)
        with torch.no_grad():
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensor.copy_(late[name])
        found = gradients(case, tensors, backend)
    side.synchronize()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
