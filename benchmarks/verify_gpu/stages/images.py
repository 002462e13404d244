"""The network's images a second, bf16 on a GPU: ours eager and in a CUDA graph, and stock in both layouts."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks import harness
from tests.support import cases

from ..common import SIZES, captured, each_way, preferring
from ..report import Finding
from ..timing import Run, images_per_second, warm_up
from . import NETWORKS, Task

TARGETS = {"training step 128": 67_000, "training step 1024": 95_000, "inference 1024": 300_000}
"""Images a second, for one H100."""


def run(task: Task) -> Iterator[Finding]:
    for name, kind, batch in networks(task):
        steps = {f"stock {layout}": step(kind, batch, task.device, layout=layout) for layout in harness.LAYOUTS}
        steps |= our_steps(kind, batch, task.device)
        yield finding(name, batch, steps, task.device, "eager")


def networks(task: Task) -> Iterator[tuple[str, str, int]]:
    """(part, kind, batch) of the requested parts; small on a CPU."""
    torch.backends.cudnn.benchmark = True
    for name in filter(task.wants, NETWORKS):
        kind, _, batch = name.rpartition(" ")
        if task.device == "cuda":
            warm_up(task.device)
            yield name, kind, int(batch)
        elif batch == "128":
            yield name, kind, 2


def step(
    kind: str, batch: int, device: str, way: str = "stock", layout: str = "channels_last", **options: object
) -> Run:
    dtype = SIZES[device].dtypes[0]
    bare = harness.network_run(kind, way != "stock", batch, layout, device == "cuda", device, dtype, **options)
    return partial(preferred_step, bare, way, device)


def preferred_step(bare: Run, way: str, device: str) -> None:
    with preferring(way, device):
        bare()


def our_steps(kind: str, batch: int, device: str) -> dict[str, Run]:
    steps = {}
    for way in each_way(device):
        steps[way] = step(kind, batch, device, way)
        if device == "cuda":
            try:
                steps[f"{way} graph"] = captured(step(kind, batch, device, way)).replay
            except Exception as error:  # go on to measure the others
                print(f"{way} is not captured: {type(error).__name__}: {str(error)[:1000]}", flush=True)
    return steps


def finding(name: str, batch: int, steps: dict[str, Run], device: str, against: str) -> Finding:
    found = images_per_second(steps, batch, device)
    stock = {way: rate for way, rate in found.items() if "stock" in way}
    ours = {way: rate for way, rate in found.items() if way not in stock}
    numbers: dict[str, object] = {f"{way} images/s": rate for way, rate in found.items()}
    numbers["fastest"] = max(found, key=found.__getitem__)
    numbers["target"] = TARGETS.get(name)
    numbers["times stock"] = max(ours.values()) / max(stock.values()) if ours and stock else None
    title = f"AlexNet {name}, {cases.dtype_id(SIZES[device].dtypes[0])}"
    about = {"kind": "images", "network": name, "against": against}
    missing = ", ".join(sorted(steps.keys() - found.keys()))
    return Finding(title, None, f"does not run: {missing}" if missing else "", numbers, about)
