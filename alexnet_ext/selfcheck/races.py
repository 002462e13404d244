"""Of an op's proven backends and stock PyTorch, the fastest for each of a model's calls."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ..ops import _backend, _known, _race
from ..ops._known import Proof, Race, Unit, name_of
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
    """Race each call that was not raced yet, or each, until ``end`` (monotonic time)."""
    seen = set[str]()
    for call in calls:
        key = _known.call_of(call.op, name_of(where.dtype), call.layout(where.layout), call.shape)
        known = _known.on(where.device)
        if key in seen or (key in known.races and not again) or time.monotonic() >= end:
            continue
        seen.add(key)
        try:
            yield from _race_call(call, where)
        except RuntimeError as error:  # too little memory for a shape is no reason to stop
            what = f"{call.op} is not raced for x of shape {list(call.shape)}"
            warnings.warn(f"{what}, as it raises {error!r:.200}", stacklevel=2)


def _race_call(call: Call, where: Setting) -> Iterator[TunedRow]:
    """Race the backends that are proven and agree with stock PyTorch on this very call; its directions first."""
    known, layout = _known.on(where.device), call.layout(where.layout)
    units = {b: Unit(call.op, b, name_of(where.dtype), layout) for b in _backend.kernels(call.op, where.device.type)}
    proven = [b for b in units if _backend.proof_of(call.op, b, where.device, where.dtype, layout).state == "proven"]
    if not proven:
        return
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(where.device.type, enabled=False):
        arguments = call.made(where.device, where.dtype, where.layout)
        if "auto" in proven:
            yield from _directions(call, arguments, where.device)
            for first in in_training(call, where):
                yield from _directions(first, first.made(where.device, where.dtype, where.layout), where.device)
        candidates = [_race.Candidate(name, partial(call.run, name, arguments)) for name in ("stock", *proven)]
        left: list[_race.Candidate] = []
        expected: _race.Results = ()
        for candidate, results in _race.running(candidates, _race.gpu_clock):
            expected = expected or results
            if _race.agree(results, expected):
                left.append(candidate)
                continue
            reason = f"it differs from stock PyTorch for x of shape {list(call.shape)}"
            warnings.warn(f"{call.op} by {candidate.name} is refused: {reason}", stacklevel=2)
            known.add(proofs={str(units[candidate.name]): Proof("refused", reason)})
        seconds = _race.race(left, _race.gpu_clock)
    race = Race.of(_race.winner(seconds), seconds)
    known.add(races={_known.call_of(call.op, name_of(where.dtype), layout, call.shape): race})
    yield TunedRow(
        call.layer or call.op, call.op, "forward and backward", race.choice, dict(race.microseconds), call.shape
    )


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
