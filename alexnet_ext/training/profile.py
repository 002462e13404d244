"""``--profile N``: what the host and the device do in N steps."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from .._errors import path_text

TRACE = "trace.json"
WARM_UP = 10  # steps before: kernels are chosen, a CUDA graph is captured


@contextmanager
def profiled(out: Path, steps: int, note: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """Context manager; the function that it gives is to be called after each step. It writes a trace of ``steps`` steps
    (0: none) into the run folder ``out``, in Chrome's format, and at the end ``note`` names it."""
    if not steps:
        yield lambda: None
        return
    path = out / TRACE
    written = False

    def write(profile: torch.profiler.profile) -> None:
        nonlocal written
        beside = path.with_name(f".{path.name}.tmp")
        profile.export_chrome_trace(str(beside))
        os.replace(beside, path)
        written = True

    schedule = torch.profiler.schedule(wait=WARM_UP - 1, warmup=1, active=steps, repeat=1)
    with torch.profiler.profile(schedule=schedule, on_trace_ready=write) as profile:
        yield profile.step
    if written:
        note(f"Profile of steps {WARM_UP + 1} to {WARM_UP + steps}: {path_text(path)}; ui.perfetto.dev shows it")
    else:
        note(f"No profile: this run ended before its step {WARM_UP + 1}")
