"""Batches on their way to the device. The copies to a GPU have not yet run on one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..data.batches import Batch, Drawn


class Inputs(NamedTuple):
    """A batch on the device: bytes (N, channels, height, width), classes (N,), and how to augment each image."""

    images: Tensor
    targets: Tensor
    drawn: Drawn | None

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.images, self.targets, *(self.drawn or ()))

    @staticmethod
    def of(tensors: tuple[Tensor, ...]) -> Inputs:
        """From what ``tensors`` returns."""
        images, targets, *drawn = tensors
        return Inputs(images, targets, Drawn(*drawn) if drawn else None)

    def split(self, pieces: int) -> Iterator[Inputs]:
        """This batch in at most ``pieces`` pieces of nearly one size, without a copy."""
        size = -(-len(self.targets) // pieces)
        yield from map(Inputs.of, zip(*(tensor.split(size) for tensor in self.tensors()), strict=True))


class Feed:
    """Copies batches to the device. On a GPU a stream of its own copies them beside the step before, which the host has
    launched already. They come into fresh memory, so that no copy waits for a step to read another."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, group: list[Batch]) -> list[Inputs]:
        if self.stream is None:
            return [Inputs(batch.images, batch.targets, batch.drawn) for batch in group]
        with torch.cuda.stream(self.stream):
            inputs = [self._copied(batch) for batch in group]
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self.stream)
        for tensor in (tensor for part in inputs for tensor in part.tensors()):
            tensor.record_stream(current)  # its memory is free once the step has read it
        return inputs

    def _copied(self, batch: Batch) -> Inputs:
        found = Inputs(batch.images, batch.targets, batch.drawn).tensors()
        # From pageable memory the copy would make the host wait. Only CPU memory is pinned: a batch may be on the GPU.
        pinned = (t.pin_memory() if t.device.type == "cpu" and not t.is_pinned() else t for t in found)
        return Inputs.of(tuple(tensor.to(self.device, non_blocking=True) for tensor in pinned))
