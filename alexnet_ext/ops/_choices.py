"""Measured choices: of several ways to compute the same, the fastest on this device, remembered on disk.

A convolution's choices are made on its first call (``fastest``), those between an op's backends by ``alexnet tune``.
Nothing is measured while a CUDA graph is captured or torch.compile traces. A known choice is used there, else the
static one. Not yet run on a GPU.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import importlib.metadata
import json
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._difference import relative_difference
from .._version import __version__

Clock = Callable[[], float]
Results = Sequence[Tensor]

REPEATS, ROUNDS = 10, 3


@dataclass(frozen=True)
class Candidate:
    """One way to compute something: its name in the file, and the call."""

    name: str
    run: Callable[[], Results]


def assume_constant_result(function: Callable[..., Any]) -> Callable[..., Any]:
    """As ``torch.compiler``'s, which imports torch._dynamo, a second of work, to set this one mark."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def gpu_clock() -> float:
    """Seconds, once the GPU has done all its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def agree(ours: Results, theirs: Results) -> bool:
    """Whether two candidates computed the same, within some roundings of the dtype (TF32's for fp32)."""
    pairs = zip(ours, theirs, strict=True)
    return all(a.dtype == b.dtype and relative_difference(a, b) <= 16 * _rounding(b.dtype) for a, b in pairs)


def _rounding(dtype: torch.dtype) -> float:
    return 2.0**-10 if dtype == torch.float32 else torch.finfo(dtype).eps


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
    """Seconds per call of each candidate: the least of some rounds, in which they take turns."""
    seconds = {candidate.name: float("inf") for candidate in candidates}
    for _ in range(ROUNDS):
        for candidate in candidates:
            begun = clock()
            for _ in range(REPEATS):
                candidate.run()
            seconds[candidate.name] = min(seconds[candidate.name], (clock() - begun) / REPEATS)
    return seconds


def cache_file() -> Path:
    """The choices file in the user's cache folder, by the XDG base directory specification."""
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder) / "alexnet_ext" / "choices.json"


class Choices:
    """Choices by key, in memory and in one JSON file that any number of processes read and write.

    A file that cannot be read or written gets one warning; choices are then kept in memory alone.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.memory: dict[str, dict[str, Any]] | None = None

    def known(self) -> dict[str, dict[str, Any]]:
        if self.memory is None:
            self.memory = self._read()
        return self.memory

    def remember(self, key: str, seconds: Mapping[str, float]) -> str:
        """Keep the fastest of these, and the times in microseconds; returns its name."""
        name = min(seconds, key=seconds.__getitem__)
        entry = {"choice": name, "microseconds": {n: round(s * 1e6, 2) for n, s in seconds.items()}}
        self.known()[key] = entry
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self._locked():
                merged = self._read() | {key: entry}
                beside = self.path.with_name(f".{self.path.name}.tmp-{os.getpid()}")
                beside.write_text(json.dumps(merged, indent=1, sort_keys=True) + "\n", encoding="utf-8")
                os.replace(beside, self.path)
        except OSError as error:
            self._warn(f"cannot be written, choices last as long as this process: {error}")
        return name

    def _read(self) -> dict[str, dict[str, Any]]:
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            self._warn(f"cannot be read and is not used: {error}")
            return {}
        if not isinstance(found, dict):
            self._warn("holds no choices and is not used")
            return {}
        return {key: entry for key, entry in found.items() if _is_entry(entry)}

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with open(self.path.with_name(f".{self.path.name}.lock"), "w", encoding="utf-8") as file:
            with contextlib.suppress(OSError):  # a file system without locks: the rename keeps the file whole
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _warn(self, what: str) -> None:
        warnings.warn(f"{self.path} {what}", stacklevel=4)


def _is_entry(entry: object) -> bool:
    """Whether this is what ``Choices.remember`` writes: other versions and other programs may have written it."""
    return (
        isinstance(entry, dict) and isinstance(entry.get("choice"), str) and isinstance(entry.get("microseconds"), dict)
    )


@functools.cache
def choices() -> Choices:
    return Choices(cache_file())


@functools.cache
def versions() -> str:
    """The versions that a measured time depends on."""
    found = [f"alexnet_ext {__version__}", f"torch {torch.__version__}"]
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found.append(f"triton {importlib.metadata.version('triton')}")
    return ", ".join(found)


@functools.cache
def device_name(device: torch.device) -> str:
    if device.type != "cuda" or not torch.cuda.is_available():
        return device.type
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} {major}.{minor}"


def frozen() -> bool:
    """Whether nothing may be measured now: a CUDA graph is captured, or torch.compile traces."""
    return torch.compiler.is_compiling() or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


def key_of(what: str, device: torch.device) -> str:
    return f"{what} | {device_name(device)} | {versions()}"


def fastest(what: str, device: torch.device, candidates: Sequence[Candidate], clock: Clock = gpu_clock) -> Candidate:
    """The fastest candidate for ``what`` (the call in words) on this device: known, measured now, or the first.

    Candidates are in the static order: the first is trusted, and taken where nothing may be measured.
    """
    key = key_of(what, device)
    by_name = {candidate.name: candidate for candidate in candidates}
    name = choices().known().get(key, {}).get("choice")
    if name not in by_name:
        if frozen():
            return candidates[0]
        name = choices().remember(key, timings(candidates, clock))
    return by_name[name]


@assume_constant_result
def tuned(op: str, device: torch.device) -> str:
    """The backend that `alexnet tune` found right and fastest for ``op`` on this device; "" where it did not look."""
    return str(choices().known().get(key_of(op, device), {}).get("choice", ""))
