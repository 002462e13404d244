"""Runs a model without and with its replacements on the same inputs, and finds those that change a result."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from .._difference import relative_difference
from .tracing import first_line

TOLERANCE = {torch.float64: (1e-9, 1e-6), torch.float32: (1e-4, 1e-2), torch.float16: (1e-2, 1e-1)}
TOLERANCE[torch.bfloat16] = (5e-2, 2e-1)
"""By dtype, the largest relative difference of (values, gradients): the norm of the difference over the norm of stock
PyTorch's result. Gradients have more: a rounding may change the winner of a ReLU or a pooling window."""

SMALL = 1e-2
"""A gradient's norm per element counts as at least this part of the largest one's: a bias before a BatchNorm has a
gradient of rounding errors only."""

CONTAINERS = (list, dict, set, deque, bytearray)
OPAQUE = (Tensor, nn.Module, type, ModuleType, FunctionType, BuiltinFunctionType, MethodType, str, bytes, int, float)


class Change(Protocol):
    """A replacement that can be put into the model and taken back."""

    def put(self) -> None: ...

    def take_back(self) -> None: ...


Some = TypeVar("Some", bound=Change)


class Result(NamedTuple):
    """The results of a model, each tensor with a name for messages."""

    values: list[tuple[str, Tensor]]
    gradients: list[tuple[str, Tensor | None]]


def prove(model: nn.Module, changes: Sequence[Some], example_inputs: Any) -> dict[Some, str]:
    """Compare ``model``, whose ``changes`` are all in place, with itself without them.

    Changes that alter a result beyond ``TOLERANCE`` are taken back; returns them, each with the difference in words.
    Otherwise the model stays as it was. Raises TypeError for ``example_inputs`` without a tensor, and any error that
    the model raises on them without the changes.
    """
    args, kwargs = _arguments(example_inputs)
    inside = list(changes)
    wrong: dict[Some, str] = {}

    def result(among: Sequence[Some]) -> Result:
        for change in changes:
            if change in inside and change not in among:
                change.take_back()
                inside.remove(change)
        for change in among:
            if change not in inside:
                change.put()
                inside.append(change)
        return _run(model, args, kwargs)

    stock = result(())

    def difference(among: Sequence[Some]) -> str:
        try:
            return _difference(stock, result(among))
        except Exception as error:
            return f"it raises {type(error).__name__}: {first_line(error)}"

    right = list(changes)
    while (found := difference(right)) and right:
        # Find the shortest head of the list that differs; with one change fewer it does not.
        some, most = 0, len(right)
        while most - some > 1:
            middle = (some + most) // 2
            if alone := difference(right[:middle]):
                most, found = middle, alone
            else:
                some = middle
        wrong[right.pop(most - 1)] = f"it differs from stock PyTorch on example_inputs: {found}"
    return wrong


