"""``alexnet_ext.prove`` of the paper's network: no kernel is refused, it ends in time, and ``"auto"`` follows it."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Iterator
from unittest import mock

import torch

from alexnet_ext import models, prove
from alexnet_ext.ops import _backend, _known
from alexnet_ext.selfcheck.prove import SECONDS, Proved
from alexnet_ext.selfcheck.races import TunedRow

from ..common import SIZES
from ..report import Finding
from . import Task


def run(task: Task) -> Iterator[Finding]:
    sizes, device = SIZES[task.device], torch.device(task.device)
    with torch.device("meta"):
        network = models.alexnet("paper", init="torch")
    shape = (sizes.batch, 3, 227, 227)
    unknown = dict.fromkeys(_backend.ORDER["cuda"], _backend.UNKNOWN)
    # The user's own files are not touched. A CPU plays a GPU whose kernels are yet to be proven.
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.dict(os.environ, XDG_CACHE_HOME=folder),
        mock.patch.dict(_backend.ORDER, {task.device: unknown}),
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always")
        _known.reopen()
        proved = prove(device, network, shape, dtype=sizes.dtypes[0], layout=torch.channels_last)
        yield from judged(proved)
        for row in proved.races:
            yield followed(row, device, sizes.dtypes[0])
        said = "; ".join(str(warning.message) for warning in caught)
        in_time = proved.seconds <= SECONDS if task.device == "cuda" else None
        yield Finding(str(proved), in_time, said, {"seconds": proved.seconds})
        again = prove(device, network, shape, dtype=sizes.dtypes[0], layout=torch.channels_last)
        yield Finding("known afterwards: nothing is proven again", again.proofs == proved.proofs)
    _known.reopen()


def judged(proved: Proved) -> Iterator[Finding]:
    """A unit is proven; what applies to no small case on this GPU is no failure."""
    for unit, proof in proved.proofs.items():
        ok = None if proof.reason == _known.NOT_APPLICABLE else proof.state == "proven"
        yield Finding(f"{unit}: {proof.state}", ok, proof.reason, {"seconds": proof.seconds})


def followed(row: TunedRow, device: torch.device, dtype: torch.dtype) -> Finding:
    """A race; the call of an op is from now on what won it."""
    numbers = {f"{name} us": row.microseconds[name] for name in sorted(row.microseconds)}
    if not row.shape:
        return Finding(f"{row.layer}, {row.direction}: {row.choice}", None, numbers=numbers)
    memory_format = torch.channels_last if len(row.shape) == 4 else torch.contiguous_format
    like = torch.empty(row.shape, dtype=dtype, device=device, memory_format=memory_format)
    runs = _backend.decide(row.op, device, dtype, x=like).backend
    return Finding(f"{row.layer}, {row.op}: {row.choice}", runs == row.choice, f"auto runs {runs}", numbers)
