"""Makes an op a citizen of PyTorch: fake, autograd, double backward, autocast and vmap, in one place.

An op ``NAME`` comes with its schema and kernels from C++ (csrc/library.cpp), and so does its ``NAME_backward`` unless
it has no gradient. Their Triton twins, ``NAME_triton`` and ``NAME_triton_backward``, are defined here with the same
schemas from ``forward`` and ``backward`` of ``ops/NAME/triton_kernels.py``. ``NAME_auto`` and its backward,
which choose at run time, come from ``ops/NAME/candidates.py`` in the same way. All else is the same for all of them.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import _library

_AUTOCAST_KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}
_fragment = torch.library.Library("alexnet_ext", "FRAGMENT")


@dataclass(frozen=True)
class Gradient:
    """The gradient of an op: how its backward op, ``NAME_backward``, is called and registered.

    ``schema`` repeats csrc/library.cpp, for twins. ``backward(op, ctx, *gradients)`` gets the backward op of the twin
    that ran forward. ``reference`` is the backward op in differentiable stock PyTorch: double backward goes through it.
    ``batched`` as in ``register``.
    """

    fake: Callable[..., Any]
    setup_context: Callable[..., None]
    backward: Callable[..., Any]
    reference: Callable[..., Any]
    schema: str = ""
    batched: Sequence[int] = ()


@dataclass(frozen=True)
class Record:
    """What an op said of itself to ``register``, for those who look at ops one by one (``alexnet check``, ``tune``).

    ``stock`` is the op in plain PyTorch, called with what the operator is called with.
    """

    stock: Callable[..., Any]
    gradient: Gradient | None
    product: bool


RECORDS: dict[str, Record] = {}
"""By the op's name, in the order that ops are imported in."""


def register(
    name: str,
    *,
    stock: Callable[..., Any],
    schema: str = "",
    fake: Callable[..., Any],
    gradient: Gradient | None,
    autocast: Callable[..., tuple[Any, ...]] | None = None,
    batched: Sequence[int] = (),
    product: bool = False,
) -> None:
    """Register all of ``alexnet_ext::name``, its backward and their twins except the compiled kernels.

    Args:
        stock: the op in plain PyTorch, with the operator's arguments.
        schema: repeats csrc/library.cpp, for twins.
        gradient: None for an op that has none, and no ``name_backward``.
        autocast: ``autocast(dtype, *args)`` returns the arguments that autocast to ``dtype`` makes of them. Without it
            the op keeps its input's dtype there.
        batched: positions of the arguments with a batch dimension to fold a vmapped one into; with none, vmap loops.
        product: each result is a sum over the dimensions of ``weight`` except its first. ``FlopCounterMode`` counts it.
    """
    RECORDS[name] = Record(stock, gradient, product)
    twins = [name] if _library.LIBRARIES[0].loaded else []
    if _library.triton_devices(name):
        twins.append(_define(name, "triton", "triton_kernels", _triton_op, schema, gradient))
    if _library.has_candidates(name):  # torch.compile sees no further than its name
        twins.append(_define(name, "auto", "candidates", torch.library.custom_op, schema, gradient))
    for twin in twins:
        op = f"alexnet_ext::{twin}"
        torch.library.register_fake(op, fake)
        torch.library.register_vmap(op, _vmap_rule(op, batched))
        if gradient is not None:
            _register_gradient(op, gradient)
        if product:
            _register_flops(op)
        if autocast is not None:
            for device, key in _AUTOCAST_KEYS.items():
                _fragment.impl(twin, _autocast_rule(op, device, autocast), key)


def _register_gradient(op: str, gradient: Gradient) -> None:
    op_backward = f"{op}_backward"
    backward = functools.partial(gradient.backward, _overload(op_backward))
    torch.library.register_autograd(op, backward, setup_context=gradient.setup_context)
    torch.library.register_fake(op_backward, gradient.fake)
    torch.library.register_autograd(op_backward, _double_backward(gradient.reference), setup_context=_save_all)
    torch.library.register_vmap(op_backward, _vmap_rule(op_backward, gradient.batched))


def _register_flops(op: str) -> None:
    """Two operations for each product of two numbers; either gradient takes as many as the result."""

    def count(result: Sequence[int], weight: Sequence[int]) -> int:
        return 2 * math.prod(result) * math.prod(weight[1:])

    def forward(x: Any, weight: Sequence[int], *_: Any, out_shape: Sequence[int], **__: Any) -> int:
        return count(out_shape, weight)

    def backward(*args: Any, **_: Any) -> int:
        return count(args[0], args[2]) * sum(args[mask][:2])

    mask = [argument.name for argument in _overload(f"{op}_backward")._schema.arguments].index("output_mask")
    for counted, formula in ((op, forward), (f"{op}_backward", backward)):
        register_flop_formula(_overload(counted).overloadpacket)(formula)


