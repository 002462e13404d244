"""The timed functions: each op at AlexNet's shapes and the whole network, ours and stock, from the tests' cases."""

from __future__ import annotations

import platform
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import alexnet_ext as ax
from alexnet_ext import _library
from tests.support import cases
from tests.support.cases import Case

BATCH = 32
DIRECTIONS = ("forward", "forward+backward")
NETWORK = ("training step", "inference")
LAYOUTS = ("contiguous", "channels_last")

Run = Callable[[], Any]


def device_name() -> str:
    """The CPU's model as its maker prints it."""
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def layer_name(case: Case) -> str:
    """``32x96x55x55``; then a convolution's kernel, and whether space becomes depth."""
    name = "x".join(map(str, next(shape for shape in case.shapes.values() if shape)))
    if case.constants.get("space_to_depth", 1) > 1:
        return f"{name} to depth"
    weight = case.shapes.get("weight")
    return f"{name} {'x'.join(map(str, weight))}" if weight else name


def directions(op: str) -> tuple[str, ...]:
    return DIRECTIONS if cases.SPECS[op].gradient else DIRECTIONS[:1]


def layouts(op: str) -> tuple[str, ...]:
    """The layouts of x: two for images, one for rows and for bytes, which decoders write pixel by pixel."""
    return LAYOUTS if all(len(case.shapes.get("x") or ()) == 4 for case in cases.ALEXNET[op]) else LAYOUTS[:1]


def op_run(case: Case, direction: str, backend: str, layout: str = "contiguous") -> Run:
    """A function that runs the op once. Images need no gradient, so neither does a convolution of 3 channels."""
    tensors, spec = cases.make(case, layout=layout), cases.SPECS[case.op]
    if spec.in_place is not None:
        return cases.repeated(case, tensors, backend)
    if not spec.gradient:
        return (
            partial(cases.stock, case, tensors) if backend == "stock" else partial(cases.fused, case, tensors, backend)
        )
    if case.shapes["x"][1] == 3:
        tensors["x"].requires_grad_(False)
    wanted = list(cases.wanting_grad(tensors).values())
    with torch.no_grad():
        dy = torch.randn_like(cases.fused(case, tensors, backend))

    def forward() -> None:
        with torch.no_grad():
            cases.fused(case, tensors, backend)

    def forward_backward() -> None:
        torch.autograd.grad(cases.fused(case, tensors, backend), wanted, dy)

    return forward if direction == "forward" else forward_backward


def placed(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    return (
        tensor.contiguous(memory_format=getattr(torch, layout))
        if layout in LAYOUTS[1:] and tensor.dim() == 4
        else tensor
    )


def as_training_has_them(model: ax.models.AlexNet, images: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The images with the depth in which ``ops.augment`` hands them to conv1 of ``alexnet train`` on this device."""
    depth = model.take_depth(device, images.dtype)
    missing = -images.shape[-1] % depth
    return F.pixel_unshuffle(F.pad(images, (0, missing, 0, missing)), depth) if depth > 1 else images


def network_run(
    kind: str,
    fused: bool,
    batch: int = BATCH,
    layout: str = "contiguous",
    fused_optimizer: bool = False,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    compiled: Callable[[nn.Module], Callable[[torch.Tensor], torch.Tensor]] = lambda model: model,
) -> Run:
    """One step of the paper's SGD on the paper's network with random images, or one inference.

    bf16 and fp16 are autocast's, but with ``fused`` and ``fused_optimizer`` the weights themselves have that dtype, and
    ``alexnet_ext.optim.SGD`` trains them. ``compiled(model)`` is called instead of the model.
    """
    torch.manual_seed(0)
    with torch.device(device):  # drawing 61 million weights on a CPU takes a second
        model = ax.models.alexnet("paper", fused=fused)
        images, labels = torch.randn(batch, 3, 227, 227), torch.randint(0, 1000, (batch,))
    has_masters = kind == "training step" and fused and fused_optimizer and dtype != torch.float32
    if has_masters:
        images = as_training_has_them(model, images.to(dtype), torch.device(device))
    images = placed(images, layout)
    for parameter in model.parameters():  # model.to(...) refuses parameters without values
        parameter.data = placed(parameter.detach().to(images.dtype), layout)
    network = compiled(model.eval() if kind == "inference" else model)
    lowered = torch.autocast(device, dtype, enabled=dtype != torch.float32 and not has_masters)
    if kind == "inference":

        def infer() -> None:
            with torch.no_grad(), lowered:
                network(images)

        return infer
    sgd = ax.optim.SGD if has_masters else partial(torch.optim.SGD, fused=fused_optimizer)
    optimizer = sgd(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)
    one = torch.ones((), device=device)  # which backward() would fill at each step, as alexnet_ext.training.step says

    def step() -> None:
        optimizer.zero_grad()
        with lowered:
            loss = F.cross_entropy(network(images).float(), labels)
        loss.backward(one)
        optimizer.step()

    return step


def floor_bytes(case: Case) -> int | None:
    """Bytes that forward and backward must move at least (fp32), or None where arithmetic bounds."""
    return None if cases.SPECS[case.op].product else sum(cases.bytes_moved(case))


def require_library(backend: str) -> None:
    library = _library.LIBRARIES[0]
    if backend == "native" and not library.loaded:
        pytest.skip(f"the compiled CPU library is not loaded: {library.reason}")
