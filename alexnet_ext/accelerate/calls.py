"""Fuses calls of ``torch.nn.functional`` in a traced copy of a module's ``forward``, which then replaces it."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from types import CodeType, MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from .. import ops
from ..nn import not_scriptable
from .survey import RETURN_NEW, has_hooks, is_replaced
from .tracing import Trace, first_line, optional, trace
from .watch import Read

RELUS = (F.relu, F.relu_, torch.relu, torch.relu_)


class Rewritten:
    """Takes the place of ``owner.forward``: the same code as ``torch.fx`` saw it, with fused calls.

    It looks everything up in ``owner`` as the original does, so it uses a layer or a parameter that is replaced later.
    The original runs instead where the trace does not hold: if a call gives an optional argument or one that is no
    tensor, or if an attribute, a global or a forward has changed.
    """

    stands_in = True

    def __init__(self, owner: nn.Module, options: dict[str, bool], traces: Sequence[Trace] = ()) -> None:
        self.owner, self.options = owner, options
        self.found: dict[bool, list[str]] = {}
        self.left: dict[bool, list[tuple[str, str]]] = {}
        self.functions: dict[bool, Callable[..., Any]] = {}
        self.reads: dict[bool, tuple[Read, ...]] = {}
        for training in (True, False):
            self.prepare(training, next((one for one in traces if one.training == training), None))

    def prepare(self, training: bool, known: Trace | None = None) -> None:
        """Make the function for this mode, from a trace without optional arguments if there is one.

        Raises any error that the owner's code raises when it is traced.
        """
        able = optional(self.owner)
        self.forward = type(self.owner).forward
        self.arguments = len(self.__signature__.parameters) - len(able)
        _, graph, self.reads[training], _ = known or trace(self.owner, training, left_out=able)
        self.found[training], self.left[training] = fuse_calls(graph, self.owner, self.options)
        # GraphModule generates a class; take its forward unbound, and call it with the owner as self.
        self.functions[training] = type(fx.GraphModule(self.owner, graph)).forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        training = self.owner.training
        if training not in self.functions:  # unpickled: a pickle holds no code
            self.prepare(training)
        as_traced = (
            len(args) + len(kwargs) == self.arguments
            and all(isinstance(value, torch.Tensor) for value in (*args, *kwargs.values()))
            and type(self.owner).forward is self.forward
            and all(read.holds(self.owner) for read in self.reads[training])
        )
        if not as_traced:
            return type(self.owner).forward(self.owner, *args, **kwargs)
        return self.functions[training](self.owner, *args, **kwargs)

    def attach(self) -> None:
        """Replace the owner's forward from here on."""
        self.owner.forward = self
        self.owner._replicate_for_data_parallel = self.replicate  # type: ignore[method-assign]

    def detach(self) -> None:
        del self.owner.forward, self.owner._replicate_for_data_parallel

    def replicate(self) -> nn.Module:
        """For ``nn.DataParallel``: a copy of the module's dictionary, here with a forward of its own."""
        replica = type(self.owner)._replicate_for_data_parallel(self.owner)
        twin = self._of(replica)
        vars(replica).update(forward=twin, _replicate_for_data_parallel=twin.replicate)
        return replica

    def _of(self, owner: nn.Module) -> Rewritten:
        twin = Rewritten.__new__(Rewritten)
        vars(twin).update(vars(self), owner=owner)
        return twin

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(MethodType(type(self.owner).forward, self.owner))

    @property
    def __code__(self) -> CodeType:
        """The original's code, as ``torch.export`` asks a forward where its code is."""
        return type(self.owner).forward.__code__

    @property
    def __globals__(self) -> Any:
        """Refused: ``torch.jit.script`` requires the globals of a forward, others only look whether it has them."""
        raise AttributeError(not_scriptable(f"the traced forward of {type(self.owner).__name__}"))

    def __deepcopy__(self, memo: dict[int, Any]) -> Rewritten:
        memo[id(self)] = twin = self._of(self.owner)
        twin.owner = copy.deepcopy(self.owner, memo)
        return twin

    def __getstate__(self) -> tuple[nn.Module, dict[str, bool]]:
        return self.owner, self.options

    def __setstate__(self, state: tuple[nn.Module, dict[str, bool]]) -> None:
        self.owner, self.options = state
        self.found, self.left, self.functions, self.reads = {}, {}, {}, {}


def fuse_calls(graph: fx.Graph, owner: nn.Module, options: dict[str, bool]) -> tuple[list[str], list[tuple[str, str]]]:
    """Fuse calls in place. Returns (the patterns fused, (pattern, reason) for each one left alone)."""
    found, left = [], []
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        rest = [
            *node.args[1:],
            *(value for name, value in node.kwargs.items() if name not in ("input", "return_indices")),
        ]
        fixed = not any(isinstance(value, fx.Node) for value in rest)
        if options["lrn"] and node.target is F.local_response_norm:
            if fixed:
                node.args, node.kwargs = _with_x(node)
                node.target = ops.local_response_norm
                found.append("local_response_norm")
            else:
                left.append(("local_response_norm", "its size, alpha, beta or k is computed or learned"))
        relu = node.args[0] if node.args else None
        plain = node.target is F.max_pool2d and node.kwargs.get("return_indices") is False and len(node.args) < 7
        if options["relu_pool"] and fixed and plain and isinstance(relu, fx.Node) and _is_relu(relu, owner):
            settings = {name: value for name, value in node.kwargs.items() if name != "return_indices"}
            # At the ReLU: its input may be written into between it and the pooling.
            with graph.inserting_before(relu):
                fused = graph.call_function(ops.relu_max_pool2d, (relu.args[0], *node.args[1:]), settings)
            node.replace_all_uses_with(fused)
            graph.erase_node(node)
            graph.erase_node(relu)
            found.append("relu -> max_pool2d")
    return found, left


def _with_x(node: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call's arguments, with its input first: our op has another name for it."""
    kwargs = dict(node.kwargs)
    return (node.args if node.args else (kwargs.pop("input"),)), kwargs


def _is_relu(node: fx.Node, owner: nn.Module) -> bool:
    """Whether a node is a ReLU that only one other node reads, and that writes nothing a third one could see."""
    given = node.args[0] if len(node.args) == 1 else None
    if len(node.users) != 1 or not isinstance(given, fx.Node):
        return False
    if node.op == "call_function" and node.target in RELUS:
        writes = node.kwargs.get("inplace", node.target in (F.relu_, torch.relu_))
    elif node.op == "call_method" and node.target in ("relu", "relu_"):
        writes = node.target == "relu_"
    else:
        return False
    if writes is False:
        return True
    if given.op != "call_module" or len(given.users) != 1:
        return False
    before = owner.get_submodule(str(given.target))
    return type(before) in RETURN_NEW and not has_hooks(before) and not is_replaced(before)


def rewrite(owner: nn.Module, options: dict[str, bool], traces: Sequence[Trace] = ()) -> Rewritten | str:
    """A forward for ``owner`` with its calls fused, or why it cannot be traced; ``traces`` are its traces, if any."""
    try:
        return Rewritten(owner, options, traces)
    except Exception as error:  # its code may raise anything on proxies
        return first_line(error)
