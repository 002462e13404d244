"""A folder of images, one folder a class: torchvision's ImageFolder layout."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from .._errors import BadImage, CommandError, path_text
from .._optional import require
from .batches import Drawn, Sample
from .chance import COMPONENTS, EIGENVALUES, draw
from .images import crop, read_image
from .listing import HELD_OUT, Listing, Parts, digest, find_parts, hold_out, list_images
from .preprocessing import IMAGENET, Preprocessing


class FolderSplit(NamedTuple):
    """Training and held-out images, what was left out, and a checksum of the names of both."""

    train: ImageFolder
    held_out: ImageFolder
    notes: tuple[str, ...]
    listing: str


class ImageFolder:
    """Images of ``root/CLASS/*`` scaled and cropped. With ``augment``, as the paper trains: the square from the middle,
    and random numbers for a crop, for mirroring half of the time, and for a shift of colour (``ops.augment``).

    Random numbers depend on seed, epoch and index alone, never on the process or order in which images are read. A
    file that is no image gives a Sample with its ``error``.
    """

    def __init__(
        self,
        root: Path,
        samples: list[tuple[str, int]],
        classes: tuple[str, ...],
        preprocessing: Preprocessing,
        augment: bool = False,
        seed: int = 0,
    ) -> None:
        self.root, self.samples, self.classes = root, samples, classes
        self.preprocessing, self.augment, self.seed = preprocessing, augment, seed
        self.components, self.eigenvalues = COMPONENTS, EIGENVALUES

    @classmethod
    def split(
        cls, root: Path, size: int, seed: int, val: Path | None = None, held_out: float | None = None
    ) -> FolderSplit:
        """The images to train on and those held out: those of ``val``, or of the held-out part of ``root`` if it has
        one, else the share ``held_out`` (a tenth) of each class.

        Raises CommandError for what ``list_images`` refuses, and for a class none of whose images can be read.
        """
        require("PIL.Image")  # a missing package is reported here, not by a worker process
        parts = parts_of(root, val, held_out)
        seen: dict[tuple[int, int], str] = {}
        base = parts.train or root
        train, notes = cls.training(root, size, seed, parts, seen)
        if parts.held_out is None:
            train.samples, others = hold_out(base, train.samples, HELD_OUT if held_out is None else held_out)
        else:
            evaluated = list_images(parts.held_out, train.classes, seen=seen)
            others, notes = evaluated.samples, (*notes, *evaluated.notes)
        listed = [(base, train.samples), (parts.held_out or base, others)]
        found = cls(root, others, train.classes, train.preprocessing)
        return FolderSplit(train, found, notes, digest(listed, train.classes))

    @classmethod
    def training(
        cls, root: Path, size: int, seed: int, parts: Parts, seen: dict[tuple[int, int], str] | None = None
    ) -> tuple[ImageFolder, tuple[str, ...]]:
        """All images of the training part, and notes. ``seen`` is as in ``list_images``, errors are as in ``split``."""
        found = list_images(parts.train or root, without=parts.held_out, seen=seen)
        check_readable(found)
        data = cls(root, found.samples, found.classes, imagenet_preprocessing(size), augment=True, seed=seed)
        return data, (*parts.notes, *found.notes)

    @classmethod
    def held_out(
        cls, root: Path, preprocessing: Preprocessing, classes: tuple[str, ...]
    ) -> tuple[ImageFolder, tuple[str, ...]]:
        """The images of ``root``, or of its held-out part if it has one, to evaluate a network of ``classes``. Returns
        also notes: the part taken, and what was left out."""
        require("PIL.Image")
        parts = find_parts(root) if root.is_dir() else Parts(None, None, ())
        part = parts.held_out
        if part is None or part.name in classes:
            found = list_images(root, classes)
            return cls(root, found.samples, classes, preprocessing), found.notes
        found = list_images(part, classes)
        note = f"{path_text(root)}: the images are those of {path_text(part.name)}"
        return cls(root, found.samples, classes, preprocessing), (note, *found.notes)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, index = key
        path, target = self.samples[index]
        try:
            image = read_image(path)
        except BadImage as error:
            return Sample(index, None, target, error)
        if not self.augment:
            return Sample(index, crop(image, self.preprocessing.resize, self.preprocessing.size), target)
        drawn = self.drawn(epoch, np.array([index]))
        square = crop(image, self.preprocessing.resize, self.preprocessing.resize)
        return Sample(index, square, target, drawn=Drawn(*(values[0] for values in drawn)))

    def drawn(self, epoch: int, indices: np.ndarray) -> Drawn:
        """The random numbers of the images ``indices``, int64 (N,)."""
        room = self.preprocessing.resize - self.preprocessing.size
        return draw(self.seed, epoch, indices, len(self), room, self.components, self.eigenvalues)


def parts_of(root: Path, val: Path | None, held_out: float | None) -> Parts:
    """The folder of each part, by the user's options or by the names of folders. CommandError if they do not fit."""
    if val is not None:
        if not val.is_dir():
            raise CommandError(f"--val {path_text(val)}: {'not a folder' if val.exists() else 'no such folder'}", 2)
        if root.resolve().is_relative_to(val.resolve()):
            raise CommandError(f"--val {path_text(val)}: holds the images to train on, in {path_text(root)}", 2)
        return Parts(find_parts(root, without=val).train if root.is_dir() else None, val, ())
    parts = find_parts(root) if root.is_dir() else Parts(None, None, ())
    if parts.train is None or parts.held_out is None:
        return Parts(parts.train, None, ())
    if held_out is not None:
        raise CommandError(f"--held-out {held_out}: {path_text(parts.held_out)} holds the images held out already", 2)
    return parts


def check_readable(found: Listing) -> None:
    """Raises CommandError for a class without a readable image."""
    first: dict[int, BadImage | None] = {}  # by class: the error of its first image, None once one was read
    for path, target in found.samples:
        if first.get(target, True):
            try:
                read_image(path)
                first[target] = None
            except BadImage as error:
                first.setdefault(target, error)
    for target, problem in first.items():
        if problem is not None:
            count = sum(target == other for _, other in found.samples)
            name = path_text(found.classes[target])
            raise CommandError(f"{problem}; none of the {count:,} images of class {name} can be read", 2)


def imagenet_preprocessing(size: int) -> Preprocessing:
    """227 of 256 pixels, as in the paper, in the same proportion for other sizes; ImageNet's mean and deviation."""
    return Preprocessing(size, round(size * 256 / 227), **IMAGENET)
