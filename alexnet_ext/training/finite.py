"""``--detect-nan``: the first layer and operation whose result is no finite number."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .._errors import CommandError

LOSS = "the loss"  # what no layer computes
# Their memory has not been written yet.
UNWRITTEN = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


class NotFinite(CommandError):
    """An operation made a NaN or an infinity."""


class Finite(TorchDispatchMode):
    """Looks at the result of each operation of a step, forward and (with ``backward``) backward, and waits for it.

    Hooks before and after each layer know the layer of the forward, and note which nodes of autograd's graph it made,
    for the backward. The optimizer's step is not watched, as it may drop what is not finite: ``examine`` looks at the
    weights that it leaves.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, Tensor], backward: bool = True) -> None:
        super().__init__()
        self.model, self.parameters, self.backward = model, parameters, backward
        self.layers: list[tuple[str, set[Any]]] = []  # that run, and the nodes of their inputs
        self.makers: dict[Any, str] = {}  # the layer that made a node
        self.step = 0

    @contextmanager
    def watching(self, step: int) -> Iterator[None]:
        """Context manager around forward and backward of a step, numbered from 1. Raises NotFinite."""
        self.step, self.layers = step, []
        hooks = []
        for name, module in self.model.named_modules():
            if next(module.children(), None) is None:
                hooks.append(module.register_forward_pre_hook(lambda _, inputs, name=name: self._enter(name, inputs)))
                hooks.append(module.register_forward_hook(self._leave))
        try:
            with self:
                yield
        finally:
            for hook in hooks:
                hook.remove()
            self.makers.clear()

    def examine(self) -> None:
        """Look at the parameters after the update. Raises NotFinite."""
        for name, parameter in self.parameters.items():
            if not parameter.isfinite().all():
                raise NotFinite(f"step {self.step}: the update of {name} left {_kind(parameter)}; try a lower --lr")

    def _enter(self, name: str, inputs: Any) -> None:
        self.layers.append((name, _nodes(inputs)))

    def _leave(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        """After a layer: walk from its output's nodes to its inputs'."""
        name, known = self.layers.pop()
        found = list(_nodes(output))
        while found:
            node = found.pop()
            if node not in known:
                known.add(node)
                self.makers[node] = name
                found.extend(following for following, _ in node.next_functions if following is not None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.name().partition(".")[0].replace("::", ".")
        node = torch._C._current_autograd_node()  # None in the forward
        if name.split(".")[-1] in UNWRITTEN or not (self.backward or node is None):
            return result
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and not tensor.isfinite().all():
                raise NotFinite(self._told(name, node, tensor, tree_leaves((args, kwargs))))
        return result

    def _told(self, name: str, node: Any, result: Tensor, inputs: list[Any]) -> str:
        layer = self.layers[-1][0] if self.layers else LOSS
        direction = "forward"
        if node is not None:
            layer, direction = self.makers.get(node, LOSS), f"backward, {node.name()}"
        tensors = [tensor for tensor in inputs if isinstance(tensor, Tensor) and tensor.is_floating_point()]
        ranges = ", ".join(map(_range, itertools.islice(tensors, 4)))
        given = f" from {ranges}" if ranges else ""
        return f"step {self.step}: {name} in {layer} ({direction}) made {_kind(result)}{given}"


def _nodes(values: Any) -> set[Any]:
    """The nodes of autograd's graph that made these tensors."""
    tensors = (value for value in tree_leaves(values) if isinstance(value, Tensor))
    return {tensor.grad_fn for tensor in tensors} - {None}


def _kind(tensor: Tensor) -> str:
    return "a NaN" if tensor.isnan().any() else "an infinity"


def _range(tensor: Tensor) -> str:
    """The shape of a tensor, and its least and greatest value, or what is not finite in it."""
    shape = "x".join(map(str, tensor.shape)) or "one number"
    if not tensor.numel():
        return f"{shape}: nothing"
    if not tensor.isfinite().all():
        return f"{shape}: {_kind(tensor)} in it"
    low, high = tensor.detach().aminmax()
    return f"{shape}: {float(low):.4g} to {float(high):.4g}"
