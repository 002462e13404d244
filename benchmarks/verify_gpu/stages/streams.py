"""Kernels run on the current stream: after a long wait there, on data that is written only after the wait."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from tests.support import cases
from tests.support.cases import Case

from ..common import attempt, examples, gradients
from ..report import Finding
from . import Task

WAIT = 50_000_000
"""Clock cycles, some 30 ms: a kernel on another stream would be done long before."""


def run(task: Task) -> Iterator[Finding]:
    if task.device != "cuda":
        return
    torch.backends.cudnn.deterministic = True  # cuDNN's own choice is not examined here
    for case, way in examples(task.device, task.wants):
        yield attempt(f"{case.id} {way}", partial(waits, case, way), backend=way)


def waits(case: Case, way: str) -> None:
    tensors, late = cases.make(case, device="cuda"), cases.make(case, device="cuda", seed=3)
    expected = gradients(case, late, way)
    gradients(case, tensors, way)  # the first call compiles and loads before the wait
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(WAIT)
        with torch.no_grad():
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensor.copy_(late[name])
        found = gradients(case, tensors, way)
        assert not side.query(), "a call waited for the GPU, which then shows no wrong stream"
    side.synchronize()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
