"""The patterns that fused layers replace, and their places in a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from .. import nn as fused_nn
from .places import Place
from .survey import FUSED, Survey, obstacle

REPLACES = "_replaces"  # attribute of a fused layer: ((key in its parent, the layer that was there), ...)


class Pattern(NamedTuple):
    """Layers that one fused layer replaces if they run one right after another."""

    option: str
    kinds: tuple[type[nn.Module], ...]
    fused: type[Any]

    def __str__(self) -> str:
        return " -> ".join(kind.__name__ for kind in self.kinds)

    def fuse(self, *layers: nn.Module) -> nn.Module:
        """The fused layer, which shares the first layer's state. Raises ValueError for unsupported settings."""
        return fused_nn.sharing(self.fused, layers[0], **self.fused.takes(*layers[1:]))


# The first that applies is taken. ReLU is fused with the pooling and not with the convolution before it: this saves one
# pass over the activation, while a convolution's time is its own arithmetic.
PATTERNS = (
    Pattern("fused_block", (nn.Conv2d, nn.ReLU, nn.LocalResponseNorm, nn.MaxPool2d), fused_nn.Conv2dReLULRNMaxPool2d),
    Pattern("fused_block", (nn.Conv2d, nn.ReLU, nn.MaxPool2d, nn.LocalResponseNorm), fused_nn.Conv2dReLUMaxPool2dLRN),
    Pattern("relu_pool", (nn.ReLU, nn.MaxPool2d), fused_nn.ReLUMaxPool2d),
    Pattern("conv_relu", (nn.Conv2d, nn.ReLU), fused_nn.Conv2dReLU),
    Pattern("lrn", (nn.LocalResponseNorm,), fused_nn.LocalResponseNorm),
)


class Step(NamedTuple):
    """One replacement to make: ``layer`` in the first place, ``nn.Identity`` in the others."""

    pattern: Pattern
    places: tuple[Place, ...]
    layer: nn.Module

    @property
    def name(self) -> str:
        return self.places[0].name

    def put(self) -> None:
        stock = tuple(place.module for place in self.places)
        setattr(
            self.layer, REPLACES, tuple((place.key, module) for place, module in zip(self.places, stock, strict=True))
        )
        for place, module in zip(self.places, stock, strict=True):
            first = place is self.places[0]
            # A hook set on a placeholder, for example, is also set on the layer whose place it keeps.
            place.parent._modules[place.key] = self.layer if first else fused_nn.sharing(nn.Identity, module)

    def take_back(self) -> None:
        for place, (_, module) in zip(self.places, vars(self.layer)[REPLACES], strict=True):
            place.parent._modules[place.key] = module


class Refusal(NamedTuple):
    """A pattern that is present and left alone, and whether strict=True raises for it."""

    pattern: Pattern
    reason: str
    minded: bool


def match(
    known: Survey, options: dict[str, bool], asked: Callable[[Place], bool]
) -> tuple[list[Step], dict[Place, Refusal]]:
    """(the replacements to make, the first pattern refused at each place).

    ``options`` select the patterns to replace, ``asked`` decides whether a place may be replaced.
    """
    steps: list[Step] = []
    taken: dict[Place, Pattern] = {}
    refused: dict[Place, Refusal] = {}
    for pattern in PATTERNS:
        for chain in known.chains:
            for start in range(len(chain) - len(pattern.kinds) + 1):
                places = tuple(chain[start : start + len(pattern.kinds)])
                if places[0] in taken or not _is_made_of(places, pattern):
                    continue
                other = next((place for place in places if place in taken), None)
                minded, layer = False, None
                if not options[pattern.option]:
                    reason = f"{pattern.option}=False"
                elif other is not None:
                    reason = f"{other.name} is fused as {taken[other]}"
                elif not all(map(asked, places)):
                    reason = "filter_fn"
                elif reason := obstacle(known, chain, places):
                    minded = True
                else:
                    try:
                        layer = pattern.fuse(*(place.module for place in places))
                    except ValueError as error:  # a pool that no block supports
                        reason = str(error)
                if layer is not None:
                    steps.append(Step(pattern, places, layer))
                    taken |= dict.fromkeys(places, pattern)
                    continue
                for place in places:
                    refused.setdefault(place, Refusal(pattern, reason, minded))
    return steps, refused


def _is_made_of(places: tuple[Place, ...], pattern: Pattern) -> bool:
    return all(
        isinstance(place.module, kind) and not isinstance(place.module, FUSED)
        for place, kind in zip(places, pattern.kinds, strict=True)
    )
