"""The data of a name: the images to train on, those held out, and how to prepare both."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import NamedTuple

from .._errors import CommandError, path_text
from .batches import Dataset
from .digits import Digits
from .folder import ImageFolder, parts_of
from .listing import digest
from .packed import INDEX, SPLITS
from .packed_folder import PackedFolder, packed_preprocessing
from .preprocessing import Preprocessing
from .synthetic import Synthetic

SYNTHETIC_CLASSES, SYNTHETIC_IMAGES, SYNTHETIC_HELD_OUT = 10, 4000, 200


class Split(NamedTuple):
    """Training and held-out images of the same classes; for a folder also notes and a checksum of the names."""

    train: Dataset
    held_out: Dataset
    preprocessing: Preprocessing
    notes: tuple[str, ...] = ()
    listing: str = ""

    def brought_as(self, given: Preprocessing) -> Split:
        """The same images prepared as ``given`` says. Folders take its crops and colours, packed ones keep the side of
        their squares; other data, which have one size, take its colours alone."""
        folders = [part for part in (self.train, self.held_out) if isinstance(part, (ImageFolder, PackedFolder))]
        if any(isinstance(part, PackedFolder) for part in folders):
            given = dataclasses.replace(given, resize=self.preprocessing.resize)
        elif not folders:
            given = dataclasses.replace(self.preprocessing, mean=given.mean, std=given.std)
        for part in folders:
            part.preprocessing = given
        return self._replace(preprocessing=given)


def is_folder(data: str) -> bool:
    """Whether some data are a folder of images."""
    return data not in ("digits", "synthetic")


def is_packed(root: Path) -> bool:
    """Whether a folder was written by ``alexnet prepare``. CommandError if it is unfinished."""
    unfinished = root / "progress" / "plan.json"
    if (root / INDEX).is_file() and any(root.glob("*.npy")):
        return True
    if unfinished.is_file():
        raise CommandError(f"{path_text(root)}: not finished; the `alexnet prepare` that began it goes on")
    return False


def open_split(data: str, size: int, seed: int, val: str | None = None, held_out: float | None = None) -> Split:
    """``"digits"``, ``"synthetic"`` or the path of a folder, packed or not, for a network with an input of ``size``.

    ``val`` is a folder of held-out images, or ``held_out`` their share of the folder's. ``seed`` is that of random
    crops; it never changes the split. Raises CommandError for a folder without images.
    """
    if data == "digits":
        return Split(*Digits.split(), Digits.preprocessing(size))
    if data == "synthetic":
        train, others = (
            Synthetic(length, SYNTHETIC_CLASSES, size, part)
            for part, length in enumerate((SYNTHETIC_IMAGES, SYNTHETIC_HELD_OUT))
        )
        return Split(train, others, Synthetic.preprocessing(size))
    root, other = Path(data), None if val is None else Path(val)
    if is_packed(root):
        return _open_packed(root, size, seed, other, held_out)
    if other is not None and is_packed(other):
        return _open_with_packed(root, size, seed, other, held_out)
    found = ImageFolder.split(root, size, seed, other, held_out)
    return Split(found.train, found.held_out, found.train.preprocessing, found.notes, found.listing)


def _open_packed(root: Path, size: int, seed: int, val: Path | None, held_out: float | None) -> Split:
    if held_out is not None:
        raise CommandError(f"--held-out {held_out}: {path_text(root)} is packed, with the images held out already", 2)
    preprocessing = packed_preprocessing(root, size)
    train = PackedFolder(root, SPLITS[0], preprocessing, augment=True, seed=seed)
    if not len(train):
        raise CommandError(f"{path_text(root)}: no images to train on", 2)
    others, notes = open_held_out(val or root, preprocessing, train.classes)
    listing = train.digest() if val is None else _listing(train.digest(), val, others)
    skipped = sum(train.index.skipped.values())
    left_out = [f"{path_text(root)}: {skipped:,} images could not be read when it was packed"] if skipped else []
    return Split(train, others, preprocessing, (*notes, *left_out), listing)


def _open_with_packed(root: Path, size: int, seed: int, val: Path, held_out: float | None) -> Split:
    """A folder that is not packed, with the held-out images of one that is."""
    parts = parts_of(root, val, held_out)
    train, notes = ImageFolder.training(root, size, seed, parts)
    others, more = open_held_out(val, train.preprocessing, train.classes)
    listing = _listing(digest([(parts.train or root, train.samples)], train.classes), val, others)
    return Split(train, others, train.preprocessing, (*notes, *more), listing)


def _listing(train: str, val: Path, others: ImageFolder | PackedFolder) -> str:
    """A checksum of that of the training images, and of held-out ones from elsewhere."""
    names = others.digest() if isinstance(others, PackedFolder) else digest([(val, others.samples)], others.classes)
    return hashlib.sha256(f"{train} {names}".encode()).hexdigest()


def open_held_out(
    root: Path, preprocessing: Preprocessing, classes: tuple[str, ...]
) -> tuple[ImageFolder | PackedFolder, tuple[str, ...]]:
    """The images of a folder to evaluate a network of ``classes``: those held out of a packed one, and of another as
    ``ImageFolder.held_out`` says. Returns also notes. CommandError for a folder without any."""
    if not is_packed(root):
        return ImageFolder.held_out(root, preprocessing, classes)
    found = PackedFolder(root, SPLITS[1], preprocessing, classes=classes)
    if not len(found):
        raise CommandError(f"{path_text(root)}: no images held out", 2)
    return found, ()
