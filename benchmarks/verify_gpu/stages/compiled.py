"""The network compared with stock under ``torch.compile(mode="max-autotune")``, which tunes for a minute or two."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks import harness

from ..report import Finding
from ..timing import images_per_second
from . import Task
from .images import finding, networks, our_steps, step


def run(task: Task) -> Iterator[Finding]:
    if task.device != "cuda":
        return
    for name, kind, batch in networks(task):
        eager = {layout: step(kind, batch, task.device, layout=layout) for layout in harness.LAYOUTS}
        rates = images_per_second(eager, batch, task.device)
        layout = max(rates, key=rates.__getitem__)  # the layout that is faster uncompiled is compiled
        print(f"stock {name}: {rates}", flush=True)
        compiled = partial(torch.compile, mode="max-autotune", dynamic=False)
        steps = {
            f"compiled stock {layout}": step(kind, batch, task.device, layout=layout, compiled=compiled),
            f"stock {layout}": eager[layout],
            **our_steps(kind, batch, task.device),
        }
        yield finding(name, batch, steps, task.device, "compiled")
