"""``tune``: prove and measure the kernels of a model on the device that will train it. Not yet run on a GPU.

First each convolution is measured for its own shape, direction by direction (``ops/conv2d_bias_relu/candidates.py``).
Then each op as a whole is, by every backend that computes it right here, over all of the model's calls. What is fastest
is remembered, and from then on ``backend="auto"`` runs it on this device.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from .. import ops
from ..ops import _backend, _choices
from ..ops._register import RECORDS
from ..ops.conv2d_bias_relu.candidates import describe, title
from ..ops.conv2d_bias_relu.shared import Convolution, Direction
from ..ops.conv2d_bias_relu.space_to_depth import rewritten
from .cases import CASES, OpCase
from .compare import check


@dataclass(frozen=True)
class TunedRow:
    """What was found for a direction of a layer, or for an op as a whole: the choice, each candidate's microseconds.

    The candidates of an op are backends. ``"auto"`` stands for what was chosen for each direction of each layer.
    """

    layer: str
    direction: str
    choice: str
    microseconds: dict[str, float]


@dataclass(frozen=True)
class Call:
    """An op as a layer of the model calls it; tensors are on the meta device."""

    layer: str
    op: str
    arguments: tuple[Any, ...]

    def made(self, device: torch.device, dtype: torch.dtype, layout: torch.memory_format) -> list[Any]:
        """The arguments on ``device``: normal numbers that require a gradient; zeros where the op has none."""

        def like(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if RECORDS[self.op].gradient is None:
                return torch.zeros(value.shape, dtype=value.dtype, device=device)
            x = torch.randn(value.shape, dtype=dtype, device=device)
            return (x.to(memory_format=layout) if x.dim() == 4 else x).requires_grad_()

        return list(tree_map(like, self.arguments))

    def run(self, backend: str, arguments: Sequence[Any]) -> list[Tensor]:
        """[y, gradients of all tensors that require one] by this backend; what an op in place was called with."""
        tensors = [value for value in tree_leaves(arguments) if isinstance(value, Tensor)]
        if backend == "stock":
            function = RECORDS[self.op].stock
        else:
            function = getattr(torch.ops.alexnet_ext, _backend.kernels(self.op, tensors[0].device.type)[backend])
        y = function(*arguments)
        if y is None:
            return tensors
        y = y[0] if isinstance(y, tuple) else y
        inputs = [tensor for tensor in tensors if tensor.requires_grad]
        return [y.detach(), *torch.autograd.grad(y, inputs, torch.ones_like(y))] if inputs else [y]


class _Calls(TorchDispatchMode):
    """Notes each call of our ops, whichever twin it is."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.found = "", list[Call]()

    def enter(self, layer: str, *_: Any) -> None:
        self.layer = layer

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "alexnet_ext":  # arguments at their defaults are left out of the call
            rest = [kwargs.get(a.name, a.default_value) for a in func._schema.arguments[len(args) :]]
            self.found.append(Call(self.layer, func._opname.removesuffix("_triton"), (*args, *rest)))
        return func(*args, **kwargs)


def calls_of(model: nn.Module, shape: Sequence[int]) -> list[Call]:
    """The calls of our ops in ``model``, for inputs of ``shape``; none is run.

    After them one call, at AlexNet's shapes and this batch, of each op that the model does not call: augment makes its
    input, sgd_step changes its weights, others serve other models.
    """
    calls = _Calls()
    hooks = [
        module.register_forward_pre_hook(lambda *_, layer=layer: calls.enter(layer))
        for layer, module in model.named_modules()
    ]
    meta = partial(torch.empty, device="meta")
    batch, _, height, width = shape
    try:
        with torch.no_grad(), calls:
            tensors = (*model.named_parameters(), *model.named_buffers())
            torch.func.functional_call(model, {name: x.to("meta") for name, x in tensors}, meta(tuple(shape)))
            calls.enter("")
            called = {call.op for call in calls.found}
            for case in CASES:
                if isinstance(case, OpCase) and case.op not in called:
                    (_, *rest), *others = case.shapes
                    case.call(True, meta(batch, *rest), *map(meta, others))
            drawn = meta(batch, 2, dtype=torch.int64), meta(batch, dtype=torch.bool), meta(batch, 3)
            images = meta(batch, height, width, 3, dtype=torch.uint8)
            ops.augment(images, *drawn, min(height, width), mean=(0.5,) * 3, std=(0.5,) * 3)
            low, wide = ([meta(p.shape, dtype=t) for p in model.parameters()] for t in (torch.bfloat16, torch.float32))
            ops.sgd_step(wide, wide, low, low, lr=0.01, momentum=0.9, weight_decay=5e-4)
    finally:
        for hook in hooks:
            hook.remove()
    return calls.found


