"""Puts the fused layers into anybody's model, in place, and takes them out again.

A fused layer stands where the first of its layers stood and ``nn.Identity`` in the places of the rest, so indices,
lengths, state_dict keys and the Parameter objects stay what they were: optimizers, checkpoints and DDP do not
notice. The layers it replaces lie in the fused layer itself, out of sight of ``modules()``, and so a copy or a
pickle of an accelerated model can be restored too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.utils import parametrize

from . import nn as fused_nn
from .calls import Rewritten, is_own_code, rewrite
from .places import RETURN_NEW, Chain, Place, every_place, find_chains, is_sealed

FilterFn = Callable[[nn.Module, str], bool]

STOCK = (nn.Conv2d, nn.ReLU, nn.LocalResponseNorm, nn.MaxPool2d)
FUSED = tuple(
    kind for kind in vars(fused_nn).values() if isinstance(kind, type) and kind.__module__ == fused_nn.__name__
)
REPLACES = "_replaces"  # attribute of a fused layer: ((key in its parent, the layer that stood there), ...)


class Pattern(NamedTuple):
    """Layers that one fused layer replaces where they run one right after another."""

    option: str
    kinds: tuple[type[nn.Module], ...]
    fuse: Callable[..., nn.Module]

    def __str__(self) -> str:
        return " -> ".join(kind.__name__ for kind in self.kinds)


# The first that applies is taken. ReLU goes with pooling rather than with the convolution before it: there the
# activation is read and written once less, while a convolution's time is its own arithmetic.
PATTERNS = (
    Pattern(
        "fused_block",
        (nn.Conv2d, nn.ReLU, nn.LocalResponseNorm, nn.MaxPool2d),
        lambda conv, _, norm, pool: fused_nn.sharing(
            fused_nn.Conv2dReLULRNMaxPool2d, conv, **fused_nn.Conv2dReLULRNMaxPool2d.block_settings(norm, pool)
        ),
    ),
    Pattern(
        "fused_block",
        (nn.Conv2d, nn.ReLU, nn.MaxPool2d, nn.LocalResponseNorm),
        lambda conv, _, pool, norm: fused_nn.sharing(
            fused_nn.Conv2dReLUMaxPool2dLRN, conv, **fused_nn.Conv2dReLUMaxPool2dLRN.block_settings(norm, pool)
        ),
    ),
    Pattern("relu_pool", (nn.ReLU, nn.MaxPool2d), lambda _, pool: fused_nn.sharing(fused_nn.ReLUMaxPool2d, pool)),
    Pattern("conv_relu", (nn.Conv2d, nn.ReLU), lambda conv, _: fused_nn.sharing(fused_nn.Conv2dReLU, conv)),
    Pattern("lrn", (nn.LocalResponseNorm,), lambda norm: fused_nn.sharing(fused_nn.LocalResponseNorm, norm)),
)


class Row(NamedTuple):
    """One line of a report."""

    name: str
    """The first of the layers, as ``named_modules`` calls it."""
    pattern: str
    """What was looked at, as in ``"Conv2d -> ReLU"``."""
    action: str
    """``"fused"``, ``"already fused"`` or ``"left alone"``."""
    reason: str
    """Why it was left alone, else empty."""


class Report(tuple[Row, ...]):
    """What ``accelerate`` did: the rows, one for each pattern fused and each Conv2d, LocalResponseNorm and MaxPool2d
    left alone. Prints as a table; ``as_dicts()`` is for JSON."""

    __slots__ = ()

    def as_dicts(self) -> list[dict[str, str]]:
        """The rows as dictionaries of strings."""
        return [row._asdict() for row in self]

    def __str__(self) -> str:
        lines = [Row._fields, *self]
        widths = [max(len(line[i]) for line in lines) for i in range(len(Row._fields))]
        return "\n".join(
            "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in lines
        )


class _Step(NamedTuple):
    """One replacement to make."""

    pattern: Pattern
    places: tuple[Place, ...]
    layer: nn.Module


class _Refusal(NamedTuple):
    """A pattern that is there and is left alone, and whether strict=True minds."""

    pattern: Pattern
    reason: str
    minded: bool


_Asked = Callable[[tuple[Place, ...]], bool]


def accelerate(
    model: nn.Module,
    *,
    lrn: bool = True,
    relu_pool: bool = True,
    conv_relu: bool = True,
    fused_block: bool = True,
    filter_fn: FilterFn | None = None,
    strict: bool = False,
    method: str = "modules",
) -> Report:
    """Replace stock layers of ``model`` by fused ones, in place; ``restore`` undoes it.

    ``LocalResponseNorm`` anywhere; ``ReLU -> MaxPool2d``, ``Conv2d -> ReLU`` and both orders of ``Conv2d -> ReLU ->
    LocalResponseNorm -> MaxPool2d`` where one layer's output is the next one's input and nobody else's. Results and
    gradients stay what they were, but for the differences that the README names. Twice is as once.

    Args:
        model: any module, on any device, in training or not, wrapped (DDP, FSDP2) or not.
        lrn, relu_pool, conv_relu, fused_block: what to replace; ``fused_block`` are the two of four layers.
        filter_fn: ``filter_fn(module, name)`` is asked for each layer of a pattern; False leaves the pattern alone.
        strict: raise where a pattern is there and is left alone for a reason that is not an argument's.
        method: ``"modules"`` takes layers for neighbours that stand side by side in one ``nn.Sequential``, which it
            trusts to be run as a whole: where code of yours runs its layers one by one and keeps what is between,
            exclude them by ``filter_fn``. ``"fx"`` also traces each other module's own ``forward`` with ``torch.fx``,
            in training and in evaluation: it takes layers of that module for neighbours that it calls one after the
            other, and where it calls ``F.local_response_norm``, or ``F.relu`` and then ``F.max_pool2d``, a traced copy
            with fused calls stands in for it, where the call gives no argument that may be left out. What the code of
            such a ``forward`` decides by other things than its inputs and ``self.training`` (a random number, a flag)
            is then decided for good.

    Returns:
        The report: what was fused, and each Conv2d, LocalResponseNorm and MaxPool2d left alone, with the reason: hooks,
        parametrizations, a shared module or weight, a subclass, ``return_indices``, quantised or scripted modules, an
        output between that somebody reads, a ``forward`` that cannot be traced.

    Raises:
        TypeError: model is no module. ValueError: an unknown method.
        RuntimeError: ``strict`` and something is left alone; nothing is replaced then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if method not in ("modules", "fx"):
        raise ValueError(f"method must be 'modules' or 'fx', got {method!r}")
    chains, untraceable = find_chains(model, trace=method == "fx")
    options = {"lrn": lrn, "relu_pool": relu_pool, "conv_relu": conv_relu, "fused_block": fused_block}
    shared, read = _shared(model), _read_outputs(model)
    steps, refused = _match(
        chains,
        options,
        obstacle=lambda chain, places: _obstacle(chain, places, shared, read),
        asked=lambda places: filter_fn is None or all(filter_fn(place.module, place.name) for place in places),
    )
    if strict and any(refusal.minded for refusal in refused.values()):
        minded = (f"{place.name} ({r.pattern}): {r.reason}" for place, r in refused.items() if r.minded)
        raise RuntimeError("strict=True and left alone: " + "; ".join(minded))
    rows = _rows(model, chains, untraceable, steps, refused)
    for step in steps:
        replaced = tuple((place.key, place.module) for place in step.places)
        setattr(step.layer, REPLACES, replaced)
        for place in step.places:
            placeholder = nn.Identity().train(place.module.training)
            place.parent._modules[place.key] = step.layer if place is step.places[0] else placeholder
    if method == "fx":
        rows += _rewrite_forwards(model, options, filter_fn)
    return Report(rows)


