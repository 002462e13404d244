"""Measured times beside predicted ones, and the constants that fit them: for verify_gpu's speed stage."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from .gpus import CONSTANTS, GPUS, Gpu
from .kernels import BATCH, counts, row_times, total

# In the names of GPUs with fewer multiprocessors, or another memory, than the data sheet's.
SMALLER = ("pcie", "nvl", "mig", "laptop")


@dataclass(frozen=True)
class Measured:
    """A kernel's median, and that of a copy of its least bytes in the same run; milliseconds."""

    name: str  # op, shape, dtype, and of images layout and direction: as verify_gpu names it
    kernel: float
    copy: float
    megabytes: float


@dataclass(frozen=True)
class Compared:
    name: str
    predicted: float  # milliseconds
    measured: float
    limit: str
    share: float  # of the limit's rate that was reached: a copy's, or all issue slots

    @property
    def ratio(self) -> float:
        return self.measured / self.predicted


def gpu_of(device: str) -> Gpu | None:
    """The data sheet for a device's name; None for one that is not known, or a smaller one of a name."""
    if any(word in device.lower() for word in SMALLER):
        return None
    return next((gpu for key, gpu in GPUS.items() if key.removeprefix("rtx") in device.lower()), None)


def row_of(name: str) -> tuple[dict[str, Any], float] | None:
    """(the counted row, times its batch) for a name of verify_gpu; None if it was not counted."""
    op, *words = name.split()
    direction = words.pop() if words[-1] in ("forward", "backward") else "forward"
    layout = words.pop() if words[-1] in ("channels_last", "contiguous") else "contiguous"
    *shape, dtype = words
    batch, *others = shape[0].split("x")
    if others:
        shape[0] = "x".join((str(BATCH), *others))
    row = counts().get(" ".join((op, direction, *shape, dtype, layout, "native")))
    return (row, int(batch) / BATCH if others else 1.0) if row else None


def compare(measurements: Iterable[Measured], gpu: Gpu) -> list[Compared]:
    """Those that were counted, at the rate of a copy that was measured beside each."""
    found = []
    for measured in measurements:
        if (known := row_of(measured.name)) is None:
            continue
        row, batches = known
        here = replace(gpu, copy=measured.megabytes * 1e9 / measured.copy)
        times = row_times(row, here, batches=batches)
        limit = times[0].binds
        share = measured.copy / measured.kernel
        if limit == "issue":
            instructions = sum(launch["instructions"] for launch in row["launches"]) * batches
            share = instructions / (measured.kernel / 1e3 * gpu.issue)
        found.append(Compared(measured.name, total(times) * 1e3, measured.kernel, limit, share))
    return found


def fitted(found: Iterable[Compared]) -> dict[str, tuple[float, float, int]]:
    """By constant: its value, that which fits (the median of the shares reached), and the number of kernels."""
    limits = {"COPY": "memory", "ISSUE": "issue"}
    every = list(found)
    shares = {name: [c.share for c in every if c.limit == limit] for name, limit in limits.items()}
    return {
        name: (CONSTANTS[name].value, statistics.median(values), len(values))
        for name, values in shares.items()
        if values
    }
