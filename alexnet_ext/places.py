"""Where modules stand in a model, and which of them are known to run one right after another."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import fx, nn

Chain = list["Place"]
"""Places whose modules run in this order, each one's output being the next one's only input and read by it alone."""


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


def chains_of_sequentials(model: nn.Module) -> list[Chain]:
    """One chain for each ``nn.Sequential``, one of length 1 for every other place."""
    chains: dict[nn.Module | Place, Chain] = {}
    for place in every_place(model):
        chains.setdefault(place.parent if _runs_in_order(place.parent) else place, []).append(place)
    return list(chains.values())


def _runs_in_order(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.Sequential)
        and type(module).forward is nn.Sequential.forward
        and "forward" not in vars(module)
    )


def chains_of_traces(model: nn.Module, leaves: tuple[type[nn.Module], ...]) -> list[Chain]:
    """Chains that ``torch.fx`` finds in ``model.forward``, in training and in evaluation alike.

    Raises RuntimeError where the model cannot be traced.
    """
    following = [_following(model, leaves, training) for training in (True, False)]
    after: dict[str, str] = {}
    for a, b in following[0].items() | following[1].items():
        # A module that one of the two does not run (None: an auxiliary head in evaluation) says nothing there.
        if b and all(found.get(a, b) == b and (a in found or b not in found) for found in following):
            after[a] = b
    places = {place.name: place for place in every_place(model)}
    inner = set(after.values())
    chains = []
    for name in places:
        if name in inner:
            continue
        chain = [places[name]]
        while chain[-1].name in after:
            chain.append(places[after[chain[-1].name]])
        chains.append(chain)
    return chains


def _following(model: nn.Module, leaves: tuple[type[nn.Module], ...], training: bool) -> dict[str, str]:
    """For each module that runs: the name of the one that alone reads its output, "" where there is none."""

    class Tracer(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return isinstance(m, leaves) or super().is_leaf_module(m, module_qualified_name)

    modes = {module: module.training for module in model.modules()}
    try:
        model.train(training)
        graph = Tracer().trace(model)
    except Exception as error:  # whatever the model's own code raises when it is given proxies
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise RuntimeError(f"method='fx' cannot trace {type(model).__name__}: {reason}") from error
    finally:
        for module, mode in modes.items():
            module.training = mode
    readers: dict[str, set[str]] = {}
    sources: dict[str, set[str]] = {}
    for node in graph.nodes:
        if node.op != "call_module":
            continue
        users = [user for user in node.users if user.op == "call_module" and user.args == (node,) and not user.kwargs]
        alone = len(users) == len(node.users) == 1
        readers.setdefault(str(node.target), set()).add(str(users[0].target) if alone else "")
        given = node.args[0] if len(node.args) == 1 and not node.kwargs else None
        source = ""
        if isinstance(given, fx.Node) and given.op == "call_module" and len(given.users) == 1:
            source = str(given.target)
        sources.setdefault(str(node.target), set()).add(source)
    # A layer may run many times if it is the same neighbour each time.
    following = {}
    for name, found in readers.items():
        reader = next(iter(found)) if len(found) == 1 else ""
        following[name] = reader if sources.get(reader) == {name} else ""
    return following
