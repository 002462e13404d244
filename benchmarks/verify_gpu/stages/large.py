"""More than 2^31 elements: the first and the last image equal those of a batch of two."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch

from tests.support import cases
from tests.support.cases import Case, augment, conv

from ..common import attempt, backends, gradients
from ..report import Finding
from . import BACKENDS, Task

SHAPE = (2049, 64, 128, 128)
CASES = (
    *(
        replace(case, shapes={name: SHAPE if name == "x" else (SHAPE[1],) for name in case.shapes})
        for case in cases.of_all("large", cases.MEMORY_BOUND)
    ),
    conv(SHAPE, 16, (3, 3), padding=1, groups=2),
)


def run(task: Task) -> Iterator[Finding]:
    if task.device != "cuda":
        return  # tests/ops/test_runtime.py covers the CPU
    for case in CASES:
        # The native convolution is cuDNN's, which may use another algorithm for another batch.
        ours = ("triton",) if case.op in cases.PRODUCTS else BACKENDS
        for backend in filter(task.wants, set(ours).intersection(backends(case.op, task.device))):
            for layout in ("contiguous", "channels_last"):
                name = f"{case.op} {layout} {backend}"
                yield attempt(name, partial(ends_agree, case, backend, layout), backend=backend)
                torch.cuda.empty_cache()
    for block_size, backend in itertools.product((1, 4), filter(task.wants, backends("augment", task.device))):
        name = f"augment {block_size} {backend}"
        yield attempt(name, partial(crops_agree, block_size, backend), backend=backend)
        torch.cuda.empty_cache()


def ends_agree(case: Case, backend: str, layout: str) -> None:
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    x = torch.empty(case.shapes["x"], dtype=torch.bfloat16, device="cuda", memory_format=memory_format).normal_()
    others: cases.Tensors = {
        name: None if shape is None else torch.randn(shape, dtype=torch.bfloat16, device="cuda")
        for name, shape in case.items()
        if name != "x"
    }
    ends = torch.cat([x[:1], x[-1:]]).contiguous(memory_format=memory_format)
    found = []
    for images in (x, ends):
        y, dx = gradients(case, {"x": images.requires_grad_(), **others}, backend)
        found.append((torch.cat([y[:1], y[-1:]]), torch.cat([dx[:1], dx[-1:]])))
        images.requires_grad_(False)
        del y, dx
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def crops_agree(block_size: int, backend: str) -> None:
    """2.8 GB of bytes become 2.2 thousand million values."""
    case = augment((14_000, 256, 256, 3), 227, block_size, torch.bfloat16)
    tensors = cases.make(augment((2, 256, 256, 3), 227), device="cuda")
    expected = cases.fused(case, tensors, backend)
    middle = {name: tensor[:1].expand(13_998, *tensor.shape[1:]) for name, tensor in tensors.items()}
    whole = {name: torch.cat([tensor[:1], middle[name], tensor[1:]]) for name, tensor in tensors.items()}
    y = cases.fused(case, whole, backend)
    assert torch.equal(torch.cat([y[:1], y[-1:]]), expected)
