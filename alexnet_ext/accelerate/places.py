"""The places of modules in a model, and the modules known to run one right after another."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import nn

Chain = list["Place"]
"""Places of one parent whose modules run in this order. Only the next one reads each output, as its input."""

Flow = tuple[str, str]
"""(source, reader): names of places; the output of the first module is the input of the second. "" at either end is
anything else: several readers, other code, the model's own input."""


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
    """Each place below ``model`` once, in the order of ``named_modules``; nothing inside of sealed modules."""
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


def by_parent(places: Iterable[Place]) -> dict[nn.Module, list[Place]]:
    """These places, grouped by parent."""
    found: dict[nn.Module, list[Place]] = defaultdict(list)
    for place in places:
        found[place.parent].append(place)
    return found


def is_sealed(module: nn.Module) -> bool:
    """Whether another tool owns the inside of a module: TorchScript, quantisation."""
    return isinstance(module, torch.jit.ScriptModule) or type(module).__module__.startswith("torch.ao.")


def runs_in_order(module: nn.Module) -> bool:
    """Whether a module's forward is that of ``nn.Sequential``, which runs its layers in their order."""
    return (
        isinstance(module, nn.Sequential)
        and type(module).forward is nn.Sequential.forward
        and "forward" not in vars(module)
    )


def in_order(places: Iterable[Place]) -> list[Flow]:
    """The flows of an ``nn.Sequential`` with these places."""
    return list(pairwise(["", *(place.name for place in places), ""]))


def chains(places: Iterable[Place], flows: Iterable[Flow]) -> list[Chain]:
    """Every place, in one chain each."""
    named = {place.name: place for place in places}
    readers: dict[str, set[str]] = defaultdict(set)
    sources: dict[str, set[str]] = defaultdict(set)
    for source, reader in flows:
        readers[source].add(reader)
        sources[reader].add(source)
    after = {}
    for name, place in named.items():
        reader = next(iter(readers[name])) if len(readers[name]) == 1 else ""
        # A layer may run many times if it is the same neighbour each time.
        if reader and sources[reader] == {name} and named[reader].parent is place.parent:
            after[name] = named[reader]
    inner = {place.name for place in after.values()}
    found = []
    for name, place in named.items():
        if name not in inner:
            chain = [place]
            while chain[-1].name in after:
                chain.append(after[chain[-1].name])
            found.append(chain)
    return found
