"""The calls of our ops that a model makes, to be run again by each backend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from .. import ops
from ..ops import _backend, _known
from ..ops._register import RECORDS
from ..ops.augment.reference import as_planes
from .cases import CASES, OpCase


@dataclass(frozen=True)
class Call:
    """An op as a layer of the model calls it; tensors are on the meta device.

    ``of_input``: its x is the model's input, which has no gradient in training.
    """

    layer: str
    op: str
    arguments: tuple[Any, ...]
    of_input: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor that ``decide`` looks at."""
        if self.op == "sgd_step":
            return (0,)
        first: Tensor = next(value for value in tree_leaves(self.arguments) if isinstance(value, Tensor))
        return tuple(as_planes(first).shape if self.op == "augment" else first.shape)

    def layout(self, wanted: torch.memory_format) -> str:
        """The class of layouts of that tensor, where images are ``wanted``."""
        if self.op == "augment":
            return _known.layout_of(as_planes(self.arguments[0]))
        if len(self.shape) != 4:
            return "contiguous"
        return _known.layout_of(torch.empty(self.shape, device="meta", memory_format=wanted))

    def made(self, device: torch.device, dtype: torch.dtype, layout: torch.memory_format) -> list[Any]:
        """The arguments on ``device``: normal numbers, which require a gradient where the op has one, random bytes, and
        zeros for other integers."""

        def like(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if value.dtype == torch.uint8:
                return torch.empty_like(value, device=device).random_()
            if not value.is_floating_point():
                return torch.zeros_like(value, device=device)
            if RECORDS[self.op].gradient is None:
                return torch.randn(value.shape, dtype=value.dtype, device=device)
            x = torch.randn(value.shape, dtype=dtype, device=device)
            return (x.to(memory_format=layout) if x.dim() == 4 else x).requires_grad_()

        arguments = list(tree_map(like, self.arguments))
        if self.of_input:
            arguments[0].requires_grad_(False)
        return arguments

    def run(self, backend: str, arguments: Sequence[Any]) -> list[Tensor]:
        """[y, gradients of all tensors that require one] by this backend; of an op in place what it was called with."""
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
        return [y.detach(), *torch.autograd.grad(y, inputs, _dy(y))] if inputs else [y]


def _dy(y: Tensor) -> Tensor:
    """A gradient in which neighbours differ, stored as y is: one read from a wrong place shows."""
    drawn = (torch.arange(y.numel(), device=y.device) % 251 - 125).mul(2.0**-7)
    return torch.empty_like(y).copy_(drawn.view(y.shape))


class _Calls(TorchDispatchMode):
    """Notes each call of our ops, whichever twin it is."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.found, self.input = "", list[Call](), Tensor()

    def enter(self, layer: str, *_: Any) -> None:
        self.layer = layer

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "alexnet_ext":  # arguments at their defaults are left out of the call
            rest = [kwargs.get(a.name, a.default_value) for a in func._schema.arguments[len(args) :]]
            of_input = args[0] is self.input
            self.found.append(Call(self.layer, func._opname.removesuffix("_triton"), (*args, *rest), of_input))
        return func(*args, **kwargs)


def calls_of(model: nn.Module, shape: Sequence[int], dtype: torch.dtype) -> list[Call]:
    """The calls of our ops in ``model``, for inputs of ``shape``; none is run.

    After them one call, at AlexNet's shapes and this batch, of each op that the model does not call: augment makes its
    input in ``dtype``, sgd_step changes weights in ``dtype``, others serve other models.
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
            calls.input = meta(tuple(shape))
            torch.func.functional_call(model, {name: x.to("meta") for name, x in tensors}, calls.input)
            calls.enter("")
            called = {call.op for call in calls.found}
            for case in CASES:
                if isinstance(case, OpCase) and case.op not in called:
                    (_, *rest), *others = case.shapes
                    case.call(True, meta(batch, *rest), *map(meta, others))
            drawn = meta(batch, 2, dtype=torch.int64), meta(batch, dtype=torch.bool), meta(batch, 3)
            planes = meta(
                batch, 3, height, width, dtype=torch.uint8
            )  # as decoders stack images; the other as arrays do
            subsampled = meta(batch, 3 * -(-height // 2), 2 * -(-width // 2), dtype=torch.uint8)
            for images in (planes.permute(0, 2, 3, 1), planes.permute(0, 2, 3, 1).contiguous(), subsampled):
                ops.augment(images, *drawn, min(height, width), mean=(0.5,) * 3, std=(0.5,) * 3, dtype=dtype)
            low, wide = ([meta(p.shape, dtype=t) for p in model.parameters()] for t in (dtype, torch.float32))
            weights = [] if dtype == torch.float32 else low
            if wide:
                ops.sgd_step(wide, wide, low, weights, lr=0.01, momentum=0.9, weight_decay=5e-4)
    finally:
        for hook in hooks:
            hook.remove()
    return calls.found


def units_of(calls: Sequence[Call], kind: str, dtype: torch.dtype, layout: torch.memory_format) -> list[_known.Unit]:
    """What must be proven on a kind of device before these calls may run by our kernels there.

    Triton's come last: its compiler takes longer than all else.
    """
    found = dict.fromkeys((call.op, call.layout(layout)) for call in calls)
    units = [_known.Unit(op, name, _known.name_of(dtype), where) for op, where in found for name in names_of(op, kind)]
    # Under autocast the parameters and their gradients are fp32.
    more = [unit._replace(dtype="float32") for unit in units if unit.op == "sgd_step"]
    units = list(dict.fromkeys((*units, *more)))
    return sorted(units, key=lambda unit: "triton" in unit.backend)


def names_of(op: str, kind: str) -> list[str]:
    """The backends of an op on a kind of device, and the candidates of its ``"auto"`` that need a proof."""
    backends = list(_backend.kernels(op, kind))
    if "auto" not in backends:
        return backends
    from ..ops.conv2d_bias_relu.candidates import NAMES

    return [*backends, *(f"auto {name}" for name in NAMES)]