def _rewrite_forwards(model: nn.Module, options: dict[str, bool], filter_fn: FilterFn | None) -> list[Row]:
    rows = []
    for name, owner in model.named_modules():
        if not is_own_code(owner) or (filter_fn is not None and not filter_fn(owner, name)):
            continue
        called = f"{name}.forward" if name else "forward"
        if isinstance(vars(owner).get("forward"), Rewritten):
            rows.append(Row(called, "calls", "already fused", ""))
        elif (rewritten := rewrite(owner, options)) is not None:
            owner.forward = rewritten
            patterns = dict.fromkeys(pattern for found in rewritten.found.values() for pattern in found)
            rows += [Row(called, pattern, "fused", "") for pattern in patterns]
    return rows


def restore(model: nn.Module) -> None:
    """Put the very modules back that ``accelerate`` replaced in ``model`` (or in what it was copied from).

    They are in training or not as their replacements are now. Raises RuntimeError, with nothing restored, where a
    replacement was itself replaced or parametrized since.
    """
    _restore(model, keep={})


@contextmanager
def accelerated(model: nn.Module, **options: Any) -> Iterator[Report]:
    """``accelerate(model, **options)`` for the length of a ``with`` block; gives the report.

    At its end what this block replaced is restored, not what was fused before.
    """
    before = {id(found): found for module in model.modules() for found in (module, vars(module).get("forward"))}
    report = accelerate(model, **options)
    try:
        yield report
    finally:
        _restore(model, keep=before)


