"""Reads what ``alexnet prepare`` wrote: batches are rows of mapped shards, or of a copy of them in memory."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import mmap
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .._errors import CommandError, first_line, os_error, path_text
from ..ops.augment.reference import yuv420_to_rgb
from .batches import Batch, Drawn, Key, Sample
from .chance import draw
from .images import middle
from .packed import SPLITS, STORES, Index, Shard, image_shape
from .preprocessing import IMAGENET, Preprocessing

OPEN_SHARDS = 256  # of each split: each takes one of the process's open files, often 1,024


class Mapped(NamedTuple):
    """The images of a shard, uint8 (n, *image_shape), and the memory of its file, where they begin at ``offset``."""

    rows: np.ndarray
    memory: mmap.mmap
    offset: int


class PackedFolder:
    """One of ``SPLITS`` of a folder that ``alexnet prepare`` wrote, as ``batches`` reads it.

    ``targets`` is int64 (N,). With ``augment`` an image is its whole square as it was stored, with the random numbers
    that ``ops.augment`` takes, colours along the folder's own components; without, the middle ``preprocessing.size``
    pixels in RGB.
    Random numbers depend on seed, epoch and index alone. ``classes`` are those of a network, which may have more.
    Raises CommandError where an index or a shard is missing, cut short or of another shape.
    """

    def __init__(
        self,
        root: Path,
        split: str,
        preprocessing: Preprocessing,
        augment: bool = False,
        seed: int = 0,
        classes: tuple[str, ...] | None = None,
    ) -> None:
        self.root, self.preprocessing, self.augment, self.seed = root, preprocessing, augment, seed
        self.index = Index.read(root)
        self.classes, self.shards = classes or self.index.classes, self.index.shards[split]
        if preprocessing.resize != self.index.side:
            raise CommandError(
                f"{path_text(root)}: its images have a side of {self.index.side}, where {preprocessing.resize} is "
                "needed; prepare them anew with --side"
            )
        self.shape = image_shape(self.index.side, self.index.store)
        self.starts = np.cumsum([0, *(shard.images for shard in self.shards)])
        self.kept: Tensor | None = None  # all images, uint8 (N, *shape)
        self.targets = self._targets()
        self.components = torch.tensor(self.index.eigenvectors).T
        self.eigenvalues = torch.tensor(self.index.eigenvalues)

    def _targets(self) -> Tensor:
        unknown = sorted(set(self.index.classes) - set(self.classes))
        if unknown:
            name = path_text(unknown[0])
            raise CommandError(f"{path_text(self.root)}: {name} is not one of the {len(self.classes)} classes", 2)
        own = [self.classes.index(name) for name in self.index.classes]
        self.begin()
        labels = [self._labels(shard) for shard in self.shards]
        return torch.tensor(own)[np.concatenate(labels) if labels else np.empty(0, np.int64)]

    def begin(self) -> None:
        """Raise CommandError for a shard that is not there in full length: beyond a mapped file's end is no memory, and
        a process that reads there is ended by SIGBUS."""
        for shard in self.shards if self.kept is None else ():
            if not shard.fits(self.root):
                name = path_text(self.root / shard.file)
                raise CommandError(f"{name}: missing or cut short, or its labels; `alexnet prepare --verify` tells")

    def _labels(self, shard: Shard) -> np.ndarray:
        labels = _load(self.root / shard.labels)
        if labels.shape != (shard.images,) or labels.dtype != np.int64 or not _within(labels, len(self.index.classes)):
            raise CommandError(f"{path_text(self.root / shard.labels)}: not the {shard.images} labels of the index")
        return labels

    @functools.cached_property
    def pixels(self) -> Callable[[int], Mapped]:
        """The shard of a number. It does not refer to this object, which goes as soon as nobody uses it."""
        return functools.lru_cache(OPEN_SHARDS)(functools.partial(_open, self.root, self.shards, self.shape))

    def __getstate__(self) -> dict[str, Any]:
        """All but what is mapped, for a copy or another process."""
        return {name: value for name, value in self.__dict__.items() if name != "pixels"}

    def _places(self, indices: np.ndarray) -> list[tuple[int, int]]:
        """Shard and row of each image."""
        numbers = np.searchsorted(self.starts, indices, side="right") - 1
        return list(zip(numbers.tolist(), (indices - self.starts[numbers]).tolist(), strict=True))

    @property
    def _window(self) -> slice:
        """The rows, and the columns, of the squares that are read."""
        if self.augment:
            return slice(0, self.index.side)
        start = middle(self.index.side, self.preprocessing.size)
        return slice(start, start + self.preprocessing.size)

    @property
    def threads(self) -> bool:
        """Whether threads may gather batches: not on a GPU, where no other may allocate while a graph is captured."""
        return self.kept is None or self.kept.device.type == "cpu"

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, key: Key) -> Sample:
        found = self.batch([key])
        drawn = None if found.drawn is None else Drawn(*(values[0] for values in found.drawn))
        return Sample(key[1], found.images[0], int(found.targets[0]), drawn=drawn)

    def batch(self, keys: Sequence[Key], pin_memory: bool = False) -> Batch:
        """The images of some keys of one epoch, (N, 3, side, side), channels-last, as bytes stay in the order of the
        file; I420 for ``augment`` is (N, 3 * side / 2, side)."""
        epoch, indices = keys[0][0], np.array([index for _, index in keys])
        drawn = None
        if self.augment:
            room = self.index.side - self.preprocessing.size
            drawn = draw(self.seed, epoch, indices, len(self), room, self.components, self.eigenvalues)
        places = torch.from_numpy(indices)
        images = self._kept(places) if self.kept is not None else self._gathered(indices, pin_memory)
        if not self.augment and self.index.store != STORES[0]:
            images = yuv420_to_rgb(images)[:, self._window, self._window]
        images = images if images.dim() == 3 else images.permute(0, 3, 1, 2)
        return Batch(images, self.targets[places], places, [], drawn)

    @property
    def _part(self) -> tuple[slice, ...]:
        """What is read of an image: the window, or all of I420, whose planes lie apart."""
        return (self._window,) * 2 if self.index.store == STORES[0] else ()

    def _gathered(self, indices: np.ndarray, pin_memory: bool) -> Tensor:
        part = self._part
        shape = *(cut.stop - cut.start for cut in part), *self.shape[len(part) :]
        # Of pinned memory torch keeps what was used, and gives none again before its copy to the GPU has ended.
        images = torch.empty((len(indices), *shape), dtype=torch.uint8, pin_memory=pin_memory)
        rows = images.numpy()
        for place, (number, row) in enumerate(self._places(indices)):
            rows[place] = self.pixels(number).rows[row][part]
        return images

    def _kept(self, places: Tensor) -> Tensor:
        assert self.kept is not None
        device = self.kept.device
        if device.type == "cuda":
            places = places.pin_memory()  # the host would wait for a copy from other memory
        return self.kept.index_select(0, places.to(device, non_blocking=True))[:, *self._part]

    def will_need(self, keys: Sequence[Key]) -> None:
        """Have the system read the images of these keys from the disk, in the background."""
        if self.kept is not None:
            return
        size = math.prod(self.shape)
        for number, row in self._places(np.array([index for _, index in keys])):
            mapped = self.pixels(number)
            start = mapped.offset + row * size
            aligned = start - start % mmap.PAGESIZE
            mapped.memory.madvise(mmap.MADV_WILLNEED, aligned, start + size - aligned)

    def keep(self, device: torch.device, cache: str) -> None:
        """Copy all images to the memory of ``device``. CommandError, which names ``--cache``, if they do not fit."""
        size, free = len(self) * math.prod(self.shape), free_memory(device)
        if size > free:
            raise CommandError(
                f"--cache {cache}: {size:,} bytes needed for the images of {path_text(self.root)}, {free:,} free"
            )
        self.kept = torch.empty((len(self), *self.shape), dtype=torch.uint8, device=device)
        for number, start in enumerate(self.starts[:-1].tolist()):
            rows = self.pixels(number).rows
            for at in range(0, len(rows), 256):
                some = torch.from_numpy(rows[at : at + 256].copy())
                self.kept[start + at : start + at + len(some)].copy_(some)

    def digest(self) -> str:
        """A checksum of all that was packed: names, sizes and bytes of both splits."""
        shards = {split: [asdict(shard) for shard in self.index.shards[split]] for split in SPLITS}
        text = json.dumps([self.index.listing, self.index.side, self.index.classes, shards])
        return hashlib.sha256(text.encode()).hexdigest()


def packed_preprocessing(root: Path, size: int) -> Preprocessing:
    """The packed images' side and mean, for a network with an input of ``size``; the deviation is ImageNet's, which
    sets the scale that networks are started for. CommandError if the images are smaller."""
    index = Index.read(root)
    if size > index.side:
        raise CommandError(
            f"{path_text(root)}: its images have a side of {index.side}, and the network takes {size}; prepare them "
            "anew with --side, or name an --image-size"
        )
    red, green, blue = index.mean
    return Preprocessing(size, index.side, (red, green, blue), IMAGENET["std"])


def free_memory(device: torch.device) -> int:
    """Bytes that a program may still take of a GPU's memory, or of the machine's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def _within(labels: np.ndarray, classes: int) -> bool:
    return not len(labels) or (labels.min() >= 0 and labels.max() < classes)


def _open(root: Path, shards: Sequence[Shard], shape: tuple[int, ...], number: int) -> Mapped:
    shard = shards[number]
    found = _load(root / shard.file, "r")
    if found.shape != (shard.images, *shape) or found.dtype != np.uint8 or not isinstance(found, np.memmap):
        raise CommandError(f"{path_text(root / shard.file)}: not the {shard.images} images of the index")
    return Mapped(np.asarray(found), found._mmap, found.offset)  # type: ignore[attr-defined]


def _load(path: Path, mode: Literal["r"] | None = None) -> np.ndarray:
    try:
        found: np.ndarray = np.load(path, mmap_mode=mode)
        return found
    except OSError as error:
        raise os_error(path, error) from error
    except ValueError as error:
        raise CommandError(f"{path_text(path)}: not a file of NumPy's ({first_line(error)})") from error
