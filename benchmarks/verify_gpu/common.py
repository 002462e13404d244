"""What stages share: the backends there are, sizes by device, cases with their gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from alexnet_ext.ops import _backend
from alexnet_ext.ops._tuning import Candidate
from tests import cases
from tests.cases import Case, Tensors

from .report import Finding


class Sizes(NamedTuple):
    """What the CPU cannot do in the time is smaller there."""

    batch: int
    network_batches: tuple[int, ...]
    training_steps: int
    dtypes: tuple[torch.dtype, ...]
    runs: int


SIZES = {
    "cuda": Sizes(256, (128, 1024), 50, (torch.bfloat16, torch.float32), 100),
    "cpu": Sizes(2, (2,), 3, (torch.float32,), 5),
}


def backends(op: str, device: str) -> list[str]:
    """Ours, that have kernels for the op on this device."""
    return [name for name in ("native", "triton") if _backend.has_kernel(name, op, device)]


def each_backend(device: str) -> list[str]:
    return [name for name in ("native", "triton") if any(name in backends(op, device) for op in _backend.OPS)]


@contextmanager
def preferring(backend: str, device: str) -> Iterator[None]:
    """``backend="auto"`` as it would be were this backend proven and preferred; stock where it has no kernel."""
    preference, unproven = _backend.PREFERENCE, _backend.UNPROVEN
    _backend.PREFERENCE = {**preference, device: () if backend == "stock" else (backend,)}
    _backend.UNPROVEN = set()
    try:
        yield
    finally:
        _backend.PREFERENCE, _backend.UNPROVEN = preference, unproven


@contextmanager
def choosing(choose: Callable[[str, Sequence[Candidate]], Candidate], device: str) -> Iterator[None]:
    """The convolution by what is measured, with ``choose(the call in words, candidates)`` for a measurement."""
    from alexnet_ext.ops.conv2d_bias_relu import measured

    fastest = measured.fastest
    measured.fastest = lambda what, device, given: choose(what, given)
    try:
        with preferring("measured", device):
            yield
    finally:
        measured.fastest = fastest


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def gradients(case: Case, tensors: Tensors, backend: str, dy: Tensor | None = None) -> list[Tensor]:
    """[y, gradients of all that want one]."""
    y = cases.fused(case, tensors, backend)
    wanted = list(cases.wanting_grad(tensors).values())
    if not wanted:
        return [y]
    return [y.detach(), *torch.autograd.grad(y, wanted, torch.ones_like(y) if dy is None else dy)]


def attempt(name: str, check: Callable[[], Any]) -> Finding:
    """Whatever ``check`` raises is a finding that failed; what it returns is the detail."""
    try:
        detail = check()
    except Exception as error:
        return Finding(name, False, f"{type(error).__name__}: {error}"[:2000])
    return Finding(name, True, str(detail or ""))


def examples(device: str) -> Iterator[tuple[Case, str]]:
    """(case, backend) of one plain case an op."""
    for case in cases.EXAMPLES + cases.AUGMENT_EXAMPLES:
        for backend in backends(case.op, device):
            yield case, backend