def _restore(model: nn.Module, keep: dict[int, object]) -> None:
    """Undo everything but the layers and forwards in ``keep``, which has them by id."""
    back: list[tuple[nn.Module, str, nn.Module]] = []
    for parent in model.modules():
        for key, fused in parent._modules.items():
            if fused is None or id(fused) in keep or REPLACES not in vars(fused):
                continue
            places = vars(fused)[REPLACES]
            if key != places[0][0]:
                raise RuntimeError(f"cannot restore {places[0][0]!r}: its layer was moved to {key!r} since")
            if type(fused) not in FUSED:
                raise RuntimeError(
                    f"cannot restore {key!r}: it is a {type(fused).__name__} now, remove what changed it"
                )
            for other, stock in places:
                now = parent._modules.get(other)
                if now is not fused and type(now) is not nn.Identity:
                    raise RuntimeError(f"cannot restore {other!r}: a {type(now).__name__} stands there now")
                back.append((parent, other, stock))
    for module in model.modules():
        forward = vars(module).get("forward")
        if isinstance(forward, Rewritten) and id(forward) not in keep:
            del module.forward
    for parent, key, stock in back:
        replacement = parent._modules[key]
        assert replacement is not None
        stock.training = replacement.training
        parent._modules[key] = stock


def _match(
    chains: list[Chain], options: dict[str, bool], obstacle: Callable[[Chain, tuple[Place, ...]], str], asked: _Asked
) -> tuple[list[_Step], dict[Place, _Refusal]]:
    """(replacements to make, by place the first pattern that was there and was refused)."""
    steps: list[_Step] = []
    taken: dict[Place, Pattern] = {}
    refused: dict[Place, _Refusal] = {}
    for pattern in PATTERNS:
        for chain in chains:
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
                elif not asked(places):
                    reason = "filter_fn"
                elif reason := obstacle(chain, places):
                    minded = True
                else:
                    try:
                        layer = pattern.fuse(*(place.module for place in places))
                    except ValueError as error:  # a pool that no block does
                        reason = str(error)
                if layer is not None:
                    steps.append(_Step(pattern, places, layer))
                    taken |= dict.fromkeys(places, pattern)
                    continue
                for place in places:
                    refused.setdefault(place, _Refusal(pattern, reason, minded))
    return steps, refused


def _rows(
    model: nn.Module,
    chains: list[Chain],
    untraceable: dict[nn.Module, str],
    steps: list[_Step],
    refused: dict[Place, _Refusal],
) -> list[Row]:
    starts = {step.places[0]: step.pattern for step in steps}
    inside = {place for step in steps for place in step.places[1:]}
    position = {place: (chain, i) for chain in chains for i, place in enumerate(chain)}
    rows = []
    if isinstance(model, STOCK) or is_sealed(model):
        rows.append(Row("", type(model).__name__, "left alone", _sealed(model) or "it is the model itself"))
    for place in every_place(model):
        name, kind = place.name, type(place.module).__name__
        if place in starts:
            rows.append(Row(name, str(starts[place]), "fused", ""))
        elif isinstance(place.module, FUSED):
            rows.append(Row(name, kind, "already fused", ""))
        elif place in inside or isinstance(place.module, nn.ReLU):
            continue
        elif place in refused:
            rows.append(Row(name, str(refused[place].pattern), "left alone", refused[place].reason))
        elif reason := _no_pattern(place, *position[place], untraceable.get(place.parent, "")):
            rows.append(Row(name, kind, "left alone", reason))
    return rows


def _is_made_of(places: tuple[Place, ...], pattern: Pattern) -> bool:
    return all(
        isinstance(place.module, kind) and not isinstance(place.module, FUSED)
        for place, kind in zip(places, pattern.kinds, strict=True)
    )


