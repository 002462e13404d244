"""The predicted time of a counted launch: the largest of its limits, and the tail of its last blocks."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from .gpus import LIKELY, REGISTER_UNIT, REGISTERS, RESERVED_SHARED, WARP, Assumed, Gpu

COUNTS = Path(__file__).with_name("counts.json")
BATCH = 128  # of the counts
MOST_BLOCKS = 32  # of a multiprocessor


@dataclass(frozen=True)
class Time:
    """Seconds by limit; ``total`` is the largest, with the tail."""

    memory: float
    issue: float
    shared: float
    latency: float
    tail: float

    @property
    def total(self) -> float:
        return max(self.memory, self.issue, self.shared, self.latency) + self.tail

    @property
    def binds(self) -> str:
        limits = {name: getattr(self, name) for name in ("memory", "issue", "shared", "latency")}
        return max(limits, key=limits.__getitem__)


def resident(launch: dict[str, Any], gpu: Gpu) -> int:
    """Blocks that fit on a multiprocessor."""
    warps = launch["threads"] // WARP
    by_warp = -(-launch["registers"] * WARP // REGISTER_UNIT) * REGISTER_UNIT
    fits = [MOST_BLOCKS, gpu.threads // launch["threads"], REGISTERS // (by_warp * warps)]
    fits.append(gpu.shared // (launch["shared"] + RESERVED_SHARED))
    return max(1, min(fits))


def time_of(launch: dict[str, Any], gpu: Gpu, assumed: Assumed = LIKELY, batches: float = 1) -> Time:
    """Of a launch as it is in counts.json, at this many times its batch.

    A grid whose size does not depend on the batch ("persistent") does more a block; another has more blocks. The sums
    of rows that a persistent grid left do not depend on it at all.
    """
    if launch["kernel"].startswith("sum_rows_kernel"):
        batches = 1
    persistent = launch["persistent"]
    blocks = launch["blocks"] * (1 if persistent else batches)
    work = {name: launch[name] * batches for name in ("dram_bytes", "instructions", "turns", "clocks_alone")}
    slots = resident(launch, gpu) * gpu.multiprocessors
    warps = launch["threads"] // WARP
    busy = min(blocks, gpu.multiprocessors)
    together = min(resident(launch, gpu), math.ceil(blocks / gpu.multiprocessors)) * warps
    block = work["clocks_alone"] / blocks / warps / gpu.clock
    # The last blocks run on a GPU that empties: a whole block's time where all before them began and ended together.
    part = blocks / slots % 1
    tail = block * (1 - part) * (1 if blocks < 2 * slots else 0.5) if blocks > slots and part else 0.0
    return Time(
        memory=work["dram_bytes"] / (assumed.copy * gpu.copy),
        issue=work["instructions"] / (assumed.issue * gpu.issue),
        shared=work["turns"] / (gpu.multiprocessors * gpu.clock),
        latency=work["clocks_alone"] / (busy * together) / gpu.clock,
        tail=tail,
    )


def copy_time(bytes_moved: float, gpu: Gpu) -> float:
    return bytes_moved / gpu.copy


@cache
def counts() -> dict[str, dict[str, Any]]:
    """The rows of counts.json by name: op, direction, shape, dtype, layout, backend."""
    found: dict[str, dict[str, Any]] = json.loads(COUNTS.read_text(encoding="utf-8"))["rows"]
    return found


def row_times(row: dict[str, Any], gpu: Gpu, assumed: Assumed = LIKELY, batches: float = 1) -> list[Time]:
    return [time_of(launch, gpu, assumed, batches) for launch in row["launches"]]


def total(times: Iterable[Time]) -> float:
    return sum(time.total for time in times)


@cache
def producers() -> dict[str, float]:
    """Clocks of a step of each thread that loads for the others, by kernel."""
    found: dict[str, float] = json.loads(COUNTS.read_text(encoding="utf-8"))["producers"]
    return found
