"""Of an op's proven backends and stock PyTorch, the fastest for each of a model's calls."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..ops import _backend, _known, _race
from ..ops._known import Proof, Race, Unit, name_of
from ..ops._register import RECORDS
from ..ops.conv2d_bias_relu.candidates import describe, title
from ..ops.conv2d_bias_relu.shared import Convolution, Direction
from ..ops.conv2d_bias_relu.space_to_depth import rewritten
from .calls import Call


@dataclass(frozen=True)
class TunedRow:
    """What was found for a call of an op, or for a direction of a convolution: the choice, each one's microseconds.

    The candidates of an op are backends. ``"auto"`` stands for what was chosen for each direction of the layer.
    ``shape`` is that of the op's x; empty for a direction.
    """

    layer: str
    op: str
    direction: str
    choice: str
    microseconds: dict[str, float]
    shape: tuple[int, ...] = ()


@dataclass(frozen=True)
class Setting:
    """Where a race is run: the device, and the dtype and memory format of what is made for it."""

    device: torch.device
    dtype: torch.dtype
    layout: torch.memory_format


def race_calls(calls: Sequence[Call], where: Setting, end: float, again: bool) -> Iterator[TunedRow]:
    """Race each call that was not raced yet among all that is proven, or each, until ``end`` (monotonic time)."""
    seen = set[str]()
    for call in calls:
        key = _known.call_of(call.op, name_of(where.dtype), call.layout(where.layout), call.shape)
        race = _known.on(where.device).races.get(key)
        is_known = race is not None and race.covers(("stock", *_proven(call, where)))
        if key in seen or (is_known and not again) or time.monotonic() >= end:
            continue
        seen.add(key)
        try:
            yield from _race_call(call, where)
        except Exception as error:  # too little memory for a shape, a compiler's trouble: no reason to stop
            what = f"{call.op} is not raced for x of shape {list(call.shape)}"
            warnings.warn(f"{what}, as it raises {error!r:.200}", stacklevel=2)


def _proven(call: Call, where: Setting) -> dict[str, Unit]:
    """The proven units of a call, by backend."""
    layout = call.layout(where.layout)
    units = {b: Unit(call.op, b, name_of(where.dtype), layout) for b in _backend.kernels(call.op, where.device.type)}
    states = {b: _backend.proof_of(call.op, b, where.device, where.dtype, layout).state for b in units}
    return {backend: unit for backend, unit in units.items() if states[backend] == "proven"}


def _race_call(call: Call, where: Setting) -> Iterator[TunedRow]:
    """Race the backends that are proven and agree with stock PyTorch on this very call; its directions first."""
    known, proven = _known.on(where.device), _proven(call, where)
    if not proven:
        return
    generators = [where.device] if where.device.type == "cuda" else []
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(where.device.type, enabled=False),
        torch.random.fork_rng(generators),  # the user's random numbers stay as they are
        on_device(where.device),
    ):
        arguments = call.made(where.device, where.dtype, where.layout)
        if "auto" in proven:
            yield from _directions(call, arguments, where.device)
            for first in in_training(call, where):
                yield from _directions(first, first.made(where.device, where.dtype, where.layout), where.device)
        right = _right(call, arguments, proven, where)
        candidates = [_race.Candidate(name, partial(call.run, name, arguments)) for name in ("stock", *right)]
        seconds = _race.race(candidates, _race.clock_of(where.device))
    race = Race.of(_race.winner(seconds), seconds, ("stock", *proven))
    known.add(races={_known.call_of(call.op, name_of(where.dtype), call.layout(where.layout), call.shape): race})
    yield TunedRow(
        call.layer or call.op, call.op, "forward and backward", race.choice, dict(race.microseconds), call.shape
    )


def _right(call: Call, arguments: list[Any], proven: dict[str, Unit], where: Setting) -> list[str]:
    """The backends that agree with stock PyTorch on these arguments. The others are refused, except for want of memory.

    Raises what stock PyTorch raises, and an error after which the device computes no more.
    """
    clock, expected, right = _race.clock_of(where.device), None, []
    for name in ("stock", *proven):
        try:
            # An op in place gets values of its own each time.
            given = arguments if RECORDS[call.op].gradient else tree_map(_copied, arguments)
            results = call.run(name, given)
            clock()  # an asynchronous error shows here
        except Exception as error:
            if expected is None:
                raise
            if _race.is_trouble(error):
                warnings.warn(f"{call.op} by {name} is not measured, as it raises {error!r:.200}", stacklevel=2)
                continue
            reason = f"it raises for x of shape {list(call.shape)}: {error!r:.200}"
        else:
            if expected is None:
                expected = results
                continue
            same = _race.agree_as_layers if RECORDS[call.op].gradient else _race.agree
            if same(results, expected):
                right.append(name)
                continue
            reason = f"it differs from stock PyTorch for x of shape {list(call.shape)}"
        warnings.warn(f"{call.op} by {name} is refused: {reason}", stacklevel=2)
        _known.on(where.device).add(proofs={str(proven[name]): Proof("refused", reason)})
        clock()  # raises where an illegal access has spoiled the device
    return right


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Makes a GPU the current one, as Triton launches on that."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def in_training(call: Call, where: Setting) -> Iterator[Call]:
    """A first layer as it is called where only its weight has a gradient, if that differs: by rewritten images."""
    x, weight, bias, *constants, relu = call.arguments
    if where.dtype.itemsize == 2 and where.layout == torch.channels_last:
        rewrite, x, weight, p = rewritten(x, weight, Convolution(*constants))
        if rewrite is not None:
            yield Call(call.layer, call.op, (x, weight, bias, *p, relu))


def _directions(call: Call, arguments: list[Any], device: torch.device) -> Iterator[TunedRow]:
    """Those of a convolution: running it races what is not known. One with a single proven candidate has no race."""
    call.run("auto", arguments)
    x, weight, _, *constants, relu = arguments
    for direction in (Direction.FORWARD, Direction.INPUT, Direction.WEIGHT):
        race = _known.on(device).races.get(describe(x, weight, Convolution(*constants), direction, relu))
        if race is not None:
            yield TunedRow(call.layer, call.op, title(direction, relu), race.choice, dict(race.microseconds))