def _define(name: str, kind: str, module: str, define: Any, schema: str, gradient: Gradient | None) -> str:
    """Define the twin ``name_kind`` and its backward from ``forward`` and ``backward`` of a module; its name."""
    functions = importlib.import_module(f"{__package__}.{name}.{module}")
    define(f"alexnet_ext::{name}_{kind}", functions.forward, mutates_args=(), schema=schema)
    if gradient is not None:
        define(f"alexnet_ext::{name}_{kind}_backward", functions.backward, mutates_args=(), schema=gradient.schema)
    return f"{name}_{kind}"


class _FoundLater:
    """The Triton kernels inside ``run``, for the key of torch.compile's cache.

    The search imports torch._inductor, a second of work, so it waits until the cache asks.
    """

    def __init__(self, find: Callable[..., Iterable[object]], run: Callable[..., Any]) -> None:
        self.find, self.run = find, run

    def __iter__(self) -> Iterator[object]:
        return iter(self.find(self.run))


def _triton_op(name: str, run: Callable[..., Any], *, mutates_args: Sequence[str], schema: str) -> None:
    """``torch.library.triton_op``. Some versions infer a schema that they are given, some look for kernels at once."""
    library = torch._library.triton
    replaced: dict[str, Callable[..., Any]] = {"infer_schema": lambda *_, **__: schema}
    if hasattr(library, "get_inner_triton_kernels"):
        replaced["get_inner_triton_kernels"] = functools.partial(_FoundLater, library.get_inner_triton_kernels)
    with contextlib.ExitStack() as stack:
        for attribute, value in replaced.items():
            stack.callback(setattr, library, attribute, getattr(library, attribute))
            setattr(library, attribute, value)
        torch.library.triton_op(name, run, mutates_args=mutates_args, schema=schema)


def _overload(op: str) -> Any:
    return getattr(torch.ops.alexnet_ext, op.split("::")[1]).default


def _autocast_rule(op: str, device: str, cast: Callable[..., tuple[Any, ...]]) -> Callable[..., Any]:
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, _AUTOCAST_KEYS[device]))

    def rule(*args: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return _overload(op)(*cast(torch.get_autocast_dtype(device), *args))

    return rule


def all_but_fp64(dtype: torch.dtype, *args: Any) -> tuple[Any, ...]:
    """For ``autocast=`` of a product: every tensor cast to the autocast dtype but fp64's, as stock does."""
    return tuple(a.to(dtype) if isinstance(a, Tensor) and a.dtype != torch.float64 else a for a in args)


def _save_all(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)))
    ctx.others = [None if isinstance(value, Tensor) else (value,) for value in inputs]
    ctx.set_materialize_grads(False)


def _double_backward(reference_backward: Callable[..., Any]) -> Callable[..., Any]:
    """The gradient of a backward op, taken through its stock reference: right to any order, not fast."""

    def double_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        inputs = [next(saved) if value is None else value[0] for value in ctx.others]
        with torch.enable_grad():
            wanted = [i for i, needed in enumerate(ctx.needs_input_grad) if needed]
            for i in wanted:
                inputs[i] = inputs[i].view_as(inputs[i])
            outputs = reference_backward(*inputs)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None and o.requires_grad]
            result: list[Tensor | None] = [None] * len(inputs)
            if pairs and wanted:
                found = torch.autograd.grad(
                    [o for o, _ in pairs],
                    [inputs[i] for i in wanted],
                    [g for _, g in pairs],
                    create_graph=True,
                    allow_unused=True,
                )
                for i, gradient in zip(wanted, found, strict=True):
                    result[i] = gradient
        return tuple(result)

    return double_backward


def _vmap_rule(op: str, batched: Sequence[int]) -> Callable[..., Any]:
    def fold(size: int, in_dims: tuple[Any, ...], args: tuple[Any, ...]) -> Any:
        folded = list(args)
        for i in batched:
            x = args[i].unsqueeze(0).expand(size, *args[i].shape) if in_dims[i] is None else args[i]
            x = x.movedim(in_dims[i] or 0, 0)
            rows = x.shape[1]
            folded[i] = x.flatten(0, 1)
        outputs = _overload(op)(*folded)
        if isinstance(outputs, tuple):
            return tuple(o.unflatten(0, (size, rows)) for o in outputs)
        return outputs.unflatten(0, (size, rows))

    def loop(size: int, in_dims: tuple[Any, ...], args: tuple[Any, ...]) -> Any:
        def pick(value: Any, dim: Any, b: int) -> Any:
            if not isinstance(value, Tensor) or dim is None:
                return value
            return value.select(dim, b) if size else value.new_zeros(value.movedim(dim, 0).shape[1:])

        # Of nothing, one of zeros says the shapes.
        results = [_overload(op)(*map(pick, args, in_dims, [b] * len(args))) for b in range(max(size, 1))]
        if isinstance(results[0], tuple):
            return tuple(torch.stack(column)[:size] for column in zip(*results, strict=True))
        return torch.stack(results)[:size]

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        in_dims = tuple(None if isinstance(dim, list) else dim for dim in in_dims)  # of a list of numbers: one each
        can_fold = batched and all(i in batched or dim is None for i, dim in enumerate(in_dims))
        outputs = (fold if can_fold else loop)(info.batch_size, in_dims, args)
        return outputs, (0,) * len(outputs) if isinstance(outputs, tuple) else 0

    return rule
