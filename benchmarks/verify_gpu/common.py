"""Shared by the stages: the ways to run an op, sizes by device, cases with their gradients, CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from alexnet_ext.ops import _backend
from alexnet_ext.ops._race import Candidate
from tests.support import cases
from tests.support.cases import Case, Tensors

from .report import Finding
from .stages import BACKENDS


class Sizes(NamedTuple):
    """Sizes by device: smaller on a CPU, which needs more time."""

    batch: int
    training_steps: int
    dtypes: tuple[torch.dtype, ...]
    runs: int


SIZES = {
    "cuda": Sizes(256, 50, (torch.bfloat16, torch.float32), 100),
    "cpu": Sizes(2, 3, (torch.float32,), 5),
}
# What "auto" would prefer were it all proven, by what is looked at; what has no kernel there runs stock.
PREFERRED = {"native": ("native",), "triton": ("triton",), "auto": ("auto", *BACKENDS), "stock": ()}


def backends(op: str, device: str) -> list[str]:
    """Our backends that have kernels for the op on this device and that a caller can name."""
    return [name for name in BACKENDS if name in _backend.kernels(op, device)]


def ways(op: str, device: str) -> list[str]:
    """The same, and ``"auto"`` where the op chooses by measurement, each direction for itself."""
    return backends(op, device) + ["auto"] * ("auto" in _backend.kernels(op, device))


def each_way(device: str) -> list[str]:
    return [name for name in (*BACKENDS, "auto") if any(name in ways(op, device) for op in _backend.OPS)]


def preferring(way: str, device: str) -> AbstractContextManager[None]:
    """``backend="auto"`` as if this way were proven and preferred; stock for an op without its kernel."""
    return _backend.preferring(PREFERRED[way], device)


@contextmanager
def choosing(choose: Callable[[str, Sequence[Candidate]], Candidate], device: str) -> Iterator[None]:
    """The convolution by ``choose(the call in words, candidates)``, in place of a measurement."""
    from alexnet_ext.ops.conv2d_bias_relu import candidates

    fastest = candidates.fastest
    candidates.fastest = lambda what, device, given: choose(what, given)
    try:
        with preferring("auto", device):
            yield
    finally:
        candidates.fastest = fastest


def fused(case: Case, tensors: Tensors, way: str) -> Tensor:
    """Run the op by our kernels. Raises RuntimeError if stock would run."""
    if way in BACKENDS:
        return cases.fused(case, tensors, way)
    device = next(tensor.device.type for tensor in tensors.values() if tensor is not None)
    with preferring(way, device):
        if _backend.decide(case.op, torch.device(device)).backend != way:
            raise RuntimeError(f"{case.op} has no kernel for {way!r} on {device}")
        return cases.fused(case, tensors)


def gradients(case: Case, tensors: Tensors, way: str, dy: Tensor | None = None) -> list[Tensor]:
    """[y, the gradient of each tensor that requires one]."""
    y = fused(case, tensors, way)
    wanted = list(cases.wanting_grad(tensors).values())
    if not wanted:
        return [y]
    return [y.detach(), *torch.autograd.grad(y, wanted, torch.ones_like(y) if dy is None else dy)]


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def attempt(name: str, check: Callable[[], Any], **about: str) -> Finding:
    """A finding that failed if ``check`` raises, asynchronous errors included; its result is the detail."""
    try:
        detail = check()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except Exception as error:
        return Finding(name, False, f"{type(error).__name__}: {error}"[:2000], about=about)
    return Finding(name, True, str(detail or ""), about=about)


def examples(device: str, wanted: Callable[[str], bool] = lambda way: True) -> Iterator[tuple[Case, str]]:
    """(case, way) of one plain case an op."""
    for case in cases.EXAMPLES + cases.OTHER_EXAMPLES:
        for way in filter(wanted, ways(case.op, device)):
            yield case, way


def captured(work: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """``work`` captured, after a warm-up on a side stream, as PyTorch requires."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph
