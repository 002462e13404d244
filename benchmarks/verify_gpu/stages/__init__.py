"""The stages, most valuable first: a module each, whose ``run(task)`` yields its findings."""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ..report import Finding


class Task(NamedTuple):
    """The task of a stage's process: the whole stage on this device, or one part; by ``end``, a monotonic time."""

    device: str
    part: str = ""
    end: float = math.inf

    def wants(self, part: str) -> bool:
        return self.part in ("", part)


@dataclass(frozen=True)
class Stage:
    """``seconds`` is its time limit. Together they are more than ten minutes: the last stages are for a second command.

    On a GPU each part is a process of its own, so a broken CUDA context spoils one part only. ``parallel`` parts run
    together, one for each core. Timed parts run alone.
    """

    name: str
    purpose: str
    seconds: float
    parts: tuple[str, ...] = ("",)
    parallel: bool = False

    def run(self, task: Task) -> Iterator[Finding]:
        found: Iterator[Finding] = importlib.import_module(f"{__name__}.{self.name}").run(task)
        return found


# Read from the disk, not asked of the package: this process must not load a library that the first stage builds anew.
ROOT = Path(__file__).parents[3]
OPS = tuple(sorted(path.parent.name for path in ROOT.glob("tests/ops/*/spec.py")))
ON_GPU = tuple(op for op in OPS if (ROOT / f"csrc/{op}/{op}_cuda_ops.cpp").is_file())
DTYPES = ("bfloat16", "float32", "float16", "float64")
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
BACKENDS = ("native", "triton")
WAYS = (*BACKENDS, "auto")
NETWORKS = ("training step 128", "inference 1024", "training step 1024", "inference 128")


def crossed(*names: Iterable[str]) -> tuple[str, ...]:
    return tuple(map(" ".join, itertools.product(*names)))


STAGES = (
    Stage("build", "builds with no network and no isolation; the libraries load", 200),
    Stage(
        "correctness",
        "every op, backend, dtype and layout, and each candidate of the convolution, against float64",
        130,
        crossed(BACKENDS, OPS, DTYPES) + crossed(("auto candidates", "auto cutlass"), DTYPES),
        True,
    ),
    Stage("network", "the network's values, gradients and 50 training steps against stock", 80, WAYS, True),
    Stage(
        "speed",
        "each op beside a copy of its bytes, stock and compiled stock; each way to convolve",
        250,
        tuple(dict.fromkeys(("relu_lrn_max_pool2d", "convolution", "local_response_norm", *ON_GPU))),
    ),
    Stage("graphs", "CUDA graphs: captured once, replayed with other data", 40, WAYS, True),
    Stage("streams", "the current stream is used", 30, WAYS, True),
    Stage("determinism", "the same bits over 100 runs", 40, WAYS, True),
    Stage("large", "offsets beyond 32 bits", 50, BACKENDS),
    Stage("images", "the network's images a second, eager and in a CUDA graph, beside stock", 160, NETWORKS),
    Stage(
        "sanitizers",
        "compute-sanitizer's four tools, each shown to see a planted bug",
        120,
        crossed(("planted", *WAYS), TOOLS),
        True,
    ),
    Stage("prove", "what `alexnet_ext.prove` finds, in at most a minute; backend='auto' follows it", 120),
    Stage("compiled", "the network beside torch.compile(mode='max-autotune') of stock", 300, NETWORKS),
)
