"""Traces a module's own forward with ``torch.fx``, if it does nothing that a trace cannot show."""

from __future__ import annotations

import gc
import inspect
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from torch import fx, nn

from . import readers
from .places import Flow, every_place, is_sealed
from .watch import Identity, Read, Untraceable, Watch

WATCHES_TENSORS = {"backward", "register_hook", "register_post_accumulate_grad_hook", "requires_grad_", "retain_grad"}
"""Methods of a tensor that expose it, or its gradient, to later code."""


class Trace(NamedTuple):
    """A forward's graph, and the constants and functions that it depends on."""

    training: bool
    graph: fx.Graph
    reads: tuple[Read, ...]
    """Constants of the owner and of globals: the graph is valid while they are unchanged."""
    methods: frozenset[Identity]
    """The functions that ran."""


@contextmanager
def _stand_ins(owner: nn.Module) -> Iterator[dict[int, str]]:
    """Puts another object of the same class and state into each place below the owner; yields their names by ``id``.

    So a trace shows how the forward reaches a module. By the name of its place it will reach a replacement; by a list,
    an attribute or a variable it will not.
    """
    names, back = {}, []
    for place in list(every_place(owner)):
        module = place.module
        if not is_sealed(module):
            back.append((place, module))
            twin = object.__new__(type(module))
            object.__setattr__(twin, "__dict__", vars(module))
            place.parent._modules[place.key] = module = twin
        names[id(module)] = place.name
    try:
        yield names
    finally:
        for place, module in back:
            place.parent._modules[place.key] = module


class _Shallow(fx.Tracer):
    """Traces one module's own code: the modules it calls are leaves. ``left_out`` are optional arguments, by fx's name:
    forward is run with these values."""

    def __init__(self, left_out: dict[str, Any], names: dict[int, str]) -> None:
        super().__init__()
        self.left_out, self.names = left_out, names
        self.proxies: list[weakref.ref[fx.Proxy]] = []

    def create_node(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        if kind == "call_method" and target in WATCHES_TENSORS:
            raise Untraceable(f"it calls {target} of a tensor")
        return super().create_node(kind, target, *args, **kwargs)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        made = super().proxy(node)
        self.proxies.append(weakref.ref(made))
        return made

    def path_of_module(self, mod: nn.Module) -> str:
        if id(mod) not in self.names:
            raise Untraceable(f"it reaches a {type(mod).__name__} by another way than its name")
        return self.names[id(mod)]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def create_args_for_root(self, *args: Any, **kwargs: Any) -> tuple[Any, list[Any]]:
        function, given = super().create_args_for_root(*args, **kwargs)
        for i, value in enumerate(given):
            if isinstance(value, fx.Proxy) and value.node.target in self.left_out:
                self.graph.erase_node(value.node)
                given[i] = self.left_out[value.node.target]
        return function, given

    def outlived(self) -> bool:
        """Whether any code still holds a proxy."""
        for generation in (1, 2):  # fx itself leaves cycles; a full collection takes a tenth of a second
            if not any(made() is not None for made in self.proxies):
                return False
            gc.collect(generation)
        return any(made() is not None for made in self.proxies)


def optional(owner: nn.Module) -> dict[str, Any]:
    """The optional arguments of ``owner``'s forward, by fx's names, and their defaults."""
    found: dict[str, Any] = {}
    for name, parameter in inspect.signature(type(owner).forward).parameters.items():
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            found[f"*{name}"] = ()
        elif parameter.kind is inspect.Parameter.VAR_KEYWORD:
            found[f"**{name}"] = {}
        elif parameter.default is not inspect.Parameter.empty:
            found[name] = parameter.default
    return found


def trace(owner: nn.Module, training: bool, left_out: dict[str, Any]) -> Trace:
    """Trace the forward of ``owner``'s class, in training or in evaluation; the owner is left as it was.

    Raises Untraceable for an effect that a graph would not have, and any error that the code raises on proxies.
    """
    if readers.replaced_forward(owner) is not None:
        raise Untraceable("it was replaced")
    modes, attributes = {module: module.training for module in owner.modules()}, dict(vars(owner))
    copies = {name: buffer if buffer is None else buffer.clone() for name, buffer in owner._buffers.items()}
    watch = Watch(owner)
    try:
        owner.train(training)
        owner.__dict__["_buffers"] = dict(copies)
        before = dict(vars(owner))
        with ExitStack() as stack:
            tracer = _Shallow(left_out, stack.enter_context(_stand_ins(owner)))
            stack.enter_context(watch.over(type(owner).forward))
            graph = tracer.trace(owner)
        now = vars(owner)
        if now.keys() - before.keys():  # the tracer stores tensors that forward makes in the owner
            raise Untraceable("it makes or keeps tensors of its own")
        kept = all(now[name] is value for name, value in before.items()) and all(
            owner._buffers[name] is copy and (copy is None or copy._version == 0) for name, copy in copies.items()
        )
        if not kept:
            raise Untraceable("it changes its own attributes")
        if tracer.outlived():
            raise Untraceable("it keeps what it computes")
        return Trace(training, graph, tuple(watch.reads.values()), frozenset(watch.methods))
    finally:
        vars(owner).clear()
        vars(owner).update(attributes)
        for module, mode in modes.items():
            module.training = mode


def first_line(error: Exception) -> str:
    """The first line of an error's message."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def every_trace(owner: nn.Module) -> list[Trace]:
    """Trace the owner's forward in training and in evaluation: with no optional argument, with all, and with each one
    alone. Each of its attributes that is a bool is also tried with the opposite value."""
    able = optional(owner)
    # The first is how most calls are made; a rewritten forward is made from it.
    ways = [able, {}, *({other: able[other] for other in able if other != name} for name in able)]
    different = {tuple(way): way for way in ways}.values()
    found = [trace(owner, training, left_out) for left_out in different for training in (True, False)]
    flags = {read.name for one in found for read in one.reads if read.scope is None and isinstance(read.value, bool)}
    for name in sorted(flags & vars(owner).keys()):
        value = vars(owner)[name]
        try:
            vars(owner)[name] = not value
            found += [trace(owner, training, able) for training in (True, False)]
        except Untraceable:
            raise
        except Exception:  # the model lacks the parts that this flag turns on
            continue
        finally:
            vars(owner)[name] = value
    return found


def flows(graph: fx.Graph, name_of: Callable[[str], str]) -> list[Flow]:
    """The flows between the modules that a forward calls; ``name_of`` maps fx's name of a place to its name."""

    def called(node: object) -> str:
        return name_of(str(node.target)) if isinstance(node, fx.Node) and node.op == "call_module" else ""

    found = []
    for node in graph.nodes:
        if not called(node):
            continue
        given = node.args[0] if len(node.args) == 1 and not node.kwargs else None
        alone = isinstance(given, fx.Node) and len(given.users) == 1
        found.append((called(given) if alone else "", called(node)))
        for user in node.users:
            direct = len(node.users) == 1 and user.args == (node,) and not user.kwargs
            found.append((called(node), called(user) if direct else ""))
    return found
