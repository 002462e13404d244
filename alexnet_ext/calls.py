"""Calls of ``torch.nn.functional`` in a module's ``forward``: fused in a traced copy, which stands in for it."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from types import CodeType, MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from . import ops
from .nn import not_scriptable
from .places import RETURN_NEW, optional, trace

RELUS = (F.relu, F.relu_, torch.relu, torch.relu_)


class Rewritten:
    """Takes the place of ``owner.forward``: the same code as ``torch.fx`` saw it, with fused calls.

    It looks everything up in ``owner`` as the original does, so a layer or a parameter replaced later is the one used.
    Calls that give an argument which may be left out, or one that is no tensor, run the original: what that one does
    with it, no trace shows.
    """

    def __init__(self, owner: nn.Module, options: dict[str, bool]) -> None:
        self.owner, self.options = owner, options
        self.found: dict[bool, list[str]] = {}
        self.functions: dict[bool, Callable[..., Any]] = {}
        for training in (True, False):
            self.prepare(training)

    def prepare(self, training: bool) -> None:
        """Make the function for this mode. Raises whatever the owner's code raises when it is traced."""
        able = optional(self.owner)
        self.arguments = len(self.__signature__.parameters) - len(able)
        graph = trace(self.owner, training, left_out=able)
        self.found[training] = fuse_calls(graph, self.owner, self.options)
        # A method of a class of its own, which takes any self: here the owner.
        self.functions[training] = type(fx.GraphModule(self.owner, graph)).forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        training = self.owner.training
        if training not in self.functions:  # read from a pickle, which holds no code
            self.prepare(training)
        traced = len(args) + len(kwargs) == self.arguments
        if not traced or not all(isinstance(value, torch.Tensor) for value in (*args, *kwargs.values())):
            return type(self.owner).forward(self.owner, *args, **kwargs)
        return self.functions[training](self.owner, *args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(MethodType(type(self.owner).forward, self.owner))

    @property
    def __code__(self) -> CodeType:
        """Where the code stands, which ``torch.export`` asks a forward for."""
        return type(self.owner).forward.__code__

    @property
    def __globals__(self) -> Any:
        """What names in the code stand for: ``torch.jit.script`` insists on it, others ask whether it is there."""
        raise AttributeError(not_scriptable(f"the traced forward of {type(self.owner).__name__}"))

    def __deepcopy__(self, memo: dict[int, Any]) -> Rewritten:
        twin = Rewritten.__new__(Rewritten)
        memo[id(self)] = twin
        vars(twin).update(vars(self), owner=copy.deepcopy(self.owner, memo))
        return twin

    def __getstate__(self) -> tuple[nn.Module, dict[str, bool]]:
        return self.owner, self.options

    def __setstate__(self, state: tuple[nn.Module, dict[str, bool]]) -> None:
        self.owner, self.options = state
        self.found, self.functions = {}, {}


def fuse_calls(graph: fx.Graph, owner: nn.Module, options: dict[str, bool]) -> list[str]:
    """Fuse in place what there is to fuse; a pattern for each."""
    found = []
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if options["lrn"] and node.target is F.local_response_norm:
            node.target = ops.local_response_norm
            found.append("local_response_norm")
        relu = node.args[0] if node.args else None
        rest = {name: value for name, value in node.kwargs.items() if name != "return_indices"}
        plain = node.target is F.max_pool2d and node.kwargs.get("return_indices") is False
        if options["relu_pool"] and plain and isinstance(relu, fx.Node) and _is_relu(relu, owner):
            with graph.inserting_before(node):
                fused = graph.call_function(ops.relu_max_pool2d, (relu.args[0], *node.args[1:]), rest)
            node.replace_all_uses_with(fused)
            graph.erase_node(node)
            graph.erase_node(relu)
            found.append("relu -> max_pool2d")
    return found


def _is_relu(node: fx.Node, owner: nn.Module) -> bool:
    """Whether a node is a ReLU that one other node alone reads, and writes nothing that a third one could see."""
    given = node.args[0] if len(node.args) == 1 else None
    if len(node.users) != 1 or not isinstance(given, fx.Node):
        return False
    if node.op == "call_function" and node.target in RELUS:
        writes = node.kwargs.get("inplace", node.target in (F.relu_, torch.relu_))
    elif node.op == "call_method" and node.target in ("relu", "relu_"):
        writes = node.target == "relu_"
    else:
        return False
    if not writes:
        return True
    fresh = given.op == "call_module" and isinstance(owner.get_submodule(str(given.target)), RETURN_NEW)
    return fresh and len(given.users) == 1


def rewrite(owner: nn.Module, options: dict[str, bool]) -> Rewritten | None:
    """A forward for ``owner`` with its calls fused, or None where there are none or the forward cannot be traced."""
    if "forward" in vars(owner):
        return None
    try:
        rewritten = Rewritten(owner, options)
    except Exception:  # find_chains has said why
        return None
    return rewritten if any(rewritten.found.values()) else None


def is_own_code(module: nn.Module) -> bool:
    """Whether a module's class is neither PyTorch's nor this package's layers'."""
    return not type(module).__module__.startswith(("torch.", "alexnet_ext."))
