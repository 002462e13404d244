"""Batches in an order that depends on seed and epoch alone, from any place in the epoch; broken images left out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from .._errors import BadImage

AHEAD = 2048  # images that the system reads from the disk before they are wanted: 400 MB of 256 x 256
MAX_SKIPPED = 0.05  # share of a split's images: with more unreadable ones the data are refused


class Drawn(NamedTuple):
    """The random numbers of an image, or (stacked) of a batch: arguments of ``ops.augment``."""

    offsets: Tensor
    flips: Tensor
    shifts: Tensor


@dataclass(frozen=True, slots=True)
class Sample:
    """One image, uint8 (channels, height, width), and its class; or None and the ``error`` of its file.

    ``drawn`` says how to augment the image; None if it is ready.
    """

    index: int
    image: Tensor | None
    target: int
    error: BadImage | None = None
    drawn: Drawn | None = None


class Batch(NamedTuple):
    """The readable images of a batch, uint8 (N, channels, height, width), their classes and places in the data. Then
    the errors of the others, and the random numbers if the images are to be augmented. A broken image is not replaced:
    N is smaller, even 0."""

    images: Tensor
    targets: Tensor
    indices: Tensor
    errors: list[BadImage]
    drawn: Drawn | None = None


Key = tuple[int, int]
"""(epoch, index) of an image: the epoch for random crops that change with it."""


class Dataset(Protocol):
    """What ``batches`` reads."""

    classes: tuple[str, ...]

    def __len__(self) -> int: ...

    def __getitem__(self, key: Key) -> Sample: ...


@runtime_checkable
class Gathering(Dataset, Protocol):
    """A dataset that makes a batch at once. Threads serve it better than processes; ``threads``: whether they may."""

    @property
    def threads(self) -> bool: ...

    def begin(self) -> None:
        """An epoch begins: raise CommandError for files that have become shorter."""

    def batch(self, keys: Sequence[Key], pin_memory: bool = False) -> Batch:
        """The images of some keys, all of one epoch."""

    def will_need(self, keys: Sequence[Key]) -> None:
        """Say that a batch of these keys comes soon."""


def collate(samples: list[Sample]) -> Batch:
    """Stack the readable images."""
    good = [sample for sample in samples if sample.image is not None]
    drawn = [sample.drawn for sample in good if sample.drawn is not None]
    return Batch(
        images=torch.stack([s.image for s in good if s.image is not None])
        if good
        else torch.empty(0, dtype=torch.uint8),
        targets=torch.tensor([s.target for s in good], dtype=torch.int64),
        indices=torch.tensor([s.index for s in good], dtype=torch.int64),
        errors=[s.error for s in samples if s.error is not None],
        drawn=Drawn(*(torch.stack(column) for column in zip(*drawn, strict=True))) if drawn else None,
    )


def read_batch(dataset: Dataset, keys: Sequence[Key], pin_memory: bool = False) -> Batch:
    """Read and stack some images, in the order of their keys; only a ``Gathering`` heeds ``pin_memory``."""
    if isinstance(dataset, Gathering):
        return dataset.batch(keys, pin_memory)
    return collate([dataset[key] for key in keys])


def permutation(length: int, seed: int, epoch: int) -> list[int]:
    """The order of an epoch: a pure function, so a checkpoint need only record the place in it."""
    of_epoch = seed * 1_000_003 + epoch if seed < 2**32 else narrowed(seed, epoch)
    generator = torch.Generator().manual_seed(of_epoch % 2**32)
    return torch.randperm(length, generator=generator).tolist()


def narrowed(seed: int, *rest: int) -> int:
    """``seed`` in 32 bits: torch's and NumPy's generators ignore the others, so 0 and 2**32 would be the same."""
    if seed < 2**32:
        return seed
    return int.from_bytes(hashlib.sha256(repr((seed, *rest)).encode()).digest()[:4], "little")


def batches(
    dataset: Dataset,
    batch_size: int,
    *,
    seed: int | None = None,
    epoch: int = 0,
    start: int = 0,
    limit: int | None = None,
    part: Callable[[list[list[Key]]], list[list[Key]]] = lambda keys: keys,
    read: Callable[[Sequence[Sequence[Key]]], Iterator[Batch]] | None = None,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """The batches of one epoch from number ``start`` on, the last one smaller if need be.

    ``seed`` None keeps the data's own order; ``limit`` stops after the first ``limit`` images; ``part`` picks of all
    batches what this process takes, maybe empty ones; ``read`` are the ``Readers`` of ``dataset`` (None: this process
    reads). Draws nothing from the global random generators.
    """
    order = list(range(len(dataset))) if seed is None else permutation(len(dataset), seed, epoch)
    order = order[:limit]
    keys = [
        [(epoch, i) for i in order[at : at + batch_size]] for at in range(start * batch_size, len(order), batch_size)
    ]
    parts = part(keys)
    keys = [some for some in parts if some]
    found = read(keys) if read is not None else (read_batch(dataset, some, pin_memory) for some in keys)
    if isinstance(dataset, Gathering):
        dataset.begin()
        found = _announced(dataset, keys, found, max(1, AHEAD // batch_size))
    found = map(_pinned, found) if pin_memory else found
    return found if len(keys) == len(parts) else (next(found) if some else collate([]) for some in parts)


def _announced(dataset: Gathering, keys: list[list[Key]], found: Iterator[Batch], ahead: int) -> Iterator[Batch]:
    """The batches ``found``; the next ``ahead`` are announced."""
    for some in keys[:ahead]:
        dataset.will_need(some)
    for place, batch in enumerate(found, ahead):
        if place < len(keys):
            dataset.will_need(keys[place])
        yield batch


def _pinned(batch: Batch) -> Batch:
    """The batch in memory that a GPU copies from without a wait."""
    if batch.images.device.type != "cpu" or batch.images.is_pinned():
        return batch
    return batch._replace(images=batch.images.pin_memory())
