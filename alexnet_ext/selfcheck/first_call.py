"""The first eager call of an op that the GPU has neither proven nor refused: it warns once, or proves the op.

ALEXNET_EXT_PROVE=lazy in the environment proves an op's kernels at such a call, in at most half a minute, and races
them for its shape.
"""

from __future__ import annotations

import math
import os
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..ops import _backend, _known, _race
from ..ops._known import Unit, layout_of, name_of
from ..ops._register import RECORDS
from . import ranks
from .calls import Call, names_of
from .prove import prove_units
from .races import Setting, race_calls

VARIABLE = "ALEXNET_EXT_PROVE"
SECONDS = 30.0

_warned: set[torch.device] = set()
_attempted: set[tuple[Any, ...]] = set()


def first_call(op: str, x: Tensor, dtype: torch.dtype) -> Any:
    """The operator for a call with x, computed in ``dtype``; None for stock PyTorch."""
    if not _race.is_plain():
        return None
    device, layout = x.device, layout_of(x)
    attempt = (op, device, dtype, layout, _known.settings())
    if not _is_lazy() or ranks.are_many() or dtype not in _backend.PROVABLE:
        if device not in _warned:
            _warned.add(device)
            warnings.warn(
                f"alexnet_ext runs stock PyTorch on {_known.on(device).identity['device']}, as its kernels were not "
                f"yet proven there for {name_of(dtype)}, {layout}: call alexnet_ext.prove(model=..., shape=..., "
                f"dtype=torch.{name_of(dtype)}) once, or set {VARIABLE}=lazy",
                stacklevel=4,
            )
        return None
    if attempt in _attempted:  # in vain
        return None
    _attempted.add(attempt)
    units = [Unit(op, name, name_of(dtype), layout) for name in names_of(op, device.type)]
    prove_units(units, device, SECONDS)
    if _backend.decide(op, device, dtype, x=x).backend == "stock":
        return None
    return _raced(op, x, dtype)


def silence(device: torch.device) -> None:
    """No warning for this device: the caller says itself what runs there."""
    _warned.add(torch.empty(0, device=device).device)  # with the number that "cuda" stands for


def _is_lazy() -> bool:
    given = os.environ.get(VARIABLE, "")
    if given not in ("", "lazy"):
        raise ValueError(f"{VARIABLE} must be 'lazy' or not set, got {given!r}")
    return given == "lazy"


def _raced(op: str, x: Tensor, dtype: torch.dtype) -> Any:
    """The operator that races the backends on its arguments' shapes, then runs the winner on them."""

    def raced(*arguments: Any) -> Any:
        meta = tree_map(lambda a: torch.empty_like(a, device="meta") if isinstance(a, Tensor) else a, arguments)
        layout = torch.channels_last if layout_of(x) == "channels_last" else torch.contiguous_format
        if _race.may_race():
            for _ in race_calls([Call("", op, meta)], Setting(x.device, dtype, layout), math.inf, again=False):
                pass
        return (_backend.operator(op, "auto", x, dtype=dtype) or RECORDS[op].stock)(*arguments)

    raced.__name__ = op  # as the compiled operator, which takes its arguments as they are
    return raced


_backend.first_call = first_call
