"""``alexnet tune`` of the paper's network: all kernels are correct and measured, and ``"auto"`` runs its choice."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Iterator
from unittest import mock

import torch

from alexnet_ext import models
from alexnet_ext.ops import _backend, _choices
from alexnet_ext.selfcheck.tune import TunedRow, rows

from ..common import SIZES, ways
from ..report import Finding
from . import Task


def run(task: Task) -> Iterator[Finding]:
    sizes, device = SIZES[task.device], torch.device(task.device)
    shape = (sizes.batch, 3, 227, 227)
    with torch.device("meta"):
        network = models.alexnet("paper", init="torch")
    # The user's own choices file is not touched.
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, XDG_CACHE_HOME=folder):
        _choices.choices.cache_clear()
        with (
            mock.patch.object(_backend, "TUNED", (task.device,)),
            mock.patch.object(_choices, "REPEATS", _choices.REPEATS if task.device == "cuda" else 1),
            warnings.catch_warnings(record=True) as caught,
        ):
            warnings.simplefilter("always")
            for row in rows(network, shape, device, sizes.dtypes[0], torch.channels_last):
                said = [str(warning.message) for warning in caught]
                caught.clear()
                yield judged(row, device, said) if row.layer in _backend.OPS else measured(row, said)
        _choices.choices.cache_clear()


def measured(row: TunedRow, said: list[str]) -> Finding:
    return Finding(f"{row.layer}, {row.direction}: {row.choice}", None, "; ".join(said), microseconds(row))


def judged(row: TunedRow, device: torch.device, said: list[str]) -> Finding:
    """Every backend with kernels is correct here, and "auto" from now on runs the fastest of them."""
    left_out = set(ways(row.layer, device.type)) - row.microseconds.keys()
    runs = _backend.decide(row.layer, device).backend
    detail = "; ".join([f"auto runs {runs}", *(f"{way} is left out" for way in sorted(left_out)), *said])
    return Finding(f"{row.layer}: {row.choice}", not left_out and runs == row.choice, detail, microseconds(row))


def microseconds(row: TunedRow) -> dict[str, float]:
    return {f"{name} us": row.microseconds[name] for name in sorted(row.microseconds)}
