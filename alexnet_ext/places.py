"""Where modules stand in a model, and which of them are known to run one right after another."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import fx, nn

RETURN_NEW = (
    *(nn.modules.conv._ConvNd, nn.Linear, nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm),
    *(nn.LocalResponseNorm, nn.MaxPool2d, nn.AvgPool2d),
)
"""Layers whose output is memory of its own. Any other's may be what it was given, or a view of it: what writes into the
one then writes into the other."""

Chain = list["Place"]
"""Places of one parent whose modules run in this order, each one's output read by the next one alone, as its input."""


class Place(NamedTuple):
    """``parent._modules[key]``, and its name in the whole model."""

    parent: nn.Module
    key: str
    name: str

    @property
    def module(self) -> nn.Module:
        found = self.parent._modules[self.key]
        assert found is not None
        return found


def every_place(model: nn.Module) -> Iterator[Place]:
    """Each place below ``model`` once, in the order of ``named_modules``; not inside of what is sealed."""
    seen: set[int] = set()

    def walk(parent: nn.Module, prefix: str) -> Iterator[Place]:
        seen.add(id(parent))
        for key, child in parent._modules.items():
            if child is None:
                continue
            yield Place(parent, key, prefix + key)
            if id(child) not in seen and not is_sealed(child):
                yield from walk(child, f"{prefix}{key}.")

    return iter(()) if is_sealed(model) else walk(model, "")


def is_sealed(module: nn.Module) -> bool:
    """Whether another tool owns what is inside: TorchScript, quantisation."""
    return isinstance(module, torch.jit.ScriptModule) or type(module).__module__.startswith("torch.ao.")


def find_chains(model: nn.Module, trace: bool) -> tuple[list[Chain], dict[nn.Module, str]]:
    """Every place below ``model``, in one chain each.

    An ``nn.Sequential`` says itself who follows whom. With ``trace``, so does every other module's ``forward``, as
    ``torch.fx`` sees it in training and in evaluation; the second result are those that it cannot trace, and why.
    """
    places = {place.name: place for place in every_place(model)}
    owners: dict[nn.Module, dict[str, Place]] = {}
    for place in places.values():
        owners.setdefault(place.parent, {})[place.key] = place
    readers: dict[str, set[str]] = defaultdict(set)  # of a place's output, and "" for anybody else
    sources: dict[str, set[str]] = defaultdict(set)  # of a place's input, likewise
    untraceable = {}
    for owner, below in owners.items():
        prefix = next(place.name.removesuffix(key) for key, place in below.items())
        if _runs_in_order(owner):
            names = ["", *(place.name for place in below.values()), ""]
            flows: Iterable[tuple[str, str]] = pairwise(names)
        elif trace:
            try:
                flows = [flow for training in (True, False) for flow in _traced(owner, prefix, training)]
            except Exception as error:  # whatever the module's own code raises when it is given proxies
                untraceable[owner] = str(error).strip().partition("\n")[0] or type(error).__name__
                continue
        else:
            continue
        for source, reader in flows:
            readers[source].add(reader)
            sources[reader].add(source)
    after = {}
    for name in places:
        reader = next(iter(readers[name])) if len(readers[name]) == 1 else ""
        # A layer may run many times if it is the same neighbour each time.
        if reader and sources[reader] == {name} and places[reader].parent is places[name].parent:
            after[name] = places[reader]
    inner = {place.name for place in after.values()}
    chains = []
    for name in places:
        if name not in inner:
            chain = [places[name]]
            while chain[-1].name in after:
                chain.append(after[chain[-1].name])
            chains.append(chain)
    return chains, untraceable


def _runs_in_order(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.Sequential)
        and type(module).forward is nn.Sequential.forward
        and "forward" not in vars(module)
    )


SWITCHES: tuple[tuple[Callable[[], bool], Callable[[bool], Any]], ...] = (
    (torch.is_grad_enabled, torch.set_grad_enabled),
    *(
        (partial(torch.is_autocast_enabled, device), partial(torch.set_autocast_enabled, device))
        for device in ("cpu", "cuda")
    ),
)
"""(is it on, switch it) of what code may switch around its calls, which no graph shows."""


def _modes() -> list[bool]:
    return [is_on() for is_on, _ in SWITCHES]


@contextmanager
def _switched(on: bool) -> Iterator[None]:
    before = _modes()
    try:
        for _, switch in SWITCHES:
            switch(on)
        yield
    finally:
        for (_, switch), value in zip(SWITCHES, before, strict=True):
            switch(value)


