"""The data of a name: the images to train on, those held out, and how to prepare both."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NamedTuple

from .batches import Dataset
from .digits import Digits
from .folder import ImageFolder
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
        """The same images prepared as ``given`` says. Folders take its crops and colours; other data, which have one
        size, take its colours alone."""
        if not isinstance(self.train, ImageFolder) or not isinstance(self.held_out, ImageFolder):
            given = dataclasses.replace(self.preprocessing, mean=given.mean, std=given.std)
        else:
            self.train.preprocessing = self.held_out.preprocessing = given
        return self._replace(preprocessing=given)


def is_folder(data: str) -> bool:
    """Whether some data are a folder of images."""
    return data not in ("digits", "synthetic")


def open_split(data: str, size: int, seed: int, val: str | None = None, held_out: float | None = None) -> Split:
    """``"digits"``, ``"synthetic"`` or the path of a folder, for a network with an input of ``size``.

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
    found = ImageFolder.split(Path(data), size, seed, None if val is None else Path(val), held_out)
    return Split(found.train, found.held_out, found.train.preprocessing, found.notes, found.listing)
