"""The losses of the steps taken, read without making the host wait for the device. Not yet run on a GPU."""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..parallel.ranks import ALONE, Ranks
from .step import Taken

EVERY_CUDA = 20  # steps whose losses are copied together
AHEAD = 2  # such copies that may be under way: further ahead than this the host waits for the device


class Measured(NamedTuple):
    """Of step ``step``: mean loss, share of right guesses, images, and what else is logged."""

    step: int
    loss: float
    accuracy: float
    images: int
    values: dict[str, Any]


class Losses:
    """Keeps the results of steps on the device, and copies some at a time to pinned memory: sums over ``ranks``."""

    def __init__(self, device: torch.device, ranks: Ranks = ALONE) -> None:
        self.device, self.ranks = device, ranks
        self.every = EVERY_CUDA if device.type == "cuda" else 1
        self.kept: list[tuple[int, Taken, dict[str, Any]]] = []
        self.copies: deque[tuple[list[tuple[int, Taken, dict[str, Any]]], Tensor, Tensor, Any]] = deque()

    def add(self, step: int, taken: Taken, values: dict[str, Any]) -> None:
        self.kept.append((step, taken, values))
        if len(self.kept) >= self.every:
            self._copy()

    def read(self, wait: bool = False) -> list[Measured]:
        """What has arrived since the last call, by step; ``wait`` for all of it."""
        if wait and self.kept:
            self._copy()
        found: list[Measured] = []
        while self.copies:
            steps, losses, rights, event = self.copies[0]
            if event is not None and (wait or len(self.copies) > AHEAD):
                event.synchronize()
            elif event is not None and not event.query():
                break
            self.copies.popleft()
            for (step, taken, values), loss, right in zip(steps, losses.tolist(), rights.tolist(), strict=True):
                found.append(Measured(step, loss, right / taken.images, taken.images, values))
        return found

    def _copy(self) -> None:
        # To the CPU without a wait is to pinned memory.
        summed = (self.ranks.add_up(torch.stack([getattr(t, n) for _, t, _ in self.kept])) for n in ("loss", "right"))
        losses, rights = (tensor.to("cpu", non_blocking=True) for tensor in summed)
        event = None
        if self.device.type == "cuda":
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self.device))
        self.copies.append((self.kept, losses, rights, event))
        self.kept = []