class _Shallow(fx.Tracer):
    """Sees one module's own code: the modules it calls are leaves. ``left_out`` are arguments, by fx's name for them,
    that are not given: forward is run with these values."""

    def __init__(self, left_out: dict[str, Any]) -> None:
        super().__init__()
        self.left_out = left_out
        self.modes = _modes()

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _modes() != self.modes:
            raise RuntimeError("it switches gradients or autocast")
        return super().create_node(*args, **kwargs)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def create_args_for_root(self, *args: Any, **kwargs: Any) -> tuple[Any, list[Any]]:
        function, given = super().create_args_for_root(*args, **kwargs)
        for i, value in enumerate(given):
            if isinstance(value, fx.Proxy) and value.node.target in self.left_out:
                self.graph.erase_node(value.node)
                given[i] = self.left_out[value.node.target]
        return function, given


def optional(owner: nn.Module) -> dict[str, Any]:
    """The arguments that a call of ``owner`` may leave out, by fx's name for them, and what they are then."""
    found: dict[str, Any] = {}
    for name, parameter in inspect.signature(type(owner).forward).parameters.items():
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            found[f"*{name}"] = ()
        elif parameter.kind is inspect.Parameter.VAR_KEYWORD:
            found[f"**{name}"] = {}
        elif parameter.default is not inspect.Parameter.empty:
            found[name] = parameter.default
    return found


def trace(owner: nn.Module, training: bool, left_out: dict[str, Any]) -> fx.Graph:
    """``owner.forward`` of its class, in training or in evaluation; the owner is left as it was.

    Raises whatever that code raises when it is given proxies, and RuntimeError for what a graph would not do: change
    the owner, switch gradients or autocast, ask for the type of an argument, which is no Tensor here.
    """
    code = getattr(inspect.unwrap(type(owner).forward), "__code__", None)
    if code is not None and "isinstance" in code.co_names:
        raise RuntimeError("it asks for types by isinstance")
    graphs = []
    for on in (False, True):  # whatever it switches them to, one of these is the other way
        with _switched(on):
            graphs.append(_trace(owner, training, left_out))
    if str(graphs[0]) != str(graphs[1]):
        raise RuntimeError("it asks whether gradients or autocast are on")
    return graphs[0]


def _trace(owner: nn.Module, training: bool, left_out: dict[str, Any]) -> fx.Graph:
    modes, attributes = {module: module.training for module in owner.modules()}, dict(vars(owner))
    copies = {name: buffer if buffer is None else buffer.clone() for name, buffer in owner._buffers.items()}
    try:
        owner.train(training)
        owner.__dict__["_buffers"] = dict(copies)
        before = dict(vars(owner))
        graph = _Shallow(left_out).trace(owner)
        now = vars(owner)
        if now.keys() - before.keys():  # the tracer keeps the tensors that forward makes in the owner
            raise RuntimeError("it makes or keeps tensors of its own")
        kept = all(now[name] is value for name, value in before.items()) and all(
            owner._buffers[name] is copy and (copy is None or copy._version == 0) for name, copy in copies.items()
        )
        if not kept:
            raise RuntimeError("it changes its own attributes")
        return graph
    finally:
        vars(owner).clear()
        vars(owner).update(attributes)
        for module, mode in modes.items():
            module.training = mode


def _traced(owner: nn.Module, prefix: str, training: bool) -> list[tuple[str, str]]:
    """(source, reader) for each input and each output of the modules that ``owner.forward`` calls; "" is anything that
    is not the only output of one module being the only input of another. What a call may leave out is there, is not,
    and is there alone."""
    able = optional(owner)
    ways = [able, {}, *({other: able[other] for other in able if other != name} for name in able)]
    return [flow for left_out in ways for flow in _flows(trace(owner, training, left_out), prefix)]


def _flows(graph: fx.Graph, prefix: str) -> list[tuple[str, str]]:

    def called(node: object) -> str:
        return prefix + str(node.target) if isinstance(node, fx.Node) and node.op == "call_module" else ""

    flows = []
    for node in graph.nodes:
        if not called(node):
            continue
        given = node.args[0] if len(node.args) == 1 and not node.kwargs else None
        alone = isinstance(given, fx.Node) and len(given.users) == 1
        flows.append((called(given) if alone else "", called(node)))
        for user in node.users:
            direct = len(node.users) == 1 and user.args == (node,) and not user.kwargs
            flows.append((called(node), called(user) if direct else ""))
    return flows
