"""Of several ways to compute the same on a device, the fastest: they run in turns, and the median counts."""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .._difference import relative_difference
from .._errors import is_out_of_memory
from . import _known

Clock = Callable[[], float]
Results = Sequence[Tensor]

WARM_UP = 0.2
"""Seconds for which the candidates run before they are timed: a GPU at rest has a lower clock."""
REPEATS, ROUNDS = 10, 5
MARGIN = 0.95
"""Ours is chosen if it takes at most this share of stock PyTorch's time: less of a gain may be noise."""

allowed = True


@dataclass(frozen=True)
class Candidate:
    """One way to compute something: its name in the file, and the call."""

    name: str
    run: Callable[[], Results]


def clock_of(device: torch.device) -> Clock:
    """Seconds, once this device has done all its work."""

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return clock


def agree(ours: Results, theirs: Results) -> bool:
    """Whether two candidates computed the same, within some roundings of the dtype (TF32's for fp32)."""
    pairs = zip(ours, theirs, strict=True)
    return all(a.dtype == b.dtype and relative_difference(a, b) <= 16 * _rounding(b.dtype) for a, b in pairs)


def agree_as_layers(ours: Results, theirs: Results) -> bool:
    """The same for [y, gradients] of a layer. Where two roundings pick another winner of a window, or another sign
    before a ReLU, a value of a gradient moves as a whole: gradients are compared by their norms."""
    pairs = zip(ours[1:], theirs[1:], strict=True)
    return agree(ours[:1], theirs[:1]) and all(
        a.dtype == b.dtype and relative_difference(a, b, 2) <= 2 * math.sqrt(_rounding(b.dtype)) for a, b in pairs
    )


def _rounding(dtype: torch.dtype) -> float:
    return 2.0**-10 if dtype == torch.float32 else torch.finfo(dtype).eps


TROUBLE = ("Failed to find C compiler", "No space left")


def is_trouble(error: BaseException) -> bool:
    """Whether this is the machine's fault and no kernel's: memory, disk, a compiler that is missing."""
    listed = isinstance(error, OSError) or any(words in str(error) for words in TROUBLE)
    return listed or is_out_of_memory(error)


def running(candidates: Sequence[Candidate], clock: Clock) -> Iterator[tuple[Candidate, Results]]:
    """Yield (candidate, results) for every candidate that runs, warning about those that raise.

    RuntimeError if none runs.
    """
    ran = False
    for candidate in candidates:
        try:
            results = candidate.run()
            clock()  # an asynchronous error shows here
        except Exception as error:  # a kernel that does not build, too little memory: whatever it is
            warnings.warn(f"{candidate.name} is not measured, as it raises {error!r:.200}", stacklevel=3)
            continue
        ran = True
        yield candidate, results
    if not ran:
        raise RuntimeError(f"none of {', '.join(candidate.name for candidate in candidates)} runs")


def timings(candidates: Sequence[Candidate], clock: Clock) -> dict[str, float]:
    """Seconds per call for each candidate that runs and agrees with the first one that ran.

    The others are dropped with a warning.
    """
    reference: Results | None = None
    left = []
    for candidate, results in running(candidates, clock):
        if reference is None:
            reference = results
        elif not agree(results, reference):
            warnings.warn(f"{candidate.name} is not measured, as its result differs", stacklevel=2)
            continue
        left.append(candidate)
    return race(left, clock)


def race(candidates: Sequence[Candidate], clock: Clock) -> dict[str, float]:
    """Seconds per call of each candidate: the median of some rounds, in which they take turns, after a warm-up."""
    begun, turns = clock(), 0
    while clock() - begun < WARM_UP:
        for candidate in candidates:
            candidate.run()
        turns += 1
    # All rounds together take about as long as the warm-up, at least one call each.
    repeats = max(1, min(REPEATS, turns // ROUNDS))
    seconds: dict[str, list[float]] = {candidate.name: [] for candidate in candidates}
    for _ in range(ROUNDS):
        for candidate in candidates:
            begun = clock()
            for _ in range(repeats):
                candidate.run()
            seconds[candidate.name].append((clock() - begun) / repeats)
    return {name: statistics.median(times) for name, times in seconds.items()}


def winner(seconds: Mapping[str, float]) -> str:
    """The fastest; stock PyTorch, where it takes part, unless another is faster by more than noise."""
    best = min(seconds, key=seconds.__getitem__)
    return "stock" if seconds[best] > MARGIN * seconds.get("stock", float("inf")) else best


def is_plain() -> bool:
    """Whether operators run at once and on values: no CUDA graph is captured, no function traced or transformed."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())
    )


def may_race() -> bool:
    """Whether something may be measured now. Under deterministic algorithms no choice may depend on a clock, and the
    process that proves kernels (``selfcheck/child.py``) measures and remembers nothing."""
    return allowed and is_plain() and not torch.are_deterministic_algorithms_enabled()


def fastest(what: str, device: torch.device, candidates: Sequence[Candidate], clock: Clock | None = None) -> Candidate:
    """The fastest candidate for ``what`` (the call in words) on this device: known, measured now, or the first.

    Candidates are in the static order: the first is trusted, and taken where nothing may be measured. One that was
    proven after the race has it run again.
    """
    by_name = {candidate.name: candidate for candidate in candidates}
    known = _known.on(device)
    found = known.races.get(what)
    taken = by_name.get(found.choice) if found is not None else None
    if taken is not None and found is not None and found.covers(by_name):
        return taken
    if len(candidates) == 1 or not may_race():
        return taken or candidates[0]
    seconds = timings(candidates, clock or clock_of(device))
    best = min(seconds, key=seconds.__getitem__)
    known.add(races={what: _known.Race.of(best, seconds, by_name)})
    return by_name[best]