def _arguments(given: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    args, kwargs = ((), given) if isinstance(given, dict) else (given if isinstance(given, tuple) else (given,), {})
    if not any(isinstance(value, Tensor) for value in tree_flatten((args, kwargs))[0]):
        raise TypeError(f"example_inputs must be a Tensor, or a tuple or dict with one, got {type(given).__name__}")
    return args, kwargs


def _run(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Result:
    """One step in training, with its gradients, and one call in evaluation; the model is left as it was."""
    values: list[tuple[str, Tensor]] = []
    parameters: list[tuple[str, Tensor]] = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    for training in (True, False):
        with _put_back(model), _hearing(model) as heard:
            model.train(training)
            leaves: list[tuple[str, Tensor]] = []

            def copied(value: Any, leaves: list[tuple[str, Tensor]] = leaves, training: bool = training) -> Any:
                if not isinstance(value, Tensor):
                    return value
                twin = value.detach().clone(memory_format=torch.preserve_format)
                if training and twin.is_floating_point():
                    leaves.append((f"input {len(leaves)}", twin.requires_grad_()))
                return twin

            with torch.set_grad_enabled(training):
                given, named = tree_map(copied, (args, kwargs))
                # The model may begin with an in-place layer, and autograd forbids writing into a leaf.
                given, named = tree_map(lambda v: v.view_as(v) if isinstance(v, Tensor) else v, (given, named))
                outputs = [v for v in tree_flatten(model(*given, **named))[0] if isinstance(v, Tensor)]
            mode = "in training" if training else "in evaluation"
            values += [(f"output {i} {mode}", v.detach().clone()) for i, v in enumerate(outputs)]
            values += [(f"{name} {mode}", v.detach().clone()) for name, v in [*heard, *_held(model)]]
            if training:
                gradients = _gradients(outputs, leaves + parameters)
    return Result(values, gradients)


def _gradients(outputs: list[Tensor], leaves: list[tuple[str, Tensor]]) -> list[tuple[str, Tensor | None]]:
    """The gradients of a random sum of the outputs, the same one each time."""
    flowing = [y for y in outputs if y.requires_grad]
    if not flowing:
        return []
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(y.shape, generator=generator).to(y.device, y.dtype) for y in flowing]
    with _without_gradients([leaf for _, leaf in leaves]):
        torch.autograd.backward(flowing, weights)
        return [(f"gradient of {name}", leaf.grad) for name, leaf in leaves]


@contextmanager
def _without_gradients(leaves: list[Tensor]) -> Iterator[None]:
    """No gradients and no gradient hooks inside the block; afterwards the earlier ones are back."""
    before = [(leaf, leaf.grad) for leaf in leaves]
    waiting = [(hooks, dict(hooks)) for leaf in leaves if (hooks := leaf._post_accumulate_grad_hooks)]
    try:
        for leaf in leaves:
            leaf.grad = None
        for hooks, _ in waiting:
            hooks.clear()
        yield
    finally:
        for leaf, gradient in before:
            leaf.grad = gradient
        for hooks, all_of_them in waiting:
            hooks.update(all_of_them)


@contextmanager
def _hearing(model: nn.Module) -> Iterator[list[tuple[str, Tensor]]]:
    """Yields the very tensors that the model's forward hooks get: in-place layers may write into them later."""
    heard: list[tuple[str, Tensor]] = []
    handles = []
    for name, module in model.named_modules():
        if not (module._forward_hooks or module._forward_pre_hooks):
            continue

        def hear(module: nn.Module, given: Any, *output: Any, name: str = name) -> None:
            found = [value for value in tree_flatten((given, output))[0] if isinstance(value, Tensor)]
            heard.extend((f"what hooks of {name or 'the model'} see", value) for value in found)

        if module._forward_hooks:
            handles.append(module.register_forward_hook(hear))
        else:
            handles.append(module.register_forward_pre_hook(hear))
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()


def _held(model: nn.Module) -> list[tuple[str, Tensor]]:
    """The buffers, and the tensors that modules hold in attributes of their own."""
    found = [(f"buffer {name}", buffer) for name, buffer in model.named_buffers()]
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if isinstance(value, Tensor):
                found.append((f"{name}.{key}" if name else key, value))
    return found


def _difference(stock: Result, ours: Result) -> str:
    """The largest difference beyond tolerance, in words, or ""."""
    if [name for name, _ in stock.values] != [name for name, _ in ours.values]:
        return "other outputs"
    worst, found = 1.0, ""
    least = SMALL * max((_norm_per_element(g) for _, g in stock.gradients if g is not None), default=0.0)
    both = [*zip(stock.values, ours.values, strict=True), *zip(stock.gradients, ours.gradients, strict=True)]
    for i, ((name, expected), (_, tensor)) in enumerate(both):
        if expected is None or tensor is None:
            if expected is not tensor:
                return f"{name} is {'not ' if tensor is None else ''}there"
            continue
        if expected.shape != tensor.shape or expected.dtype != tensor.dtype:
            return (
                f"{name} is {tensor.dtype} of shape {list(tensor.shape)}, not {expected.dtype} {list(expected.shape)}"
            )
        is_gradient = i >= len(stock.values)
        share = _share(expected, tensor, is_gradient, least if is_gradient else 0.0)
        if not share <= worst:
            worst, found = share, f"{name} by {share:.3g} times the tolerance"
    return found


def _norm_per_element(gradient: Tensor) -> float:
    """Of its finite values: one infinity would excuse every other gradient."""
    return gradient.double().nan_to_num(0.0, 0.0, 0.0).norm().item() / max(gradient.numel(), 1) ** 0.5


def _share(expected: Tensor, tensor: Tensor, is_gradient: bool, least: float) -> float:
    """A difference as a share of its tolerance; ``least`` is a norm per element."""
    if not expected.is_floating_point():
        return relative_difference(tensor, expected)
    loosest = expected.dtype
    if torch.is_autocast_enabled(expected.device.type):
        loosest = torch.get_autocast_dtype(expected.device.type)
    tolerance = TOLERANCE[loosest][is_gradient]
    floor = max(least * expected.numel() ** 0.5, torch.finfo(loosest).tiny / tolerance)
    return relative_difference(tensor, expected, 2, floor) / tolerance


@contextmanager
def _put_back(model: nn.Module) -> Iterator[None]:
    """Undoes the effects of a run on the model and on random generators: modes, attributes, buffers, their contents."""
    states = (random.getstate(), np.random.get_state())
    seen: set[int] = set()
    saved = [_Saved(vars(module), seen) for module in model.modules()]
    tensors = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    tensors += [
        (p, p.detach().clone()) for m in model.modules() if getattr(m, "max_norm", None) for p in m.parameters()
    ]
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            for one in saved:
                one.back()
            with torch.no_grad():
                for tensor, before in tensors:
                    if not torch.equal(tensor, before):
                        tensor.copy_(before)
            random.setstate(states[0])
            np.random.set_state(states[1])


class _Saved:
    """The present contents of a container, and of the containers in it."""

    def __init__(self, container: Any, seen: set[int]) -> None:
        self.container, self.copy = container, container.copy()
        seen.add(id(container))
        held = (
            container.values() if isinstance(container, dict) else () if isinstance(container, bytearray) else container
        )
        self.inside = []
        for value in held:
            inner = value if isinstance(value, CONTAINERS) else None
            if inner is None and not isinstance(value, OPAQUE):
                inner = getattr(value, "__dict__", None)
            if isinstance(inner, CONTAINERS) and id(inner) not in seen:
                self.inside.append(_Saved(inner, seen))

    def back(self) -> None:
        for one in self.inside:
            one.back()
        if isinstance(self.container, (list, bytearray)):
            self.container[:] = self.copy
            return
        self.container.clear()
        (self.container.extend if isinstance(self.container, deque) else self.container.update)(self.copy)
