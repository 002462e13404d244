"""The stages' clocks: a GPU's own time for an op, and a user's waiting time for a network."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .common import synchronize

Run = Callable[[], Any]
TURNS, ROUNDS = 15, 5
FLUSHED = 2**28
"""Bytes read between turns: more than an H100's 50 MB of L2. Written bytes would still be on their way to memory."""
HEAD_START = 4_000_000
"""Clock cycles, some 2 ms, that the GPU waits: by then all of a turn's kernels are in its queue."""
ROUND = 0.2
"""The shortest round of a network, in seconds."""


@dataclass(frozen=True)
class Backward:
    """Times the backward only. The forward reruns, untimed, before each turn: compiled code frees what it saved."""

    forward: Callable[[], Tensor]
    wanted: list[Tensor]
    dy: Tensor

    def prepared(self) -> Run:
        y = self.forward()
        return lambda: torch.autograd.grad(y, self.wanted, self.dy)


def warm_up(device: str, seconds: float = 0.5) -> None:
    """Work until the clocks are stable."""
    if device != "cuda":
        return
    matrix = torch.randn(4096, 4096, dtype=torch.bfloat16, device=device)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        matrix @ matrix
        torch.cuda.synchronize()


def median_ms(contestants: dict[str, Run | Backward], device: str) -> dict[str, float]:
    """The median time of each contestant, which take turns, with caches flushed between. Those that raise are left out.

    On a GPU it is the GPU's own time, from one event to the next, without gaps in which it waits for the CPU.
    """
    running = {}
    for name, run in contestants.items():
        try:
            for _ in range(3):
                prepared(run)()
            synchronize(device)
        except Exception as error:  # no kernel, no memory, a compiler's failure: measure the others
            print(f"{name} does not run: {type(error).__name__}: {str(error)[:1000]}", flush=True)
            continue
        running[name] = run
    times: dict[str, list[float]] = {name: [] for name in running}
    for _ in range(TURNS if device == "cuda" else 3):
        for name, run in running.items():
            times[name].append(once_ms(prepared(run), device))
    return {name: statistics.median(found) for name, found in times.items()}


def prepared(run: Run | Backward) -> Run:
    return run.prepared() if isinstance(run, Backward) else run


@cache
def flush_buffer() -> Tensor:
    return torch.ones(FLUSHED // 4, device="cuda")


def once_ms(run: Run, device: str) -> float:
    if device != "cuda":
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e3
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush_buffer().sum()
    torch.cuda._sleep(HEAD_START)
    first.record()
    run()
    last.record()
    last.synchronize()
    return first.elapsed_time(last)


def copy_of(moved: int, device: str) -> Run:
    """A copy that reads and writes ``moved`` bytes together."""
    source = torch.ones(max(1, moved // 2), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def copy_rate(device: str) -> float:
    """Bytes a millisecond, read and written, of a copy of half a gigabyte."""
    moved = 2**30 if device == "cuda" else 2**26
    return moved / median_ms({"copy": copy_of(moved, device)}, device)["copy"]


def product_rate(device: str, dtype: torch.dtype) -> float:
    """Floating-point operations a millisecond of a large matrix product, fp32 as TF32 on a GPU."""
    n = 8192 if device == "cuda" else 512
    matrix = torch.randn(n, n, device=device, dtype=dtype)
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        return 2 * n**3 / median_ms({"product": lambda: matrix @ matrix}, device)["product"]
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed


def images_per_second(steps: dict[str, Run], batch: int, device: str) -> dict[str, float]:
    """The median over rounds, in turns. A round is a loop of steps that waits for the GPU at its end."""
    counts, rates = {}, {}
    for name, step in steps.items():
        try:
            for _ in range(2):
                step()
            seconds = round_seconds(step, 1, device)
        except Exception as error:
            print(f"{name} does not run: {type(error).__name__}: {str(error)[:1000]}", flush=True)
            continue
        counts[name] = max(1, int(ROUND / seconds)) if device == "cuda" else 1
        rates[name] = []
    for _ in range(ROUNDS if device == "cuda" else 1):
        for name, count in counts.items():
            rates[name].append(batch * count / round_seconds(steps[name], count, device))
    return {name: statistics.median(found) for name, found in rates.items()}


def round_seconds(step: Run, count: int, device: str) -> float:
    synchronize(device)
    start = time.perf_counter()
    for _ in range(count):
        step()
    synchronize(device)
    return time.perf_counter() - start
