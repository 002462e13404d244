"""``--profile N``: what the host and the device do in N steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from .._errors import path_text
from .files import new_file

TRACE = "trace.json"
WARM_UP = 10  # steps before: kernels are chosen, a CUDA graph is captured


@contextmanager
def profiled(out: Path, steps: int, note: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """Context manager; the function that it gives is to be called after each step. It writes a trace of ``steps`` steps
    (0: none) into the run folder ``out``, in Chrome's format, and at the end ``note`` names it."""
    if not steps:
        yield lambda: None
        return
    path, taken = out / TRACE, 0

    def traced() -> int:
        return min(max(taken - WARM_UP, 0), steps)

    def step() -> None:
        nonlocal taken
        taken += 1  # before the profile's own, which may write the trace
        profile.step()

    def write(profile: torch.profiler.profile) -> None:
        if traced():
            with new_file(path) as beside:
                profile.export_chrome_trace(str(beside))

    schedule = torch.profiler.schedule(wait=WARM_UP - 1, warmup=1, active=steps, repeat=1)
    with torch.profiler.profile(schedule=schedule, on_trace_ready=write) as profile:
        yield step
    if traced():
        note(
            f"Profile of {traced()} steps after this process's first {WARM_UP}: {path_text(path)}; "
            "ui.perfetto.dev shows it"
        )
    else:
        note(f"No profile: this run ended before its step {WARM_UP + 1}")
