"""Where modules stand in a model, and which of them are known to run one right after another."""

from __future__ import annotations

from collections import Counter
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
    chains: list[Chain] = []
    for place in every_place(model):
        if chains and chains[-1][0].parent is place.parent and _runs_in_order(place.parent):
            chains[-1].append(place)
        else:
            chains.append([place])
    return chains


def _runs_in_order(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.Sequential)
        and type(module).forward is nn.Sequential.forward
        and "forward" not in vars(module)
    )


def chains_of_traces(model: nn.Module, leaves: tuple[type[nn.Module], ...]) -> list[Chain]:
    """Chains that ``torch.fx`` finds in ``model.forward``, in training and in evaluation alike.

    A module that runs twice is in no chain with others. Raises RuntimeError where the model cannot be traced.
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
    calls = [node for node in graph.nodes if node.op == "call_module"]
    times = Counter(str(node.target) for node in calls)
    following = {}
    for node in calls:
        reader = next(iter(node.users)) if len(node.users) == 1 else None
        alone = (
            reader is not None
            and reader.op == "call_module"
            and reader.args == (node,)
            and not reader.kwargs
            and times[str(node.target)] == times[str(reader.target)] == 1
        )
        following[str(node.target)] = str(reader.target) if reader is not None and alone else ""
    return following
