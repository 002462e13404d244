"""A folder of images, one folder a class: torchvision's ImageFolder layout."""

from __future__ import annotations

import os
import random
from pathlib import Path

import torch
from torch import Tensor

from .batches import Drawn, Sample
from .errors import BadImage, CommandError, path_text, require
from .images import EXTENSIONS, crop, read_image
from .preprocessing import IMAGENET, Preprocessing

VALIDATION_NAMES = ("val", "validation", "valid", "test")
HELD_OUT = 0.1  # of the images, where the folder has no validation folder
SPLIT_SEED = 2012

# Principal components of ImageNet's RGB values (in 0 to 1) and their deviations: the paper's colour shift, 4.1.
COMPONENTS = torch.tensor([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])
DEVIATIONS = torch.tensor([0.2175, 0.0188, 0.0045])
COLOUR_SHIFT = 0.1


class ImageFolder:
    """Images of ``root/CLASS/*`` scaled and cropped. With ``augment`` as the paper trains: the square from the middle,
    and for it what is drawn of a crop, of mirroring half of the time, and of a shift of colour (``ops.augment``).

    What is random hangs on seed, epoch and index alone, never on which process or in which order images are
    read. A file that is no image comes back as a Sample with its ``error``.
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

    @classmethod
    def split(cls, root: Path, size: int, seed: int) -> tuple[ImageFolder, ImageFolder]:
        """The images to train on and those held out: ``root/train`` and ``root/val`` where they exist, else
        nine and one tenth of ``root``."""
        require("PIL.Image")  # a missing package is told here, not by a worker process
        preprocessing = imagenet_preprocessing(size)
        folders = [root / name for name in VALIDATION_NAMES if (root / name).is_dir()]
        if (root / "train").is_dir() and folders:
            samples, classes = list_images(root / "train")
            held_out, _ = list_images(folders[0], classes)
        else:
            everything, classes = list_images(root)
            order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(SPLIT_SEED)).tolist()
            count = max(1, round(len(everything) * HELD_OUT))
            held_out = [everything[i] for i in sorted(order[:count])]
            samples = [everything[i] for i in sorted(order[count:])]
            if not samples:
                raise CommandError(f"{path_text(root)}: one image is not enough to train and to evaluate", 2)
        return (
            cls(root, samples, classes, preprocessing, augment=True, seed=seed),
            cls(root, held_out, classes, preprocessing),
        )

    @classmethod
    def held_out(cls, root: Path, preprocessing: Preprocessing, classes: tuple[str, ...]) -> ImageFolder:
        """The images of ``root``, or of ``root/val`` where there is one, to evaluate a network of ``classes``."""
        require("PIL.Image")
        names = [name for name in VALIDATION_NAMES if (root / name).is_dir() and name not in classes]
        samples, _ = list_images(root / names[0] if names else root, classes)
        return cls(root, samples, classes, preprocessing)

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
        drawn = self._draw(random.Random(f"{self.seed} {epoch} {index}"))
        square = crop(image, self.preprocessing.resize, self.preprocessing.resize)
        return Sample(index, square, target, drawn=drawn)

    def _draw(self, chance: random.Random) -> Drawn:
        room = self.preprocessing.resize - self.preprocessing.size
        return Drawn(
            torch.tensor([chance.randint(0, room), chance.randint(0, room)]),
            torch.tensor(chance.random() < 0.5),
            colour_shift([chance.gauss(0, COLOUR_SHIFT) for _ in range(3)]),
        )


def imagenet_preprocessing(size: int) -> Preprocessing:
    """227 of 256 pixels, as in the paper, in the same proportion for other sizes; ImageNet's mean and deviation."""
    return Preprocessing(size, round(size * 256 / 227), **IMAGENET)


def list_images(root: Path, classes: tuple[str, ...] | None = None) -> tuple[list[tuple[str, int]], tuple[str, ...]]:
    """Every image below ``root`` as (path, class), and the names of the classes, which are those of the folders.

    With ``classes`` given the folders must be among them. Raises CommandError for a folder that is missing, has none,
    or leads to another by a link.
    """
    shown = path_text(root)
    if not root.exists():
        raise CommandError(f"{shown}: no such folder", 2)
    if not root.is_dir():
        raise CommandError(f"{shown}: not a folder", 2)
    try:
        found = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
        if not found:
            raise CommandError(f"{shown}: no folders in it; expected one a class, with the images inside", 2)
        if classes is None:
            if len(found) == 1:
                raise CommandError(f"{shown}: {path_text(found[0])} is its only folder; expected one a class", 2)
            classes = tuple(found)
        unknown = sorted(set(found) - set(classes))
        if unknown:
            raise CommandError(f"{path_text(root / unknown[0])}: not one of the {len(classes)} classes trained on", 2)
        numbers = {name: classes.index(name) for name in found}
        listing = require("torchvision.datasets.folder")
        samples = listing.make_dataset(os.fspath(root), numbers, EXTENSIONS, allow_empty=True)
    except OSError as error:
        raise CommandError(f"{path_text(error.filename or root)}: {error.strerror or error}", 2) from error
    if not samples:
        raise CommandError(f"{shown}: no images ({', '.join(EXTENSIONS)}) in its {len(found)} folders", 2)
    folders: dict[str, str] = {}
    for folder in dict.fromkeys(os.path.dirname(path) for path, _ in samples):
        first = folders.setdefault(os.path.realpath(folder), folder)
        if first != folder:  # a link: its images would count twice, among the held out too
            raise CommandError(f"{path_text(folder)}: is {path_text(first)} once more, by a link", 2)
    return samples, classes


def colour_shift(factors: list[float]) -> Tensor:
    """What a multiple of each principal component adds to RGB of 0 to 255: fp32 (3,)."""
    return COMPONENTS @ (DEVIATIONS * torch.tensor(factors)) * 255
