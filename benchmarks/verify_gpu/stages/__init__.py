"""The stages, most valuable first: a module each, whose ``run(device)`` yields what it finds."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass

from ..report import Finding


@dataclass(frozen=True)
class Stage:
    """``seconds`` is its time limit, of which the last stages may find less left."""

    name: str
    purpose: str
    seconds: float

    def run(self, device: str) -> Iterator[Finding]:
        found: Iterator[Finding] = importlib.import_module(f"{__name__}.{self.name}").run(device)
        return found


STAGES = (
    Stage("build", "builds with no network and no isolation; the libraries load", 200),
    Stage("correctness", "every op, backend, dtype and layout against float64", 150),
    Stage("network", "the network's values, gradients and 50 training steps against stock", 90),
    Stage("speed", "each op beside a copy of its bytes, stock and compiled stock; the network's images/s", 150),
    Stage("graphs", "CUDA graphs: captured once, replayed with other data", 40),
    Stage("streams", "the current stream is used", 30),
    Stage("determinism", "the same bits over 100 runs", 40),
    Stage("large", "offsets beyond 32 bits", 40),
    Stage("sanitizers", "compute-sanitizer's four tools, each shown to see a planted bug", 120),
)