def _shared(model: nn.Module) -> dict[int, str]:
    """By id, the modules that stand in several places or hold a parameter that another module holds too: which."""
    names: dict[int, list[str]] = {}
    holders: dict[int, set[str]] = {}
    modules: dict[int, nn.Module] = {}
    for place in every_place(model):
        module = modules.setdefault(id(place.module), place.module)
        names.setdefault(id(module), []).append(place.name)
        for parameter in module._parameters.values():
            holders.setdefault(id(parameter), set()).add(names[id(module)][0])
    reasons = {}
    for key, module in modules.items():
        together = {name for p in module._parameters.values() if p is not None for name in holders[id(p)]}
        if len(names[key]) > 1:
            reasons[key] = f"it stands at {' and '.join(names[key])}"
        elif len(together) > 1:
            reasons[key] = f"{' and '.join(sorted(together))} share a parameter"
    return reasons


def _read_outputs(model: nn.Module) -> set[str]:
    """Names of modules whose outputs are feature maps of the model, in timm's convention ``feature_info``."""
    read = set()
    for name, module in model.named_modules():
        info = getattr(module, "feature_info", None)
        for entry in info if isinstance(info, (list, tuple)) else ():
            if isinstance(entry, dict) and isinstance(entry.get("module"), str):
                read.add(f"{name}.{entry['module']}" if name else entry["module"])
    return read


def _obstacle(chain: Chain, places: tuple[Place, ...], shared: dict[int, str], read: set[str]) -> str:
    """Why layers that make a pattern must stay as they are, or "" where nothing speaks against it."""
    for place in places:
        if reason := _untouchable(place.module, shared):
            return f"{place.name}: {reason}"
    # A convolution or an LRN that begins a pattern gives the fused layer all that it holds; of the others only settings
    # are taken over, and what else they hold would be missing from state_dict.
    begins = isinstance(places[0].module, (nn.Conv2d, nn.LocalResponseNorm))
    for place in places[1:] if begins else places:
        if place.module._parameters or place.module._buffers or place.module._modules:
            return f"{place.name}: it has parameters, buffers or modules of its own"
    for place in places[:-1]:
        if place.name in read:
            return f"{place.name}: its output is read (feature_info)"
    first = places[0].module
    if (
        isinstance(first, nn.ReLU)
        and first.inplace
        and not any(isinstance(p.module, RETURN_NEW) for p in chain[: chain.index(places[0])])
    ):
        return f"{places[0].name}: it writes into its input (inplace=True), which others may read"
    return ""


def _untouchable(module: nn.Module, shared: dict[int, str]) -> str:
    """Why this layer cannot be replaced by one that is equal on paper, or ""."""
    if parametrize.is_parametrized(module):
        return "it has parametrizations"
    if is_sealed(module) or getattr(module, "qconfig", None) is not None:
        return "it is quantised or prepared for it"
    if type(module) not in STOCK:
        return f"{type(module).__name__} is a subclass of {next(k for k in STOCK if isinstance(module, k)).__name__}"
    if any(value for name, value in vars(module).items() if "hooks" in name):
        return "it has hooks"
    if "forward" in vars(module) or module._compiled_call_impl is not None:
        return "its forward was replaced or compiled"
    if getattr(module, "return_indices", False):
        return "return_indices=True"
    if any(isinstance(getattr(module, name, None), torch.Tensor) for name in ("alpha", "beta", "k")):
        return "its alpha, beta or k is a tensor"
    return shared.get(id(module), "") if isinstance(module, nn.Conv2d) else ""


def _sealed(module: nn.Module) -> str:
    if isinstance(module, torch.jit.ScriptModule):
        return "it is scripted or traced by torch.jit"
    return "it is quantised or prepared for it" if is_sealed(module) else ""


def _no_pattern(place: Place, chain: Chain, i: int, untraceable: str) -> str:
    """Why a layer that could be part of a pattern is in none; "" for any other module."""
    module = place.module
    if is_sealed(module):
        return _sealed(module)
    if not isinstance(module, (nn.Conv2d, nn.MaxPool2d)):
        return ""
    if untraceable:
        return f"torch.fx cannot trace the forward of {type(place.parent).__name__}: {untraceable}"
    if isinstance(module, nn.Conv2d):
        after = chain[i + 1].module if i + 1 < len(chain) else None
        return f"{type(after).__name__} follows it" if after is not None else "no layer is known to follow it alone"
    before = chain[i - 1].module if i else None
    return f"{type(before).__name__} precedes it" if before is not None else "no layer is known to precede it"