def tune(
    model: nn.Module,
    shape: Sequence[int],
    *,
    device: torch.device | str = "cuda",
    dtype: torch.dtype = torch.float32,
    layout: torch.memory_format = torch.channels_last,
) -> list[TunedRow]:
    """Prove and measure on ``device`` the kernels that ``model`` calls; from now on ``backend="auto"`` follows there.

    A backend is a candidate for an op where it is right on this device (``alexnet check`` says how that is judged, in
    fp32, bf16 and fp16, forward and backward). So is ``"auto"``, a choice for each direction of a convolution, where it
    agrees with stock PyTorch on every layer. The fastest over all of the model's calls is kept, in the user's cache
    folder, for this device and these versions of PyTorch, Triton and this package. A convolution's directions are
    measured where their choice is not known yet, an op's backends each time: the last choice holds. Not yet run on a
    GPU.

    >>> rows = alexnet_ext.tune(alexnet_ext.models.alexnet().cuda(), (128, 3, 227, 227), dtype=torch.bfloat16)

    Args:
        model: with fused layers, ``accelerate``'s or one's own. Its tensors stay as they are, on any device.
        shape: (N, C, H, W) of its input.
        device, dtype, layout: what it will train with.

    Warns:
        UserWarning: a kernel that is wrong or does not run here, and is not used.

    Raises:
        RuntimeError: a device that is no GPU, or none that PyTorch sees.
    """
    device = torch.device(device)
    if device.type not in _backend.TUNED or (device.type == "cuda" and not torch.cuda.is_available()):
        raise RuntimeError(f"device must be a GPU that PyTorch sees, got {str(device)!r}")
    return list(rows(model, shape, device, dtype, layout))


def rows(
    model: nn.Module, shape: Sequence[int], device: torch.device, dtype: torch.dtype, layout: torch.memory_format
) -> Iterator[TunedRow]:
    """What ``tune`` finds, as it is found."""
    by_op: dict[str, list[Call]] = {}
    for call in calls_of(model, shape):
        if _backend.kernels(call.op, device.type):
            by_op.setdefault(call.op, []).append(call)
    for op, calls in by_op.items():
        given = [(call, call.made(device, dtype, layout)) for call in calls]
        there = _backend.kernels(op, device.type)
        backends = [backend for backend in there if backend != "auto" and _is_right(op, backend, device)]
        if "auto" in there:
            for call, arguments in given:
                yield from _directions(call, arguments, device)
                for first in in_training(call, dtype, layout):
                    yield from _directions(first, first.made(device, dtype, layout), device)
            if all(_choices.agree(call.run("auto", values), call.run("stock", values)) for call, values in given):
                backends.insert(0, "auto")
            else:
                warnings.warn(f"{op}: what is fastest differs from stock PyTorch and is not used", stacklevel=2)

        def run(backend: str, given: list[tuple[Call, list[Any]]] = given) -> list[Tensor]:
            return [result for call, arguments in given for result in call.run(backend, arguments)]

        candidates = [_choices.Candidate(backend, partial(run, backend)) for backend in (*backends, "stock")]
        left = [candidate for candidate, _ in _choices.running(candidates, _choices.gpu_clock)]
        _choices.choices().remember(_choices.key_of(op, device), _choices.race(left, _choices.gpu_clock))
        yield TunedRow(op, "forward and backward", *_known(op, device))


def in_training(call: Call, dtype: torch.dtype, layout: torch.memory_format) -> Iterator[Call]:
    """A first layer as it is called where only its weight has a gradient, if that differs: by rewritten images."""
    x, weight, bias, *constants, relu = call.arguments
    if dtype.itemsize == 2 and layout == torch.channels_last:
        rewrite, x, weight, p = rewritten(x, weight, Convolution(*constants))
        if rewrite is not None:
            yield Call(call.layer, call.op, (x, weight, bias, *p, relu))


def _directions(call: Call, arguments: list[Any], device: torch.device) -> Iterator[TunedRow]:
    """Those of a convolution: running it measures what is not known."""
    call.run("auto", arguments)
    x, weight, _, *constants, relu = arguments
    for direction in (Direction.FORWARD, Direction.INPUT, Direction.WEIGHT):
        what = describe(x, weight, Convolution(*constants), direction, relu)
        yield TunedRow(call.layer, title(direction, relu), *_known(what, device))


def _known(what: str, device: torch.device) -> tuple[str, dict[str, float]]:
    entry = _choices.choices().known()[_choices.key_of(what, device)]
    return entry["choice"], entry["microseconds"]


def _is_right(op: str, backend: str, device: torch.device) -> bool:
    with _backend.preferring((backend,), device.type):
        wrong = [row for row in check(device, op_names=[op], variants=()) if not row.ok]
    for row in wrong[:1]:
        error = row.note or f"its {row.tensor} is off by {row.error:.2g}, {row.tolerance:.2g} is allowed"
        warnings.warn(f"{op} by {backend} is not used, as in {row.dtype}, {row.layout}, {error}", stacklevel=3)
    return not wrong
