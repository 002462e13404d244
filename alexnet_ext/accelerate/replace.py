"""Puts the fused layers into any model, in place, and takes them out again.

A fused layer takes the place of the first of its layers, and ``nn.Identity`` the places of the rest. So indices,
lengths, state_dict keys and the Parameter objects stay what they were: optimizers, checkpoints and DDP do not notice.
The fused layer keeps the layers that it replaces, hidden from ``modules()``. So a copy or a pickle of an accelerated
model can be restored too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import nn

from .calls import Rewritten, rewrite
from .patterns import PATTERNS, REPLACES, Refusal, Step, match
from .places import Place, every_place, is_sealed
from .proof import prove
from .readers import is_own_code
from .report import Report, Row
from .survey import FUSED, STOCK, Survey, no_pattern, sealed, survey

FilterFn = Callable[[nn.Module, str], bool]

BOUND = ("forward", "_compiled_call_impl", REPLACES)
"""Attributes of a fused layer that the layer it replaces does not need back."""


class Forward(NamedTuple):
    """A forward that replaces a module's own."""

    name: str
    rewritten: Rewritten

    @property
    def pattern(self) -> str:
        return ", ".join(dict.fromkeys(pattern for found in self.rewritten.found.values() for pattern in found))

    def put(self) -> None:
        self.rewritten.attach()

    def take_back(self) -> None:
        self.rewritten.detach()


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
    example_inputs: Any = None,
) -> Report:
    """Replace stock layers of ``model`` by fused ones, in place; ``restore`` undoes it.

    ``LocalResponseNorm`` anywhere; ``ReLU -> MaxPool2d``, ``Conv2d -> ReLU`` and both orders of ``Conv2d -> ReLU ->
    LocalResponseNorm -> MaxPool2d`` where only the next layer reads a layer's output. Results and gradients stay what
    they were, except for the differences that the README names. A second call changes nothing more.

    A pattern is left alone if any code may read a tensor between its layers: a hook, a method of the model that runs
    a part of them, code that iterates over their ``nn.Sequential``, a ReLU in place whose input others may hold. Hooks
    that are set later see the fused layer's output, and its input as the layer before returned it.

    Args:
        model: any module, on any device, in training or not, wrapped (DDP, FSDP2) or not.
        lrn, relu_pool, conv_relu, fused_block: the patterns to replace; ``fused_block`` are the two of four layers.
        filter_fn: ``filter_fn(module, name)`` is called for each layer of a pattern; False leaves the pattern alone.
        strict: raise if a pattern is left alone for any reason but an argument, or if ``example_inputs`` show a
            difference.
        method: with ``"modules"``, neighbours are layers side by side in one ``nn.Sequential``. It cannot see code
            outside the model that runs such layers one by one: exclude them by ``filter_fn``. ``"fx"`` also traces each
            other module's own ``forward`` with ``torch.fx``, in training and in evaluation. Layers that it calls one
            after the other are neighbours then. If it calls ``F.local_response_norm``, or ``F.relu`` and then
            ``F.max_pool2d``, a traced copy with fused calls replaces it. A forward that does anything except calling
            PyTorch is left alone, as no trace shows it.
        example_inputs: a tensor, a tuple of arguments or a dictionary of keyword arguments, to prove the result on. The
            model runs without and with the fused layers, from the same random state: in training, with gradients of
            inputs and parameters, and in evaluation. The tensors that its hooks see are compared too. A layer that
            differs beyond ``proof.TOLERANCE`` is put back, and named in the report. Afterwards buffers, attributes,
            gradients and random generators are as before. Without a difference it costs four forwards, two backwards.

    Returns:
        The report: what was fused, and each Conv2d, LocalResponseNorm and MaxPool2d left alone, with the reason: hooks,
        parametrizations, a shared module or weight, a subclass, ``return_indices``, quantised or scripted modules, an
        output between that other code reads, a ``forward`` that cannot be traced.

    Raises:
        TypeError: model is no module. ValueError: an unknown method.
        RuntimeError: ``strict``, and a pattern is left alone or differs; nothing is replaced then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if method not in ("modules", "fx"):
        raise ValueError(f"method must be 'modules' or 'fx', got {method!r}")
    options = {"lrn": lrn, "relu_pool": relu_pool, "conv_relu": conv_relu, "fused_block": fused_block}
    known = survey(model, trace=method == "fx")
    steps, refused = match(known, options, lambda place: filter_fn is None or filter_fn(place.module, place.name))
    if strict and any(refusal.minded for refusal in refused.values()):
        minded = (f"{place.name} ({r.pattern}): {r.reason}" for place, r in refused.items() if r.minded)
        raise RuntimeError("strict=True and left alone: " + "; ".join(minded))
    rows = _rows(model, known, steps, refused)
    changes: list[Step | Forward] = [*steps]
    if method == "fx":
        forwards, more = _forwards(model, known, options, filter_fn)
        changes += forwards
        rows += more
    for change in changes:
        change.put()
    if example_inputs is not None:
        try:
            wrong = prove(model, changes, example_inputs)
        except BaseException:
            for change in reversed(changes):
                change.take_back()
            raise
        if strict and wrong:
            for change in reversed([change for change in changes if change not in wrong]):
                change.take_back()
            raise RuntimeError("strict=True and " + "; ".join(f"{change.name}: {why}" for change, why in wrong.items()))
        named = {change.name: why for change, why in wrong.items()}
        rows = [
            row._replace(action="left alone", reason=named[row.name])
            if row.name in named and row.action == "fused"
            else row
            for row in rows
        ]
    return Report(rows)


def _forwards(
    model: nn.Module, known: Survey, options: dict[str, bool], filter_fn: FilterFn | None
) -> tuple[list[Forward], list[Row]]:
    """The forwards that call functions to fuse, and a row for each, and for each one left alone."""
    found, rows = [], []
    for name, owner in model.named_modules():
        if not is_own_code(owner) or (filter_fn is not None and not filter_fn(owner, name)):
            continue
        called = f"{name}.forward" if name else "forward"
        if isinstance(vars(owner).get("forward"), Rewritten):
            rows.append(Row(called, "calls", "already fused", ""))
            continue
        rewritten = known.untraceable.get(owner) or rewrite(owner, options, known.traces.get(owner, ()))
        if isinstance(rewritten, str):
            rows.append(Row(called, "calls", "left alone", rewritten))
            continue
        forward = Forward(called, rewritten)
        left = dict.fromkeys(pair for pairs in rewritten.left.values() for pair in pairs)
        rows += [Row(called, pattern, "left alone", reason) for pattern, reason in left]
        if forward.pattern:
            found.append(forward)
            rows += [Row(called, pattern, "fused", "") for pattern in forward.pattern.split(", ")]
    return found, rows


def restore(model: nn.Module) -> Report:
    """Put the very modules back that ``accelerate`` replaced in ``model`` (or in the model that it is a copy of).

    They take over changes to their replacements: training or not, settings such as ``stride``, and hooks, each at its
    place. Returns a row for each pattern restored; its ``reason`` names changes that could not be taken over. Raises
    RuntimeError, with nothing restored, if a replacement was itself replaced or parametrized since.
    """
    return _restore(model, keep={})


@contextmanager
def accelerated(model: nn.Module, **options: Any) -> Iterator[Report]:
    """``accelerate(model, **options)`` for the length of a ``with`` block; gives the report.

    At the end of the block only its own replacements are restored, not earlier ones.
    """
    before = {id(found): found for module in model.modules() for found in (module, vars(module).get("forward"))}
    report = accelerate(model, **options)
    try:
        yield report
    finally:
        _restore(model, keep=before)


def _restore(model: nn.Module, keep: dict[int, object]) -> Report:
    """Undo all replacements except the layers and forwards in ``keep``, by id."""
    back: list[tuple[str, nn.Module, Any]] = []
    for name, parent in model.named_modules():
        for key, fused in parent._modules.items():
            if fused is not None and id(fused) not in keep and REPLACES in vars(fused):
                _check_in_place(parent, key, fused)
                back.append((f"{name}.{key}" if name else key, parent, fused))
    rows = []
    for name, module in model.named_modules():
        forward = vars(module).get("forward")
        if isinstance(forward, Rewritten) and id(forward) not in keep:
            forward.detach()
            rows.append(Row(f"{name}.forward" if name else "forward", "calls", "restored", ""))
    for name, parent, fused in back:
        places = vars(fused)[REPLACES]
        layers = [stock for _, stock in places]
        taken = type(fused).takes(*layers[1:])
        lost = []
        for key, stock in places:
            lost += _hand_back(parent._modules[key], stock, taken)
            parent._modules[key] = stock
        fused.gives(*layers[1:])
        pattern = next(str(pattern) for pattern in PATTERNS if pattern.fused is type(fused))
        rows.append(Row(name, pattern, "restored", "; ".join(lost)))
    return Report(rows)


def _check_in_place(parent: nn.Module, key: str, fused: nn.Module) -> None:
    """Raises RuntimeError if the modules that accelerate put there were moved or changed."""
    places = vars(fused)[REPLACES]
    if key != places[0][0]:
        raise RuntimeError(f"cannot restore {places[0][0]!r}: its layer was moved to {key!r} since")
    if type(fused) not in FUSED:
        raise RuntimeError(f"cannot restore {key!r}: it is a {type(fused).__name__} now, remove what changed it")
    for other, _ in places:
        now = parent._modules.get(other)
        if now is not fused and type(now) is not nn.Identity:
            raise RuntimeError(f"cannot restore {other!r}: a {type(now).__name__} stands there now")


def _hand_back(replacement: nn.Module | None, stock: nn.Module, taken: dict[str, Any]) -> list[str]:
    """Give a layer the changes made to its replacement; returns those that it cannot take, in words."""
    now = vars(replacement)
    for name, value in now.items():
        unset = name == "_is_full_backward_hook" and value is None  # another place of the same layer may have it
        if name not in taken and name not in BOUND and not unset:
            vars(stock)[name] = value
    replaced = "forward" in now or now.get("_compiled_call_impl") is not None
    return ["its forward was replaced or compiled meanwhile, which is lost"] if replaced else []


def _rows(model: nn.Module, known: Survey, steps: list[Step], refused: dict[Place, Refusal]) -> list[Row]:
    starts = {step.places[0]: step.pattern for step in steps}
    inside = {place for step in steps for place in step.places[1:]}
    position = {place: (chain, i) for chain in known.chains for i, place in enumerate(chain)}
    rows = []
    if isinstance(model, STOCK) or is_sealed(model):
        rows.append(Row("", type(model).__name__, "left alone", sealed(model) or "it is the model itself"))
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
        elif reason := no_pattern(place, *position[place], known.untraceable.get(place.parent, "")):
            rows.append(Row(name, kind, "left alone", reason))
    return rows
