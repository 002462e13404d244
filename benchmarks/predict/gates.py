"""What a kernel's counts must keep to, so that it costs what a copy costs. counts.json has exceptions, with reasons."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from .gpus import GPUS
from .kernels import copy_time, resident, row_times, total

Row = dict[str, Any]
GROWTH = 1.02  # by which a predicted time may exceed the committed one


def summed(row: Row, name: str) -> float:
    return float(sum(launch[name] for launch in row["launches"]))


def copies(row: Row, gpu: str) -> float:
    """The predicted time, in copies of the least bytes."""
    return total(row_times(row, GPUS[gpu])) / copy_time(row["floor_bytes"], GPUS[gpu])


def waves(row: Row) -> float:
    """Waves of blocks that a grid made for a GPU's slots takes on an H100, over those that it fills."""
    h100, most = GPUS["h100"], 1.0
    for launch in row["launches"]:
        filled = launch["blocks"] / (resident(launch, h100) * h100.multiprocessors)
        if launch["persistent"] and filled > 1:
            most = max(most, -(-filled // 1) / filled)
    return most


@dataclass(frozen=True)
class Gate:
    """A number of a row that may be ``most``; ``what`` says it in words."""

    name: str
    what: str
    most: float
    of: Callable[[Row], float]


GATES = (
    Gate("dram", "distinct bytes of DRAM, over the least bytes", 1.05,
         lambda r: summed(r, "dram_bytes") / r["floor_bytes"]),
    Gate("blocks", "distinct bytes of each block, summed up, over the least bytes", 1.3,
         lambda r: summed(r, "block_bytes") / r["floor_bytes"]),
    Gate("turns", "turns of shared memory, over the least turns", 1.05,
         lambda r: summed(r, "turns") / max(summed(r, "ideal_turns"), 1.0)),
    Gate("grid", "waves of a grid that is made for the GPU's slots, over full ones", 1.0, waves),
    Gate("copy on h100", "predicted time, over a copy of the least bytes", 1.15, lambda r: copies(r, "h100")),
    Gate("copy on h200", "predicted time, over a copy of the least bytes", 1.25, lambda r: copies(r, "h200")),
)  # fmt: skip

PATH = ("relu_lrn_max_pool2d *", "relu_max_pool2d * 128x256x13x13 *", "conv2d_bias_relu *", "augment *", "sgd_step *",
        "local_response_norm *")  # fmt: skip
"""The kernels of AlexNet's training step, and LRN alone, in bf16 and channels-last: CI counts all of them anew."""


def on_path(name: str) -> bool:
    here = any(fnmatchcase(name, pattern) for pattern in PATH) and " bfloat16 " in name
    return here and (" contiguous " not in name or name.startswith(("augment", "sgd_step")))


def held_at(gate: Gate, name: str, held: list[dict[str, Any]]) -> float:
    """The number that a gate is held at for this row: its own, or that of the first exception that names the row."""
    for exception in held:
        if exception["gate"] == gate.name and any(fnmatchcase(name, pattern) for pattern in exception["rows"]):
            return float(exception["at"])
    return gate.most


def faults(name: str, row: Row, committed: dict[str, Any]) -> Iterator[str]:
    """What does not hold for a row that was counted now, a sentence each."""
    for gate in GATES:
        value, most = gate.of(row), held_at(gate, name, committed["held"])
        if value > most + 0.005:
            yield f"{name}: {gate.what} is {value:.2f} ({gate.name}), expected at most {most:.2f}"
    if (before := committed["rows"].get(name)) is None:
        yield f"{name} is not in counts.json: python -m benchmarks.predict --renew"
        return
    now, then = (total(row_times(r, GPUS["h100"])) for r in (row, before))
    if now > GROWTH * then:
        yield f"{name}: predicted {now * 1e6:.1f} us on an H100, at most {GROWTH} times the {then * 1e6:.1f} committed"


def idle(committed: dict[str, Any]) -> Iterator[str]:
    """Exceptions that no committed row needs any more."""
    gates = {gate.name: gate for gate in GATES}
    for exception in committed["held"]:
        gate = gates[exception["gate"]]
        rows = [
            row
            for name, row in committed["rows"].items()
            if any(fnmatchcase(name, pattern) for pattern in exception["rows"])
        ]
        if not any(gate.of(row) > gate.most + 0.005 for row in rows):
            yield f"the exception of {gate.name} for {', '.join(exception['rows'])} is needed by no row"


PRODUCTS = 128 * 256 * 64 / 2048  # clocks of a step of weight_gradient_sm90 at the tensor cores' full rate
PRODUCER = 0.8  # of these clocks may be the loading thread's


def producer_faults(clocks: dict[str, float]) -> Iterator[str]:
    """Threads that load for others and would let them wait."""
    for name, needed in clocks.items():
        if needed > PRODUCER * PRODUCTS:
            yield f"{name}: its loads take {needed:.0f} clocks a step, expected at most {PRODUCER * PRODUCTS:.0f}"
